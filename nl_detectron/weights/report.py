"""The account of a conversion, in lines to print."""

from __future__ import annotations

import re
from collections.abc import Iterator

from nl_detectron.weights.blocks import Block
from nl_detectron.weights.convert import Conversion
from nl_detectron.weights.dialects import DIALECTS


def report(result: Conversion, source: str, target: str, verbose: bool) -> Iterator[str]:
    """Yield lines that account for every key, and what a config must say."""
    yield f"{len(result.mapped)} tensors converted"
    if verbose:
        yield from (f"  {old} -> {new}" for old, new in result.mapped.items())
    for what, entries in (("left out", result.dropped), ("added", result.added)):
        for reason in dict.fromkeys(entries.values()):
            keys = [key for key, why in entries.items() if why == reason]
            shown = keys if verbose else keys[:4]
            yield f"{len(keys)} {what}: {reason}"
            yield f"  {', '.join(shown)}{', ...' if len(keys) > len(shown) else ''}"
    if DIALECTS[target].block:
        yield from _describe_blocks(result, target)
    note = DIALECTS[source].note or DIALECTS[target].note
    of_blocks = {key for block in result.blocks.values() for key in block.sources.values()}
    if note and set(result.mapped) - of_blocks:
        library = source if DIALECTS[source].note else target
        yield f"What {library} trains its ResNets with: {note}."


def _describe_blocks(result: Conversion, target: str) -> Iterator[str]:
    """Yield what MODEL.NON_LOCAL is for these blocks; blocks that are alike are told once."""
    alike: dict[str, list[str]] = {}
    for name, block in result.blocks.items():
        alike.setdefault("\n".join(_describe(block, target)), []).append(name)
    for text, names in alike.items():
        of_these = ", ".join(filter(None, names)) or "the block"
        if target == "nl_detectron":
            yield f"MODEL.NON_LOCAL must be, for {of_these}:"
        else:
            yield f"What {of_these} computes in {target}, in the words of MODEL.NON_LOCAL:"
        yield text
    if target == "nl_detectron":
        places = re.findall(r"\b(res\d)\.non_local(\d+)", " ".join(result.blocks))
        for stage in sorted({stage for stage, _ in places}):
            indices = tuple(sorted(int(i) for other, i in places if other == stage))
            yield f"  AFTER_BLOCKS.{stage.upper()} {indices}"


def _describe(block: Block, target: str) -> Iterator[str]:
    for option in ("pairwise", "reduction", "scale", "subsample", "subsample_position", "norm"):
        if option in block.assumed:
            yield f"  {option.upper()} {block.options[option]}, taken for granted: make sure of it"
        elif block.matters(option):
            value = block.options.get(option, "as in the source: the weights do not tell")
            yield f"  {option.upper()} {value or repr(value)}"
    if target == "nl_detectron" and block.options["dim"] != 2:
        yield f"  the kernels are {block.options['dim']}-D; a detector needs them with --dim 2"
    for change in block.changes:
        yield f"  for the same result, {change}"

"""The report of a conversion, in lines to print."""

from __future__ import annotations

from collections.abc import Iterator

from nl_detectron.weights.blocks import OPTIONS, Block
from nl_detectron.weights.convert import Conversion
from nl_detectron.weights.dialects import DIALECTS
from nl_detectron.weights.names import block_places


def report(result: Conversion, source: str, target: str, verbose: bool) -> Iterator[str]:
    """Yield lines that say what became of every key, and what a config must set."""
    yield f"{len(result.mapped)} tensors converted"
    if verbose:
        yield from (f"  {old} -> {new}" for old, new in result.mapped.items())
    for what, entries in (("left out", result.dropped), ("added", result.added)):
        for reason in dict.fromkeys(entries.values()):
            keys = [key for key, why in entries.items() if why == reason]
            shown = keys if verbose else keys[:4]
            yield f"{len(keys)} {what}: {reason}"
            yield f"  {', '.join(shown)}{', ...' if len(keys) > len(shown) else ''}"
    if result.video:
        yield "The network for video has these settings:"
        yield from (f"  {key} {value or repr(value)}" for key, value in result.video.items())
    if DIALECTS[target].block:
        yield from _describe_blocks(result, target)
    block_sources = {key for block in result.blocks.values() for key in block.sources.values()}
    if set(result.mapped) - block_sources:
        for library in dict.fromkeys((source, target)):
            if text := DIALECTS[library].trained_with(result.video if library == source else ()):
                yield f"{library} trains its ResNets with: {text}."


def _describe_blocks(result: Conversion, target: str) -> Iterator[str]:
    """Yield the values of MODEL.NON_LOCAL for the blocks, identical blocks together."""
    identical: dict[str, list[str]] = {}
    for name, block in result.blocks.items():
        identical.setdefault("\n".join(_describe_block(block, target)), []).append(name)
    for description, names in identical.items():
        blocks = ", ".join(filter(None, names)) or "the block"
        if target == "nl_detectron":
            yield f"Set MODEL.NON_LOCAL for {blocks} to:"
        else:
            yield f"In {target}, this is what MODEL.NON_LOCAL would be for {blocks}:"
        yield description
    if target == "nl_detectron":
        for stage, indices in block_places(result.blocks).items():
            yield f"  AFTER_BLOCKS.{stage.upper()} {tuple(indices)}"


def _describe_block(block: Block, target: str) -> Iterator[str]:
    for option in OPTIONS:
        if option in ("dim", "axes", "group_frames") and block.options["dim"] == 2:
            continue
        if option in block.assumed:
            yield f"  {option.upper()} {block.options[option]} (assumed; please check)"
        elif block.depends_on(option):
            value = block.options.get(option, "as in the source: the weights do not show it")
            yield f"  {option.upper()} {value or repr(value)}"
    if target == "nl_detectron" and block.options["dim"] != 2:
        yield "  for a detector on images, convert with --dim 2"
    for change in block.changes:
        yield f"  to keep the output the same, {change}"

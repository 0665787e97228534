"""Names of parameters between dialects: the tables of :mod:`dialects`, applied."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping

from nl_detectron.weights.dialects import Dialect


def rename(name: str, table: Mapping[str, str]) -> str | None:
    """Look a name up in a table of templates; ``{i}`` stands for a number. ``None`` if unknown."""
    for template, other in table.items():
        match = re.fullmatch(re.escape(template).replace(r"\{i\}", r"(\d+)"), name)
        if match:
            return other.replace("{i}", match[1]) if match.groups() else other
    return None


def inverse(table: Mapping[str, str]) -> dict[str, str]:
    """Return the table from theirs to ours."""
    return {theirs: ours for ours, theirs in table.items()}


def block_names(dialect: Dialect, *, pooled: bool, normed: bool) -> dict[str, str]:
    """Parameter of our block -> theirs, for a block that is subsampled or not, with norm or not."""
    parts = {"pool": ".0" if pooled else "", "norm": ".0" if normed else ""}
    return {ours: theirs.format(**parts) for ours, theirs in dialect.block.items()}


def tell_pooling(dialect: Dialect) -> bool:
    """Whether the names of a block tell that it is subsampled."""
    return any("{pool}" in theirs for theirs in dialect.block.values())


def find_blocks(
    keys: Collection[str], dialect: Dialect
) -> dict[str, tuple[dict[str, str], bool | None]]:
    """Find the blocks of a dialect by their convolutions g and W_z.

    Returns:
        What stands before the parameters of a block -> the names of these as in
        :func:`block_names`, and whether it is subsampled, or ``None`` if names do not tell.
    """
    found: dict[str, tuple[dict[str, str], bool | None]] = {}
    if not dialect.block:
        return found
    for pooled, normed in itertools.product((False, True), repeat=2):
        names = block_names(dialect, pooled=pooled, normed=normed)
        for key in keys:
            prefix = key.removesuffix(names["conv_out.weight"])
            at_joint = prefix == "" or prefix.endswith(dialect.joint)
            if prefix != key and at_joint and prefix + names["g.weight"] in keys:
                found.setdefault(prefix, (names, pooled if tell_pooling(dialect) else None))
    return found


def listed(keys: Collection[str]) -> str:
    """Text for a message: how many keys, and each of them, or of more than 20 their patterns."""
    shown = keys
    if len(keys) > 20:
        shown = dict.fromkeys(re.sub(r"\d+|[^._]+$", "*", key) for key in keys)
    return f"{len(keys)} keys: {', '.join(shown)}"

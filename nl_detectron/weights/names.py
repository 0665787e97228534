"""Applying the key maps of :mod:`dialects`: renaming keys, and finding the keys of blocks."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping

from torch import Tensor

from nl_detectron.weights.dialects import Dialect

# In a detector or a classifier of videos: the prefix of its ResNet, and of the linear layer
_RESNET_PREFIX = re.compile(
    r"^(backbone\.(bottom_up\.)?(?=stem\.|res\d\.|linear\.)|head\.(?=linear\.))"
)
# Parts of keys in TSM; see nl_detectron.weights.networks.
_OPTIONAL = {"{wrap}": ".block", "{shift}": ".net", "{temporal_pool}": ".net"}


def rename(name: str, key_map: Mapping[str, str]) -> str | None:
    """Look up a name in a key map, in which ``{i}`` matches any number; ``None`` if not found."""
    for template, other in key_map.items():
        pattern = re.escape(template).replace(r"\{i\}", r"(\d+)")
        for part, text in _OPTIONAL.items():
            pattern = pattern.replace(re.escape(part), f"(?:{re.escape(text)})?")
        match = re.fullmatch(pattern, name)
        if match:
            return other.replace("{i}", match[1]) if match.groups() else other
    return None


def local_name(name: str) -> str:
    """Remove the prefix that a parameter or block of a ResNet has in a larger model of ours."""
    return _RESNET_PREFIX.sub("", name)


def network_keys(
    names: Collection[str],
    dialect: Dialect,
    blocks: Collection[str] = (),
    temporal_pool: bool = False,
) -> dict[str, str | None]:
    """Return the key of every parameter of a ResNet in a dialect; ``None`` if it has none.

    Args:
        names: of the parameters, in ours.
        dialect: see :attr:`Dialect.backbone`.
        blocks: names of the non-local blocks, in ours.
        temporal_pool: of TSM.
    """
    every = shift_every(names)
    keys = {}
    for name in names:
        key = rename(name, dialect.backbone or {})
        residual = re.match(r"(res\d)\.(\d+)\.", name)
        if key and residual:
            stage, index = residual.groups()
            has = {"{wrap}": f"{stage}.non_local{index}" in blocks}
            has["{shift}"] = int(index) % every == 0
            has["{temporal_pool}"] = temporal_pool
            for part, text in _OPTIONAL.items():
                key = key.replace(part, text * has[part])
        keys[name] = key
    return keys


def shift_every(names: Collection[str]) -> int:
    """Return ``MODEL.VIDEO.SHIFT.EVERY`` of TSM's ResNet, by our names of its parameters."""
    return 2 if "res4.22.conv1.weight" in names else 1


def block_places(names: Collection[str]) -> dict[str, list[int]]:
    """Return stage -> residual blocks that have a non-local block, by the names of the latter."""
    found = re.findall(r"\b(res\d)\.non_local(\d+)", " ".join(names))
    return {
        stage: sorted(int(index) for other, index in found if other == stage)
        for stage in sorted({stage for stage, _ in found})
    }


def inverse(key_map: Mapping[str, str]) -> dict[str, str]:
    """Return the key map from theirs to ours."""
    return {theirs: ours for ours, theirs in key_map.items()}


def block_keys(dialect: Dialect, *, subsampled: bool, has_norm: bool) -> dict[str, str]:
    """Return the key map of a block, our parameter -> theirs."""
    parts = {"pool": ".0" if subsampled else "", "norm": ".0" if has_norm else ""}
    return {ours: theirs.format(**parts) for ours, theirs in dialect.block.items()}


def find_block_keys(
    keys: Collection[str], dialect: Dialect
) -> dict[str, tuple[dict[str, str], bool | None]]:
    """Find the non-local blocks in a state dict by their convolutions g and W_z.

    Returns:
        Prefix of the block's keys -> the key map of :func:`block_keys`, and whether the block is
        subsampled, or ``None`` if names do not show it.
    """
    found: dict[str, tuple[dict[str, str], bool | None]] = {}
    if not dialect.block:
        return found
    for subsampled, has_norm in itertools.product((False, True), repeat=2):
        key_map = block_keys(dialect, subsampled=subsampled, has_norm=has_norm)
        known = subsampled if dialect.names_show_subsampling else None
        for key in keys:
            prefix = key.removesuffix(key_map["conv_out.weight"])
            is_block = prefix != key and prefix + key_map["g.weight"] in keys
            if is_block and (not prefix or prefix.endswith(dialect.separator)):
                found.setdefault(prefix, (key_map, known))
    return found


def check_tensors(what: str, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Check that tensors fit a network; counters of batches may differ.

    Args:
        what: of the tensors, for messages.
        tensors: by their names in the network.
        own: state dict of the network.

    Raises:
        ValueError: tensors that are missing, superfluous, or of another shape.
    """
    counters = {name for name in own.keys() | tensors if name.endswith("num_batches_tracked")}
    problems = {
        "lacks": own.keys() - tensors - counters,
        "has no place in this network for": tensors.keys() - own - counters,
        "has in another shape": {
            name for name in own.keys() & tensors if own[name].shape != tensors[name].shape
        },
    }
    for problem, names in problems.items():
        if names:
            raise ValueError(f"{what} {problem} {summarize_keys(sorted(names))}")


def summarize_keys(keys: Collection[str]) -> str:
    """Text for a message: the number of keys and their names, or patterns if more than 20."""
    shown = keys
    if len(keys) > 20:
        shown = dict.fromkeys(re.sub(r"\d+|[^._]+$", "*", key) for key in keys)
    return f"{len(keys)} key{'s' * (len(keys) != 1)}: {', '.join(shown)}"

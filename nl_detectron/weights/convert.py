"""Conversion of checkpoints from one dialect to another, in which every key is accounted for.

Everything passes through our names: a block is read from one dialect, changed into one that the
other dialect supports and that computes the same, and written. If there is none, an error says why.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nl_detectron.weights.blocks import EPS, Block
from nl_detectron.weights.dialects import DIALECTS, TEMPORAL_POOL, Dialect
from nl_detectron.weights.files import to_tensor
from nl_detectron.weights.names import (
    block_keys,
    find_block_keys,
    inverse,
    local_name,
    network_keys,
    rename,
    summarize_keys,
)
from nl_detectron.weights.video import (
    BLOCKS_ALONE,
    classifier_name,
    find_pooling,
    is_video,
    video_keys,
)

# In a detector: its parts outside of the ResNet
_NOT_RESNET = re.compile(
    r"backbone\.(fpn_|top_block)|proposal_generator|roi_heads|sem_seg_head|head\.|pixel_"
)
_NOT_A_BLOCK = "not part of a non-local block; only blocks are converted"
_NO_COUNTER = "the target has no such counter"


@dataclass
class Conversion:
    """Converted weights, and what became of every key.

    Attributes:
        state: the converted tensors by name.
        mapped: key of the source -> key of the result.
        dropped: key of the source that is left out -> reason.
        added: key of the result without counterpart in the source -> what it is.
        blocks: the non-local blocks, by their names in ours.
        video: config keys that describe the network, if it is one for video -> value.
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    mapped: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)
    blocks: dict[str, Block] = field(default_factory=dict)
    video: dict[str, Any] = field(default_factory=dict)

    def add_tensor(self, key: str, tensor: Tensor, source: str | None, note: str = "") -> None:
        """Add a tensor that comes from a key of the source, or that ``note`` describes."""
        if key in self.state:
            raise ValueError(f"two keys would both become {key!r}, one of them {source!r}")
        self.state[key] = tensor
        if source is None:
            self.added[key] = note
        else:
            self.mapped[source] = key


class _Entry(NamedTuple):
    tensor: Tensor
    source: str | None  # its key in the source


_Entries = dict[str, _Entry]


def convert(
    state: Mapping[str, Any],
    source: str,
    target: str,
    options: Callable[[str], Mapping[str, Any]] = lambda block: {},
    dim: int | None = None,
    blocks_only: bool = False,
    pooling: str | None = None,
) -> Conversion:
    """Convert the weights of a network, or of a single block, from one dialect to another.

    Args:
        state: name -> tensor, or array of numbers.
        source: one of :data:`nl_detectron.weights.DIALECTS`.
        target: another one.
        options: returns, for the name of a block in ours, those arguments of its
            :class:`~nl_detectron.NonLocalBlock` that are known. They supply what weights do not
            show, and ask for changes: ``norm=""`` folds batch norm into the output convolution,
            and a different ``scale`` is folded into theta.
        dim: number of axes of the convolutions in the result, 2 for images and 3 for video, where
            the target supports both; default: unchanged.
        blocks_only: leave out everything but the non-local blocks.
        pooling: ``MODEL.VIDEO.POOLING`` of a network for video, where the weights do not show it.

    Raises:
        ValueError: an unknown dialect, keys that the dialect does not have, a network for video
            without its classifier or with another ``pooling``, or a block that does not exist in
            the target or contradicts ``options``. The message names keys and block.
    """
    for name in (source, target):
        if name not in DIALECTS:
            raise ValueError(f"dialect must be one of {tuple(DIALECTS)}, got {name!r}")
    source_dialect, target_dialect = DIALECTS[source], DIALECTS[target]
    dim = target_dialect.fixed.get("dim", dim)
    result = Conversion()
    entries = _read_tensors(state, source_dialect, result)
    _read_blocks(entries, source_dialect, result)
    if blocks_only or source_dialect.blocks_only or target_dialect.blocks_only:
        result.dropped |= {str(entry.source): _NOT_A_BLOCK for entry in entries.values()}
        entries = {}
    temporal_pool = any(".layer2.net." in key for key in entries)
    network = _read_network(entries, source_dialect, result, temporal_pool)
    if dim is not None:
        network = _reshape(network, dim)
    if source_dialect.backbone or target_dialect.backbone:
        tensors = {local_name(name): entry.tensor for name, entry in network.items()}
        if is_video(tensors):
            pooling = find_pooling(source_dialect, target_dialect, temporal_pool, pooling)
            if pooling == TEMPORAL_POOL and result.blocks:
                raise ValueError("TSM with temporal pooling has no non-local blocks")
            constant = any(entry.source is None for entry in network.values())
            result.video = video_keys(tensors, source_dialect, pooling, constant)
    if result.video and target_dialect.backbone is None:
        network = {classifier_name(name): entry for name, entry in network.items()}
        result.blocks = {classifier_name(name): block for name, block in result.blocks.items()}
    for name, block in result.blocks.items():
        if target_dialect.block:
            with _name_block_in_errors(name):
                block.apply_options({**options(name), **({} if dim is None else {"dim": dim})})
                block.convert_to(target_dialect)
        _write_block(name, block, target_dialect, result)
    _write_network(network, target_dialect, result, pooling == TEMPORAL_POOL)
    if not result.state:
        raise ValueError(
            f"nothing to convert from {source!r} to {target!r} in {summarize_keys(state)}; "
            "are the dialects right?"
        )
    return result


def _read_tensors(state: Mapping[str, Any], dialect: Dialect, result: Conversion) -> _Entries:
    in_parallel = all(key.startswith("module.") for key in state)  # DataParallel's prefix
    entries = {}
    for source, value in state.items():
        key = source.removeprefix("module.") if in_parallel else source
        tensor = to_tensor(value)
        reasons = [why for pattern, why in dialect.ignored.items() if re.fullmatch(pattern, key)]
        if tensor is None or reasons:
            result.dropped[source] = reasons[0] if reasons else "not a tensor"
        else:
            entries[key] = _Entry(tensor, source)
    return entries


def _read_blocks(entries: _Entries, dialect: Dialect, result: Conversion) -> None:
    """Move the blocks from the entries to the result."""
    to_ours = inverse(dialect.block_names)
    for prefix, (key_map, subsampled) in find_block_keys(entries, dialect).items():
        name = prefix.removesuffix(dialect.separator)
        found = {
            ours: entries.pop(prefix + theirs)
            for ours, theirs in key_map.items()
            if prefix + theirs in entries
        }
        block = Block({ours: entry.tensor for ours, entry in found.items()})
        block.sources = {ours: str(entry.source) for ours, entry in found.items()}
        with _name_block_in_errors(name):
            unexpected = [key for key in entries if key.startswith(prefix)]
            if unexpected:
                raise ValueError(f"unexpected parameters, {summarize_keys(unexpected)}")
            block.infer_options(dialect, subsampled)
            block.convert_from(dialect)
        result.blocks[rename(name, to_ours) or name] = block


def _read_network(
    entries: _Entries, dialect: Dialect, result: Conversion, temporal_pool: bool
) -> _Entries:
    """Return the entries outside of blocks by our names."""
    if dialect.backbone is None:
        return entries
    to_ours = inverse(dialect.backbone)
    ours = {key: rename(key, to_ours) for key in entries}
    network = {name: entries[key] for key, name in ours.items() if name is not None}
    theirs = network_keys(network, dialect, result.blocks, temporal_pool)
    unknown = [key for key, name in ours.items() if name is None or theirs[name] != key]
    if network:  # detectron2's ResNets have blocks after residual blocks only
        unknown += [name for name in result.blocks if not rename(name, dialect.block_names)]
    if dialect.backbone_of_images:
        unknown += [key for key, entry in entries.items() if entry.tensor.dim() == 5]
    if unknown:
        raise ValueError(
            f"not in this dialect, or not in detectron2's ResNets: {summarize_keys(unknown)}"
            + (f"; {BLOCKS_ALONE}" if result.blocks else "")
        )
    if dialect.affine_norm:
        _add_running_statistics(network)
    return _reshape(network, 3) if dialect.backbone_of_images else network


def _add_running_statistics(network: _Entries) -> None:
    """Give norms of scale and bias alone the running statistics that change nothing."""
    for key in [key for key in network if key.endswith("norm.weight")]:
        mean, var = (key.replace("weight", f"running_{name}") for name in ("mean", "var"))
        if mean not in network and var not in network:
            ones = torch.ones_like(network[key].tensor)
            network |= {mean: _Entry(0 * ones, None), var: _Entry(ones - EPS, None)}


def _reshape(network: _Entries, dim: int) -> _Entries:
    """Make 3-D convolutions over a single frame 2-D, or 2-D convolutions 3-D."""
    reshaped, failed = {}, []
    for name, (tensor, source) in network.items():
        if dim == 2 and tensor.dim() == 5 and tensor.shape[2] == 1:
            tensor = tensor.squeeze(2)
        elif dim == 3 and tensor.dim() == 4:
            tensor = tensor.unsqueeze(2)
        if tensor.dim() not in (0, 1, 2, dim + 2):
            failed.append(f"{name} {tuple(tensor.shape)}")
        reshaped[name] = _Entry(tensor, source)
    if failed:
        raise ValueError(f"convolutions that cannot be {dim}-D: {summarize_keys(failed)}")
    return reshaped


def _write_block(name: str, block: Block, dialect: Dialect, result: Conversion) -> None:
    if dialect.backbone is not None:
        name = local_name(name)
        name = rename(name, dialect.block_names) or name
    prefix = dialect.prefix + name + dialect.separator if name else ""
    key_map = block_keys(
        dialect,
        subsampled=block.options.get("subsample") == 2,
        has_norm=bool(block.options["norm"]),
    )
    for ours, tensor in block.tensors.items():
        if ours in key_map:
            key, source = prefix + key_map[ours], block.sources.get(ours)
            result.add_tensor(key, tensor, source, block.added.get(ours, ""))
        else:
            block.dropped[ours] = _NO_COUNTER if key_map else "the target has no non-local blocks"
    for ours, reason in block.dropped.items():
        if ours in block.sources:
            result.dropped[block.sources[ours]] = reason


def _write_network(
    network: _Entries, dialect: Dialect, result: Conversion, temporal_pool: bool
) -> None:
    if dialect.backbone_of_images:
        network = _reshape(network, 2)
    keys: Mapping[str, str | None] = {name: name for name in network}
    if dialect.backbone is not None:
        local = {name: local_name(name) for name in network}
        blocks = {local_name(name) for name in result.blocks}
        theirs = network_keys(set(local.values()), dialect, blocks, temporal_pool)
        keys = {name: theirs[local[name]] for name in network}
    unknown = []
    for name, (tensor, source) in network.items():
        key = keys[name]
        if key is not None:
            note = "the source has only scale and bias"
            result.add_tensor(dialect.prefix + key, tensor, source, note)
        elif source is None:
            continue
        elif _NOT_RESNET.match(name):
            result.dropped[source] = "part of the detector outside of its ResNet"
        elif name.endswith("num_batches_tracked"):
            result.dropped[source] = _NO_COUNTER
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"the target has no counterpart for {summarize_keys(unknown)}")


@contextmanager
def _name_block_in_errors(block: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"non-local block {block!r}: {error}") from None

"""Conversion of checkpoints from one dialect to another, with an account of every key.

All goes through our names: a block is read from one dialect, changed into what the other can
compute without changing its function, and written. What cannot be the same function is refused.
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
from nl_detectron.weights.dialects import DIALECTS, Dialect
from nl_detectron.weights.files import to_tensor
from nl_detectron.weights.names import block_names, find_blocks, inverse, listed, rename

# What stands before the names of a ResNet in a detector, and the parts of a detector beside it
_BACKBONE = re.compile(r"^backbone\.(bottom_up\.)?(?=stem\.|res\d\.|linear\.)")
_BESIDE = re.compile(
    r"backbone\.(fpn_|top_block)|proposal_generator|roi_heads|sem_seg_head|head\.|pixel_"
)


@dataclass
class Conversion:
    """Converted weights, and an account of every key.

    Attributes:
        state: the tensors, by their new names.
        mapped: name in the source -> name in the result.
        dropped: name in the source -> why it is left out.
        added: name in the result, without counterpart in the source -> what it is.
        blocks: the blocks, by their names in ours.
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    mapped: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)
    blocks: dict[str, Block] = field(default_factory=dict)

    def put(self, key: str, tensor: Tensor, source: str | None, added: str = "") -> None:
        """Add a tensor: from ``source``, or ``added`` says what it is."""
        if key in self.state:
            raise ValueError(f"two keys would become {key!r}, one of them {source!r}")
        self.state[key] = tensor
        if source is None:
            self.added[key] = added
        else:
            self.mapped[source] = key


class _Entry(NamedTuple):
    tensor: Tensor
    source: str | None  # its name in the source


_Trunk = dict[str, _Entry]  # what is not of a block, by our names


def convert(
    state: Mapping[str, Any],
    source: str,
    target: str,
    options: Callable[[str], Mapping[str, Any]] = lambda block: {},
    dim: int | None = None,
) -> Conversion:
    """Convert the weights of a network, or of a single block, from one dialect to another.

    Args:
        state: name -> tensor, or array of numbers.
        source: one of :data:`nl_detectron.weights.DIALECTS`.
        target: another one.
        options: gives, for the name of a block in ours, arguments of its
            :class:`~nl_detectron.NonLocalBlock`, as many as are known. They tell what weights do
            not, and ask for changes: ``norm=""`` folds batch norm into the output convolution,
            ``scale`` is moved into or out of theta.
        dim: axes of the convolutions in the result, 2 for images and 3 for video, where the target
            leaves a choice; default: as they are.

    Raises:
        ValueError: an unknown dialect, keys that the dialect does not have, or a block that the
            target or ``options`` cannot have. Keys and block are named.
    """
    for name in (source, target):
        if name not in DIALECTS:
            raise ValueError(f"dialect must be one of {tuple(DIALECTS)}, got {name!r}")
    theirs, wanted = DIALECTS[source], DIALECTS[target]
    dim = wanted.fixed.get("dim", dim)
    result = Conversion()
    entries = _tensors(state, theirs, result)
    _read_blocks(entries, theirs, result)
    trunk = _read_trunk(entries, theirs, result)
    for name, block in result.blocks.items():
        if wanted.block:
            with _naming(name):
                block.adapt({**options(name), **({} if dim is None else {"dim": dim})})
                block.prepare(wanted)
        _write_block(name, block, wanted, result)
    _write_trunk(trunk if dim is None else _reshaped(trunk, dim), wanted, result)
    if not result.state:
        raise ValueError(
            f"{source!r} to {target!r}: is the dialect right? Nothing is left of {listed(state)}"
        )
    return result


def _tensors(state: Mapping[str, Any], dialect: Dialect, result: Conversion) -> dict[str, _Entry]:
    in_parallel = all(key.startswith("module.") for key in state)  # DataParallel's prefix
    entries = {}
    for source, value in state.items():
        key = source.removeprefix("module.") if in_parallel else source
        tensor = to_tensor(value)
        reasons = [why for what, why in dialect.dropped.items() if re.fullmatch(what, key)]
        if tensor is None or reasons:
            result.dropped[source] = reasons[0] if reasons else "not a tensor"
        else:
            entries[key] = _Entry(tensor, source)
    return entries


def _read_blocks(entries: dict[str, _Entry], dialect: Dialect, result: Conversion) -> None:
    """Take the blocks out of the entries."""
    to_ours = inverse(dialect.places)
    for prefix, (names, pooled) in find_blocks(entries, dialect).items():
        place = prefix.removesuffix(dialect.joint)
        found = {
            ours: entries.pop(prefix + theirs)
            for ours, theirs in names.items()
            if prefix + theirs in entries
        }
        block = Block({ours: entry.tensor for ours, entry in found.items()})
        block.sources = {ours: str(entry.source) for ours, entry in found.items()}
        with _naming(place):
            unknown = [key for key in entries if key.startswith(prefix)]
            if unknown:
                raise ValueError(f"no such block has {listed(unknown)}")
            block.understand(dialect, pooled)
        result.blocks[rename(place, to_ours) or place] = block


def _read_trunk(entries: dict[str, _Entry], dialect: Dialect, result: Conversion) -> _Trunk:
    if dialect.trunk is None:
        return entries
    to_ours = inverse(dialect.trunk)
    trunk, unknown = {}, []
    for key, entry in entries.items():
        ours = rename(key, to_ours)
        if ours is not None:
            trunk[ours] = entry
        elif dialect.rest:
            result.dropped[str(entry.source)] = dialect.rest
        else:
            unknown.append(key)
    misplaced = [name for name in result.blocks if trunk and not rename(name, dialect.places)]
    if unknown or misplaced:
        keys = listed(unknown + misplaced)
        raise ValueError(f"not of this dialect, or lacking in ResNets of detectron2: {keys}")
    if dialect.affine_norm:
        _complete_norms(trunk)
    return trunk


def _complete_norms(trunk: _Trunk) -> None:
    """Give norms that are scale and bias alone the statistics with which they are just that."""
    for key in [key for key in trunk if key.endswith("norm.weight")]:
        mean, var = (key.replace("weight", f"running_{name}") for name in ("mean", "var"))
        if mean not in trunk:
            ones = torch.ones_like(trunk[key].tensor)
            trunk |= {mean: _Entry(0 * ones, None), var: _Entry(ones - EPS, None)}


def _reshaped(trunk: _Trunk, dim: int) -> _Trunk:
    """Make 3-D convolutions of one frame 2-D, or the other way round."""

    def reshape(kernel: Tensor) -> Tensor | None:
        if dim == 2 and kernel.dim() == 5 and kernel.shape[2] == 1:
            return kernel.squeeze(2)
        if dim == 3 and kernel.dim() == 4:
            return kernel.unsqueeze(2)
        return kernel if kernel.dim() in (0, 1, 2, dim + 2) else None

    reshaped = {name: reshape(entry.tensor) for name, entry in trunk.items()}
    bad = [
        f"{n} {tuple(trunk[n].tensor.shape)}" for n, kernel in reshaped.items() if kernel is None
    ]
    if bad:
        raise ValueError(f"convolutions that cannot be {dim}-D: {listed(bad)}")
    return {
        n: _Entry(tensor, trunk[n].source) for n, tensor in reshaped.items() if tensor is not None
    }


def _write_block(name: str, block: Block, dialect: Dialect, result: Conversion) -> None:
    place = name
    if dialect.trunk is not None:
        place = _BACKBONE.sub("", name)
        place = rename(place, dialect.places) or place
    names = block_names(
        dialect,
        pooled=block.options.get("subsample") == 2,
        normed=bool(block.options["norm"]),
    )
    why = "the target has no such counter" if names else "of a block, which the target lacks"
    for ours, tensor in block.tensors.items():
        if ours in names:
            key = place + dialect.joint + names[ours] if place else names[ours]
            result.put(key, tensor, block.sources.get(ours), block.added.get(ours, ""))
        else:
            block.dropped[ours] = why
    result.dropped |= {block.sources[o]: w for o, w in block.dropped.items() if o in block.sources}


def _write_trunk(trunk: _Trunk, dialect: Dialect, result: Conversion) -> None:
    unknown = []
    for name, (tensor, source) in trunk.items():
        key: str | None = name
        if dialect.trunk is not None:
            key = rename(_BACKBONE.sub("", name), dialect.trunk)
        if key is not None:
            result.put(key, tensor, source, "makes a norm of a mere scale and bias")
        elif source is None:
            continue
        elif dialect.rest:
            result.dropped[source] = dialect.rest
        elif _BESIDE.match(name):
            result.dropped[source] = "a part of the detector beside its ResNet"
        elif name.endswith("num_batches_tracked"):
            result.dropped[source] = "the target has no such counter"
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"the target has nothing for {listed(unknown)}")


@contextmanager
def _naming(block: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"non-local block {block!r}: {error}") from None

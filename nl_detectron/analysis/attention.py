"""Attention maps out of a running model.

    with record_attention(model, "res4.non_local4") as recordings:
        model(inputs)
    recording = recordings["backbone.bottom_up.res4.non_local4"]
    recording.attention((12, 30))  # of the query in row 12, column 30, over all keys

Shapes: N samples (images, clips or RoIs), C channels, T H W axes of a map, K keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from detectron2.layers import CNNBlockBase
from torch import Tensor, nn

from nl_detectron.analysis.geometry import AttentionMap, CellGrid
from nl_detectron.non_local import NonLocalBlock, find_blocks


@contextmanager
def record_attention(model: nn.Module, *patterns: str) -> Iterator[dict[str, Recording]]:
    """Record the attention of non-local blocks while the model runs as usual.

    What is kept is a copy of each block's input, N x C floats per position, not the attention
    matrix, which can be gigabytes: the rows that are asked for are computed when they are. So it
    does not matter by which way a block computes its output, and the output does not change.

    Args:
        model: any model with non-local blocks, in training or not.
        patterns: as in :func:`nl_detectron.non_local.find_blocks`; without one, all blocks.

    Yields:
        Full name of a block to its :class:`Recording`, which outlives the context.

    Raises:
        ValueError: a pattern that no block matches.
    """
    blocks = find_blocks(model, *(patterns or "*"))
    recordings = {name: Recording(name, block) for name, block in blocks.items()}
    with ExitStack() as hooks:
        for recording in recordings.values():
            hooks.enter_context(recording.block.register_forward_pre_hook(recording.add_call))
        yield recordings


@dataclass(frozen=True)
class Recording:
    """The inputs that a block has seen, one per call, and its attention on them.

    Attributes:
        name: full name of the block.
        block: the block. Attention is computed with the parameters that it has by then.
        inputs: maps (N, C, *size), in the order of the calls.
    """

    name: str
    block: NonLocalBlock
    inputs: list[Tensor] = field(default_factory=list)

    def add_call(self, block: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Keep the input of one call; this is the hook."""
        # A copy: later layers may write into the tensor.
        self.inputs.append(args[0].detach().clone())

    @property
    def last_input(self) -> Tensor:
        """The map of the last call, (N, C, *size).

        Raises:
            RuntimeError: there was none.
        """
        if not self.inputs:
            raise RuntimeError(
                f"{self.name} was not called while it was recorded (a model that torch.compile has "
                "compiled before then runs without hooks: record the one it was compiled from)"
            )
        return self.inputs[-1]

    @torch.no_grad()
    def attention(self, query: Sequence[int], sample: int = 0) -> Tensor:
        """Attention of one query over all keys, in the last call.

        Args:
            query: cell of the map, ([T,] row, column); (column,) for a 1-D block.
            sample: index into N.

        Returns:
            Map of the keys, ([T,] H, W), float32 or float64, on the CPU. It is 0 where the block
            does not look: outside the query's frame with ``axes="space"``, outside its place with
            "time".

        Raises:
            RuntimeError: the block was not called.
            ValueError: ``query`` or ``sample`` outside the map.
        """
        x = self.last_input
        size = tuple(x.shape[2:])
        if len(query) != len(size) or not all(0 <= q < s for q, s in zip(query, size)):
            raise ValueError(f"{self.name}: query {tuple(query)} is outside its map of size {size}")
        if not 0 <= sample < len(x):
            raise ValueError(f"{self.name}: sample {sample} of a batch of {len(x)}")
        # The part of the map that the query looks at, and the query's place in it.
        seen = [slice(None)] * len(size)
        own_axes = {"spacetime": [], "space": [0], "time": [1, 2]}[self.block.axes]
        for axis in own_axes:
            seen[axis] = slice(query[axis], query[axis] + 1)
        part = x[(slice(sample, sample + 1), slice(None), *seen)]
        place = [0 if axis in own_axes else q for axis, q in enumerate(query)]
        position = int(np.ravel_multi_index(place, part.shape[2:]))
        row = self.block.attention(part, torch.tensor([position], device=x.device)).flatten().cpu()

        weights = row.new_zeros([s // w for s, w in zip(size, self.block.pool_window(size))])
        weights[tuple(seen)] = row.view_as(weights[tuple(seen)])
        return weights


def attention_map(
    recording: Recording,
    grid: CellGrid,
    image_size: Sequence[int],
    x: float,
    y: float,
    *,
    frame: int = 0,
    sample: int = 0,
) -> AttentionMap:
    """Attention of a point of the original image, mapped back into it.

    Args:
        recording: of a 2-D or 3-D block.
        grid: of the block's map, before the keys are pooled.
        image_size: H, W of the original image.
        x: coordinate of the point, see :mod:`nl_detectron.analysis.geometry`.
        y: likewise.
        frame: of a clip, from 0.
        sample: index into N.

    Raises:
        RuntimeError: the block was not called.
        ValueError: the point is outside the block's map, or there is no such sample.
    """
    size = recording.last_input.shape[2:]
    cell = grid.cell(x, y, frame)
    weights = recording.attention(cell[-len(size) :], sample).numpy()
    weights = weights.reshape(-1, *weights.shape[-2:])
    window = recording.block.pool_window(size)[-2:]
    height, width = image_size
    boxes = grid.coarsened(window).boxes(*weights.shape[1:])
    return AttentionMap(weights, boxes.clip(0, [width, height] * 2), (x, y, cell[0]))


def stride_of(backbone: nn.Module, block: nn.Module) -> int:
    """Stride of a block's map with regard to the input of the detectron2 backbone it is in.

    Raises:
        ValueError: the block is not in the backbone.
    """
    stride = 1
    for module in backbone.modules():
        if module is block:
            return stride
        if isinstance(module, CNNBlockBase):
            stride *= module.stride
    raise ValueError("the block is not in this backbone")

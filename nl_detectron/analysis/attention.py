"""Record the attention maps of a running model.

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
from torch import Tensor, nn

from nl_detectron.analysis.geometry import AttentionMap, FeatureGrid
from nl_detectron.non_local import NonLocalBlock, find_blocks


@contextmanager
def record_attention(model: nn.Module, *patterns: str) -> Iterator[dict[str, Recording]]:
    """Record the attention of non-local blocks while the model runs as usual.

    Only a copy of each block's input is kept, N x C floats per position. The attention matrix can
    take gigabytes, so its rows are computed on demand. The recording therefore works with every
    path, and the model's output does not change.

    Args:
        model: any model with non-local blocks, in training or evaluation mode.
        patterns: see :func:`nl_detectron.non_local.find_blocks`; default: all blocks.

    Yields:
        A dict from the full name of each block to its :class:`Recording`, which stays valid after
        the context is left.

    Raises:
        ValueError: a pattern matches no block.
    """
    blocks = find_blocks(model, *(patterns or "*"))
    recordings = {name: Recording(name, block) for name, block in blocks.items()}
    with ExitStack() as hooks:
        for recording in recordings.values():
            hooks.enter_context(recording.block.register_forward_pre_hook(recording.record_input))
        yield recordings


@dataclass(frozen=True)
class Recording:
    """The inputs of a block, one per call, and the attention computed from them.

    Attributes:
        name: full name of the block.
        block: the block. Attention is computed with its parameters at the time of the query.
        inputs: maps (N, C, *size), in call order.
        sizes: for each input, the rows and columns of its maps that are not padding, (N, 2), or
            ``None`` where padding is not masked.
    """

    name: str
    block: NonLocalBlock
    inputs: list[Tensor] = field(default_factory=list)
    sizes: list[Tensor | None] = field(default_factory=list)

    def record_input(self, block: NonLocalBlock, args: tuple[Tensor, ...]) -> None:
        """Store the input of one call (a forward pre-hook)."""
        # Clone, because later layers may modify the tensor in place.
        self.inputs.append(args[0].detach().clone())
        self.sizes.append(block.sizes_in_map())

    @property
    def last_input(self) -> Tensor:
        """The map of the last call, (N, C, *size).

        Raises:
            RuntimeError: the block was not called.
        """
        if not self.inputs:
            raise RuntimeError(
                f"{self.name} was not called while recording (a model compiled beforehand with "
                "torch.compile skips hooks: record the original model instead)"
            )
        return self.inputs[-1]

    @torch.no_grad()
    def attention(self, query: Sequence[int], sample: int = 0) -> Tensor:
        """Compute the attention of one query over all keys, in the last call.

        Args:
            query: cell of the map, ([T,] row, column); (column,) for a 1-D block.
            sample: index into N.

        Returns:
            Map of the keys, ([T,] H, W), float32 or float64, on the CPU. It is 0 for keys that the
            query does not attend to: other frames with ``axes="space"``, other positions with
            "time", padding where it is masked.

        Raises:
            RuntimeError: the block was not called.
            ValueError: ``query`` or ``sample`` is outside the map.
        """
        x = self.last_input
        size = tuple(x.shape[2:])
        if len(query) != len(size) or not all(0 <= q < s for q, s in zip(query, size)):
            raise ValueError(f"{self.name}: query {tuple(query)} is outside the map of size {size}")
        if not 0 <= sample < len(x):
            raise ValueError(f"{self.name}: sample must be from 0 to {len(x) - 1}, got {sample}")
        # The part of the map that the query attends to, and the query's position in it.
        part_size = self.block.part_size(size)
        position = [q % n for q, n in zip(query, part_size)]
        attended = [slice(q - p, q - p + n) for q, p, n in zip(query, position, part_size)]
        part = x[(slice(sample, sample + 1), slice(None), *attended)]
        index = int(np.ravel_multi_index(position, part.shape[2:]))
        sizes = self.sizes[-1]
        sizes = None if sizes is None else sizes[sample : sample + 1]
        row = self.block.attention(part, torch.tensor([index], device=x.device), sizes)
        row = row.flatten().cpu()

        weights = row.new_zeros([s // w for s, w in zip(size, self.block.pool_window(size))])
        weights[tuple(attended)] = row.view_as(weights[tuple(attended)])
        return weights


def attention_map(
    recording: Recording,
    grid: FeatureGrid,
    image_size: Sequence[int],
    x: float,
    y: float,
    *,
    frame: int = 0,
    sample: int = 0,
) -> AttentionMap:
    """Map the attention of a point in the original image back onto that image.

    Args:
        recording: of a 2-D or 3-D block.
        grid: of the block's input, before the keys are pooled.
        image_size: H, W of the original image.
        x: x coordinate of the point, see :mod:`nl_detectron.analysis.geometry`.
        y: y coordinate of the point.
        frame: 0-based frame of a clip.
        sample: index into N.

    Raises:
        RuntimeError: the block was not called.
        ValueError: the point or the sample is outside the block's map.
    """
    size = recording.last_input.shape[2:]
    # Poolings may leave out the last pixels and frames: they count as the last cell's.
    cell = [c - (c == s) for c, s in zip(grid.cell(x, y, frame)[-len(size) :], size)]
    weights = recording.attention(cell, sample).numpy()
    weights = weights.reshape(-1, *weights.shape[-2:])
    window = recording.block.pool_window(size)[-2:]
    height, width = image_size
    boxes = grid.pooled(window).boxes(*weights.shape[1:])
    return AttentionMap(
        weights, boxes.clip(0, [width, height] * 2), (x, y, cell[0] if cell[2:] else 0)
    )

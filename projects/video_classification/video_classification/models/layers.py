"""Layers of video networks: convolution with norm, stem, and residual block.

Modules and weights have the names of detectron2's ``ResNet``.

Shapes: N batch, C channels, T H W axes of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from detectron2.layers import CNNBlockBase, get_norm
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn

from nl_detectron.norm import FlatBatchNorm2d, apply_norm, fold_norm

from .tsm import TemporalShift

NORMS = ("", "BN", "SyncBN", "GN", "FrozenBN")


class Pool(NamedTuple):
    """A max-pooling over time, height and width."""

    kernel_size: tuple[int, int, int]
    stride: tuple[int, int, int]
    padding: tuple[int, int, int]


class Conv3d(nn.Conv3d):
    """A convolution without bias, padded to keep the size, its norm, and ReLU if wanted."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        stride: Sequence[int] = (1, 1, 1),
        groups: int = 1,
        norm: str = "BN",
        relu: bool = False,
    ):
        """Create the convolution.

        Raises:
            ValueError: an unknown ``norm``.
        """
        padding = tuple(k // 2 for k in kernel_size)
        super().__init__(
            in_channels,
            out_channels,
            tuple(kernel_size),
            tuple(stride),
            padding,
            groups=groups,
            bias=False,
        )
        if norm not in NORMS:
            raise ValueError(
                f"norm (config key MODEL.RESNETS.NORM) must be one of {NORMS}, got {norm!r}"
            )
        self.relu = relu
        self.norm = get_norm(FlatBatchNorm2d if norm == "BN" else norm, out_channels)
        c2_msra_fill(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map -> map; a constant norm is folded into the convolution."""
        folded = None if self.norm is None else fold_norm(self, self.norm)
        out = self._conv_forward(x, *(folded or (self.weight, None)))
        if self.norm is not None and folded is None:
            return apply_norm(out, self.norm, self.relu)
        return F.relu_(out) if self.relu else out


class Bottleneck3d(CNNBlockBase):
    """A residual block of three convolutions, with an optional temporal shift before them."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck_channels: int,
        kernels: Sequence[Sequence[int]] = ((1, 1, 1), (1, 3, 3)),
        stride: int = 1,
        num_groups: int = 1,
        norm: str = "BN",
        stride_in_1x1: bool = False,
        zero_init: bool = False,
        shift: dict[str, Any] | None = None,
    ):
        """Create the block.

        Args:
            in_channels: C of the input.
            out_channels: C of the output.
            bottleneck_channels: C of the middle convolution.
            kernels: of the first two convolutions.
            stride: in space.
            num_groups: of the middle convolution.
            norm: after each convolution, one of :data:`NORMS`.
            stride_in_1x1: stride in the first convolution instead of the middle one.
            zero_init: start the scale of the last norm at zero, unless it is a constant.
            shift: arguments of :class:`TemporalShift` besides ``in_channels``.
        """
        super().__init__(in_channels, out_channels, stride)
        strides = [(1, stride, stride), (1, 1, 1)]
        first, middle = strides if stride_in_1x1 else strides[::-1]
        width = bottleneck_channels
        self.shortcut = None
        if in_channels != out_channels:
            self.shortcut = Conv3d(in_channels, out_channels, (1, 1, 1), strides[0], norm=norm)
        self.shift = TemporalShift(in_channels, **shift) if shift else nn.Identity()
        self.conv1 = Conv3d(in_channels, width, kernels[0], first, norm=norm, relu=True)
        self.conv2 = Conv3d(width, width, kernels[1], middle, num_groups, norm, relu=True)
        self.conv3 = Conv3d(width, out_channels, (1, 1, 1), norm=norm)
        if zero_init and isinstance(getattr(self.conv3.norm, "weight", None), nn.Parameter):
            nn.init.zeros_(self.conv3.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, T, H, W) -> map."""
        out = self.conv3(self.conv2(self.conv1(self.shift(x))))
        out = out + (x if self.shortcut is None else self.shortcut(x))
        return F.relu_(out)


class Stem3d(CNNBlockBase):
    """conv1 and pool1."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        stride: int,
        pool: Pool | None,
        norm: str,
    ):
        """Create the stem; ``stride`` is that of conv1 in time."""
        super().__init__(in_channels, out_channels, 2 * (pool.stride[1] if pool else 1))
        strides = (stride, 2, 2)
        self.conv1 = Conv3d(in_channels, out_channels, kernel_size, strides, norm=norm, relu=True)
        self.pool = nn.MaxPool3d(*pool) if pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Clip -> map."""
        return self.pool(self.conv1(x))

"""Norms of maps of any dimension, in blocks and in video networks.

Shapes: N batch, C channels, P positions; "map" is (N, C, W), (N, C, H, W) or (N, C, T, H, W).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from detectron2.layers import FrozenBatchNorm2d, get_norm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

NORMS = ("", "BN", "SyncBN", "GN")

CONV_FUNCTION = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class FlatBatchNorm2d(nn.BatchNorm2d):
    """Batch norm of a map with its positions flattened, (N, C, P).

    On a CPU, PyTorch 2.15 can misread the memory layout of a 4-D or 5-D map with an axis of length
    1 and return wrong gradients without an error. A flat map has only one layout. Subclasses
    ``BatchNorm2d`` so that detectron2's ``freeze()`` recognises it.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != 3:
            raise ValueError(f"expected a map (N, C, P), got shape {tuple(input.shape)}")


def make_norm(norm: str, channels: int) -> nn.Module | None:
    """Create one of :data:`NORMS`, for :func:`conv_and_norm`.

    Raises:
        ValueError: another norm, or a number of channels that ``GN`` cannot divide into groups.
    """
    if norm == "FrozenBN":
        raise ValueError(
            "norm 'FrozenBN' has no parameters, so a new block could never learn; "
            f"use one of {NORMS}. The norm of the backbone is a different key."
        )
    if norm not in NORMS:
        raise ValueError(f"norm (config key NORM) must be one of {NORMS}, got {norm!r}")
    if norm == "GN" and channels % 32:
        raise ValueError(
            f"norm 'GN' has 32 groups: in_channels must be a multiple of 32, got {channels}"
        )
    return get_norm(FlatBatchNorm2d if norm == "BN" else norm, channels)


def conv_and_norm(x: Tensor, conv: Any, norm: Any) -> Tensor:
    """Apply a convolution, then its norm, to a map x."""
    if norm is None:
        return conv(x)
    folded = fold_norm(conv, norm)
    return apply_norm(conv(x), norm) if folded is None else conv._conv_forward(x, *folded)


def fold_norm(conv: Any, norm: Any) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of a convolution with its norm folded in, where that norm is constant.

    ``None`` where it is not: norms of a batch or of groups depend on their input.
    """
    frozen = isinstance(norm, FrozenBatchNorm2d)
    if not (frozen or (isinstance(norm, _BatchNorm) and not norm.training)):
        return None
    factor = norm.weight * (norm.running_var + norm.eps).rsqrt()
    weight = conv.weight * factor.view(-1, *[1] * (conv.weight.dim() - 1))
    bias = 0 if conv.bias is None else conv.bias
    return weight, norm.bias + (bias - norm.running_mean) * factor


def apply_norm(x: Tensor, norm: nn.Module, relu: bool = False) -> Tensor:
    """Apply a norm, and ReLU if wanted, to a map x of any dimension."""
    # Contiguous, because PyTorch takes twice as long on strided rows.
    y = norm(x.flatten(2).contiguous())
    # Not after view_as: writing into views makes backward passes slow.
    return (F.relu_(y) if relu else y).view_as(x)

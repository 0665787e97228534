"""Which part of each image of a batch is image, and which is padding.

detectron2's ``ImageList`` pads images of several sizes with zeros, on the right and at the bottom.
A backbone is not told their sizes, so they are read from the batch: the rows and columns of zeros
at the end of an image are its padding. Zeros of its own there count as padding too, but they do so
in every batch: nothing depends on the other images.

Shapes: N batch, C channels, H W axes of images or maps, K keys.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nl_detectron.paths import compiling

_running = threading.local()


def remember_sizes(backbone: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Read the sizes of a batch before a backbone runs (a forward pre-hook)."""
    _running.image_sizes = image_sizes(args[0])


def forget_sizes(backbone: nn.Module, *_: Any) -> None:
    """Forget them when it is done (a forward hook)."""
    _running.image_sizes = None


def sizes_in_map(stride: int) -> Tensor | None:
    """Rows and columns, (N, 2), of each map with this stride that are not padding.

    ``None`` where no backbone is running in this thread that remembers the sizes of its batch.
    """
    sizes = getattr(_running, "image_sizes", None)
    if sizes is None:
        return None
    # Strided layers of a ResNet round up: a cell at the border of the image is one of its own.
    return sizes.add(stride - 1).div(stride, rounding_mode="floor")


def has_padding(x: Tensor, sizes: Tensor) -> bool:
    """Whether a map of a batch x (N, C, H, W) may be larger than its ``sizes`` (N, 2).

    Only looked up on a CPU and where it does not become part of a program.
    """
    if compiling() or not x.is_cpu:
        return True
    return bool((sizes < torch.tensor(x.shape[2:])).any())


def image_sizes(images: Tensor) -> Tensor:
    """Height and width without padding of images (N, C, H, W); (N, 2), at least 1."""
    magnitudes = images.detach().abs().amax(dim=1)  # nan where an image has one: no padding
    sizes = [_last_nonzero(magnitudes.amax(dim=axis)) + 1 for axis in (2, 1)]
    return torch.stack(sizes, dim=1)


def key_mask(keys: Tensor, sizes: Tensor, stride: int) -> Tensor:
    """The keys of each map that are in the image, (N, K) bool, K in row-major order.

    Args:
        keys: map of the keys, (N, C, H, W).
        sizes: (N, 2), sizes of the map's part in the image before it was pooled.
        stride: of the pooling. As in a map without padding, windows that reach beyond the image
            are left out, unless the image is narrower than a window.
    """
    rows, columns = sizes.div(stride, rounding_mode="floor").clamp(min=1).unbind(dim=1)
    rows, columns = _first(keys.shape[2], rows), _first(keys.shape[3], columns)
    return (rows[:, :, None] & columns[:, None, :]).flatten(1)


def pool_keys(x: Tensor, window: list[int], sizes: Tensor, stride: int) -> Tensor:
    """Max-pool maps (N, C, H, W) such that padding changes no key in the image.

    A window with a key in the image reaches into the padding only where the image is narrower than
    the stride. Such an image has one row or column of keys: the maximum of all of its own.

    Args:
        x: the map.
        window: rows and columns of a window.
        sizes: as for :func:`key_mask`.
        stride: likewise.
    """
    height, width = sizes[:, :, None, None, None].unbind(dim=1)
    row = _max_of_first(x[:, :, :stride], height, axis=2)
    column = _max_of_first(x[:, :, :, :stride], width, axis=3)
    corner = _max_of_first(row[:, :, :, :stride], width, axis=3)
    row, column = F.max_pool2d(row, (1, window[1])), F.max_pool2d(column, (window[0], 1))
    column = torch.where(height < stride, corner, column)
    keys = F.max_pool2d(x, window)
    keys[:, :, :1] = torch.where(height < stride, row, keys[:, :, :1])
    keys[:, :, :, :1] = torch.where(width < stride, column, keys[:, :, :, :1])
    return keys


def _max_of_first(x: Tensor, number: Tensor, axis: int) -> Tensor:
    """Maximum of the first positions along an axis, as many as ``number`` (N, 1, 1, 1) says."""
    first = x.narrow(axis, 0, 1)
    position = torch.arange(x.shape[axis], device=x.device)
    inside = (position[:, None] if axis == 2 else position) < number
    return torch.where(inside, x, first).amax(dim=axis, keepdim=True)


def _first(length: int, number: Tensor) -> Tensor:
    """(N, length) bool, True for the first ``number`` (N,) of each row."""
    return torch.arange(length, device=number.device) < number[:, None]


def _last_nonzero(x: Tensor) -> Tensor:
    """Index of the last element of each row that is not zero; 0 if there is none."""
    return ((x != 0) * torch.arange(x.shape[1], device=x.device)).amax(dim=1)

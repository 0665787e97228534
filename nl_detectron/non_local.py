"""The non-local block, z = W_z y + x, for 1-D, 2-D and 3-D maps (Sec. 3.3 of the paper).

Shapes: N batch, C in, D inner, P positions, Q queries, K keys; "map" is (N, C, W), (N, C, H, W) or
(N, C, T, H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import CNNBlockBase
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nl_detectron import ops
from nl_detectron.norm import CONV_FUNCTION, conv_and_norm, make_norm
from nl_detectron.padding import has_padding, key_mask, pool_keys, sizes_in_map
from nl_detectron.parts import AXES, check_parts, part_size, to_map, to_rows
from nl_detectron.paths import compiling

SUBSAMPLE_POSITIONS = ("before_conv", "after_conv")

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


class NonLocalBlock(CNNBlockBase):
    """Non-local block: a bottleneck around the non-local operation, with a residual connection.

    A new block is the identity, so it can be inserted into a pretrained network: the output
    convolution starts at zero, or with a norm, the scale of that norm does.

    Differs from mmcv: by default keys are pooled before the convolutions, as in the paper's
    released code (its text, and mmcv, pool after them), and ``conv_out`` has a bias even with a
    norm.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        dim: int = 2,
        pairwise: str = "embedded_gaussian",
        reduction: int = 2,
        scale: bool = True,
        subsample: int = 1,
        subsample_position: str = "before_conv",
        norm: str = "",
        axes: str = "spacetime",
        group_frames: int = 0,
        activation_checkpoint: bool = False,
    ):
        """Create the block.

        Args:
            in_channels: C, also the number of output channels.
            dim: number of axes of the map besides N and C: 1, 2 or 3.
            pairwise: form of f, one of :data:`nl_detectron.ops.PAIRWISE`. ``gaussian`` has no theta
                and phi; ``concatenation`` also has ``concat_project``, the paper's w_f.
            reduction: C / D.
            scale: multiply the affinity by D ** -0.5; only ``embedded_gaussian`` uses it.
            subsample: stride of the max-pooling of the keys in space, 1 for none. Time is never
                pooled.
            subsample_position: ``before_conv`` pools x, ``after_conv`` pools phi(x) and g(x).
            norm: norm after ``conv_out``: "", "BN", "SyncBN" or "GN".
            axes: what each position of a 3-D map attends to: all positions ("spacetime"), its own
                frame ("space"), or its own place in all frames ("time").
            group_frames: of a 3-D map, attend only within groups of this many consecutive frames;
                0 for none. T must be a multiple of it.
            activation_checkpoint: save only x and y for the backward pass and recompute the rest.

        Raises:
            ValueError: an argument is not one of its allowed values.
        """
        super().__init__(in_channels, in_channels, stride=1)
        _check("dim", dim, tuple(_CONV))
        _check("pairwise", pairwise, ops.PAIRWISE)
        _check("subsample_position", subsample_position, SUBSAMPLE_POSITIONS)
        _check("axes", axes, AXES)
        _check_at_least(1, reduction=reduction, subsample=subsample)
        _check_at_least(0, group_frames=group_frames)
        check_parts(dim, axes, group_frames)
        if axes == "time" and subsample > 1:
            raise ValueError(
                "axes 'time' leaves no space to pool: subsample (config key SUBSAMPLE) must be 1, "
                f"got {subsample}"
            )

        self.dim = dim
        self.pairwise = pairwise
        self.scale = scale
        self.subsample = subsample
        self.subsample_position = subsample_position
        self.axes = axes
        self.group_frames = group_frames
        self.activation_checkpoint = activation_checkpoint
        # One of ops.PATHS[pairwise] to force a path; None lets the size of the map choose.
        self.path: str | None = None
        # Stride of the map in the images of a padded batch, to leave keys in the padding out of the
        # sums; None to use them all.
        self.image_stride: int | None = None
        self.inner_channels = inner_channels = max(in_channels // reduction, 1)

        conv = _CONV[dim]
        embedded = pairwise != "gaussian"
        self.theta = conv(in_channels, inner_channels, 1) if embedded else nn.Identity()
        self.phi = conv(in_channels, inner_channels, 1) if embedded else nn.Identity()
        self.g = conv(in_channels, inner_channels, 1)
        if pairwise == "concatenation":
            self.concat_project = conv(2 * inner_channels, 1, 1, bias=False)
        self.conv_out = conv(inner_channels, in_channels, 1)
        self.norm = make_norm(norm, in_channels)
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.children():
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                # He's, as in Sec. 4.1; with the released code's N(0, 0.01), learning starts late.
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        last: Any = self.norm or self.conv_out
        nn.init.zeros_(last.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Compute z = W_z y + x for a map x; z has the shape of x."""
        if self.activation_checkpoint and torch.is_grad_enabled():
            # The norm stays outside: recomputed, it would update its statistics twice.
            arguments = x, self.sizes_in_map()
            y = checkpoint(self._respond, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            y = self._respond(x, self.sizes_in_map())
        return x + conv_and_norm(y, self.conv_out, self.norm)

    def attention(
        self, x: Tensor, queries: Tensor | None = None, sizes: Tensor | None = None
    ) -> Tensor:
        """The attention matrix of the block for the map x.

        Args:
            x: the map.
            queries: (Q,) positions to compute rows for, in row-major order; None for all.
            sizes: (N, 2), rows and columns of each 2-D map that are not padding: all other
                keys get 0. None for maps without padding.

        Returns:
            (N, Q, K), positions in row-major order, K after subsampling. Where positions do not
            attend to all others, the first axis has the parts of each map in row-major order, such
            as N * T frames with ``axes="space"``, and positions are counted within a part.
        """
        theta, phi, _, w_f, mask = self._embed(x, sizes)
        if queries is not None:
            theta = theta[:, queries]
        options: dict[str, Any] = {"pairwise": self.pairwise, "scale": self.scale}
        return ops.attention(theta, phi, **options, w_f=w_f, key_mask=mask)

    def path_for(self, x: Tensor) -> str:
        """The path by which y is computed for the map x, one of ``ops.PATHS[pairwise]``.

        It may depend on whether gradients are needed, as well as on the size.
        """
        theta, phi, g, *_ = self._embed(x)
        return ops.choose_path(self.pairwise, theta, phi, g, self.scale, self.path)

    def sizes_in_map(self) -> Tensor | None:
        """Rows and columns of each map of a running backbone that are not padding, (N, 2).

        ``None`` where padding is not masked.
        """
        return sizes_in_map(self.image_stride) if self.image_stride else None

    def pool_window(self, size: Sequence[Any]) -> list[int]:
        """Number of positions that one key covers, along each axis of a map of this size."""
        # A map narrower than the stride is pooled to one position, not to none. In a trace a length
        # is a tensor, and a Python comparison would fix the result for that size.
        window: list[Any] = [
            n.clamp(max=self.subsample) if isinstance(n, Tensor) else min(n, self.subsample)
            for n in size
        ]
        if self.dim == 3:
            window[0] = 1
        return window

    def part_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Size of the part of a map of this size that each of its positions attends to."""
        return part_size(size, self.axes, self.group_frames)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of the block besides its layers."""
        path = f"path={self.path}" if self.path else "path chosen by size"
        shown = [f"pairwise={self.pairwise}", path, f"subsample={self.subsample}"]
        if self.pairwise == "embedded_gaussian":
            shown.insert(1, f"scale={self.scale}")
        if self.subsample > 1:
            shown.append(f"subsample_position={self.subsample_position}")
        if self.dim == 3:
            shown.append(f"axes={self.axes}")
        if self.group_frames:
            shown.append(f"group_frames={self.group_frames}")
        if self.activation_checkpoint:
            shown.append("activation_checkpoint=True")
        if self.image_stride:
            shown.append("mask_padding=True")
        return ", ".join(shown)

    def _respond(self, x: Tensor, sizes: Tensor | None) -> Tensor:
        """Map x -> map y with D channels, Eq. 1."""
        theta, phi, g, w_f, mask = self._embed(x, sizes)
        options: dict[str, Any] = {"key_mask": mask, "path": self.path}
        if self.pairwise == "gaussian":
            y = ops.gaussian(theta, phi, g, **options)
        elif self.pairwise == "embedded_gaussian":
            y = ops.embedded_gaussian(theta, phi, g, scale=self.scale, **options)
        elif self.pairwise == "dot_product":
            y = ops.dot_product(theta, phi, g, **options)
        else:
            y = ops.concatenation(theta, phi, g, w_f, **options)
        return to_map(y, x, self.axes, self.group_frames)

    def _embed(
        self, x: Tensor, sizes: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Any, Tensor | None]:
        """Map -> rows theta (N, Q, D), phi (N, K, D), g (N, K, D), w_f of concatenation, key mask.

        For ``gaussian``, theta and phi have width C; where w_f is folded into their convolution, 1.
        """
        if x.is_cpu and self.dim in _CHANNELS_LAST and not compiling():
            # Convolutions and pooling are faster, and rows are views; one copy of x costs less.
            x = x.contiguous(memory_format=_CHANNELS_LAST[self.dim])
        if sizes is not None and not has_padding(x, sizes):
            sizes = None  # a mask would cost time and change nothing
        theta: Callable[[Tensor], Tensor] = self.theta
        phi: Callable[[Tensor], Tensor] = self.phi
        w_f = None
        after_conv = self.subsample_position == "after_conv" and self.subsample > 1
        if self.pairwise == "concatenation":
            # f needs only one number from theta and one from phi: w_f . conv(x) is one channel.
            w_theta, w_phi = self.concat_project.weight.view(1, -1).chunk(2, dim=1)
            one = torch.ones_like(w_theta[:, :1])
            theta = self._weighted(self.theta, w_theta)
            if not after_conv:
                phi, w_phi = self._weighted(self.phi, w_phi), one
            w_f = torch.cat([one, w_phi], dim=1)[0]
        if after_conv:
            phi_map, g_map = self._pool(phi(x), sizes), self._pool(self.g(x), sizes)
        else:
            keys = self._pool(x, sizes)
            phi_map, g_map = phi(keys), self.g(keys)
        mask = None if sizes is None else key_mask(g_map, sizes, self.subsample)
        rows = partial(to_rows, axes=self.axes, group_frames=self.group_frames)
        return rows(theta(x)), rows(phi_map), rows(g_map), w_f, mask

    def _weighted(self, conv: Any, w: Tensor) -> Callable[[Tensor], Tensor]:
        """The convolution to one channel that computes w . conv(x), for w (1, D)."""
        weight = (w @ conv.weight.flatten(1)).view(1, -1, *[1] * self.dim)
        bias = (w @ conv.bias[:, None])[0]
        return partial(CONV_FUNCTION[self.dim], weight=weight, bias=bias)

    def _pool(self, x: Tensor, sizes: Tensor | None) -> Tensor:
        if self.subsample == 1:
            return x
        window = self.pool_window(x.shape[2:])
        if sizes is not None:
            return pool_keys(x, window, sizes, self.subsample)
        return _MAX_POOL[self.dim](x, window)


def find_blocks(model: nn.Module, *patterns: str) -> dict[str, NonLocalBlock]:
    """Find the non-local blocks of a model by name.

    Args:
        model: any model.
        patterns: names or ends of names, such as "res4.non_local4"; ``*`` and ``?`` are wild cards.
            Without a pattern, all blocks are returned, and there may be none.

    Returns:
        Full name to block, in the order of the model.

    Raises:
        ValueError: no block matches a pattern.
    """
    blocks = {name: m for name, m in model.named_modules() if isinstance(m, NonLocalBlock)}
    if not patterns:
        return blocks
    if not blocks:
        raise ValueError(
            "the model has no non-local blocks; a config inserts them with MODEL.BACKBONE.NAME "
            "build_non_local_... or MODEL.ROI_KEYPOINT_HEAD.NAME NonLocalKeypointHead"
        )
    found = set()
    for pattern in patterns:
        matches = {name for name in blocks if fnmatchcase(f".{name}", f"*.{pattern}")}
        if not matches:
            raise ValueError(
                f"the model has no non-local block {pattern!r}; it has {', '.join(blocks)}"
            )
        found |= matches
    return {name: block for name, block in blocks.items() if name in found}


def insert_after(parent: nn.Module, after: str, name: str, module: nn.Module) -> None:
    """Insert a child after the child ``after`` of a module that runs its children in order.

    The other children keep their names, and so their keys in checkpoints.
    """
    children = dict(parent.named_children())
    for child_name in children:
        delattr(parent, child_name)
    for child_name, child in children.items():
        parent.add_module(child_name, child)
        if child_name == after:
            parent.add_module(name, module)


def _check(name: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        key = f"{name} (config key {name.upper()})"
        raise ValueError(f"{key} must be one of {allowed}, got {value!r}")


def _check_at_least(least: int, **values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or value < least:
            key = f"{name} (config key {name.upper()})"
            raise ValueError(f"{key} must be an integer >= {least}, got {value!r}")

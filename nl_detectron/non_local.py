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
from detectron2.layers import CNNBlockBase, FrozenBatchNorm2d, get_norm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from nl_detectron import ops

NORMS = ("", "BN", "SyncBN", "GN")
SUBSAMPLE_POSITIONS = ("before_conv", "after_conv")
AXES = ("spacetime", "space", "time")

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_CONV_FUNCTION = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


class FlatBatchNorm2d(nn.BatchNorm2d):
    """Batch norm of a map whose positions are one axis, (N, C, P).

    PyTorch's batch norm on a CPU (2.15) may mistake the memory layout of a 4-D or 5-D map that has
    an axis of length 1; the gradients are then silently wrong. A 3-D map has one layout only. The
    class is a ``BatchNorm2d`` so that detectron2's ``freeze()`` knows it.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != 3:
            raise ValueError(f"expected a map (N, C, P), got shape {tuple(input.shape)}")


class NonLocalBlock(CNNBlockBase):
    """Non-local block: a bottleneck around the non-local operation, and a residual connection.

    It is the identity when new, so it can be put into a pretrained network: with ``norm=""`` the
    output convolution starts at zero, otherwise the scale of the norm after it does.

    Differs from mmcv: keys are pooled before the convolutions by default, as in the paper's
    released code (its text, and mmcv, pool after them), and ``conv_out`` keeps its bias beside a
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
        activation_checkpoint: bool = False,
    ):
        """Create the block.

        Args:
            in_channels: C, also the number of output channels.
            dim: number of axes of the map besides N and C: 1, 2 or 3.
            pairwise: form of f, one of :data:`nl_detectron.ops.PAIRWISE`. ``gaussian`` has no theta
                and phi; ``concatenation`` has ``concat_project``, the paper's w_f, beside them.
            reduction: C / D.
            scale: multiply the affinity by D ** -0.5; read by ``embedded_gaussian`` alone.
            subsample: stride of the max-pooling of the keys in space, 1 for none. Time is never
                pooled.
            subsample_position: ``before_conv`` pools x once for phi and g, ``after_conv`` pools
                both.
            norm: norm after ``conv_out``: "", "BN", "SyncBN" or "GN".
            axes: the set over which j runs in a 3-D map: all positions, those of the same frame
                ("space"), or the same place in all frames ("time").
            activation_checkpoint: keep only x and y for the backward pass, and compute what lies
                between again.

        Raises:
            ValueError: an argument outside its allowed values.
        """
        super().__init__(in_channels, in_channels, stride=1)
        _check("dim", dim, tuple(_CONV))
        _check("pairwise (config key PAIRWISE)", pairwise, ops.PAIRWISE)
        _check(
            "subsample_position (config key SUBSAMPLE_POSITION)",
            subsample_position,
            SUBSAMPLE_POSITIONS,
        )
        _check("axes", axes, AXES if dim == 3 else AXES[:1])
        if norm == "FrozenBN":
            raise ValueError(
                "norm 'FrozenBN' would keep a new block at the identity for ever, because its zero "
                f"scale is not a parameter; use one of {NORMS}. The backbone's norm is another key."
            )
        _check("norm (config key NORM)", norm, NORMS)
        for name, value in (("reduction", reduction), ("subsample", subsample)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"{name} (config key {name.upper()}) must be an integer >= 1, got {value!r}"
                )
        if axes == "time" and subsample > 1:
            raise ValueError(
                f"axes 'time' has no space to pool: subsample must be 1, got {subsample}"
            )
        if norm == "GN" and in_channels % 32:
            raise ValueError(
                f"norm 'GN' has 32 groups: in_channels must be a multiple, got {in_channels}"
            )

        self.dim = dim
        self.pairwise = pairwise
        self.scale = scale
        self.subsample = subsample
        self.subsample_position = subsample_position
        self.axes = axes
        self.activation_checkpoint = activation_checkpoint
        # One of ops.PATHS[pairwise] to force a way of computing y; None chooses the fastest.
        self.path: str | None = None
        self.inner_channels = inner_channels = max(in_channels // reduction, 1)

        conv = _CONV[dim]
        embedded = pairwise != "gaussian"
        self.theta = conv(in_channels, inner_channels, 1) if embedded else nn.Identity()
        self.phi = conv(in_channels, inner_channels, 1) if embedded else nn.Identity()
        self.g = conv(in_channels, inner_channels, 1)
        if pairwise == "concatenation":
            self.concat_project = conv(2 * inner_channels, 1, 1, bias=False)
        self.conv_out = conv(inner_channels, in_channels, 1)
        self.norm = get_norm(FlatBatchNorm2d if norm == "BN" else norm, in_channels)
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.children():
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                # He's, as in Sec. 4.1; the released code's N(0, 0.01) learns far later.
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.conv_out.weight if self.norm is None else self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Add to every position what it gathers from the others; map in, map of that shape out."""
        if self.activation_checkpoint and torch.is_grad_enabled():
            # The norm stays outside: done again, it would update its statistics twice.
            y = checkpoint(self._respond, x, use_reentrant=False, preserve_rng_state=False)
        else:
            y = self._respond(x)
        return x + self._project(y)

    def attention(self, x: Tensor, queries: Tensor | None = None) -> Tensor:
        """The explicit attention matrix of the block for the map x.

        Args:
            x: the map.
            queries: (Q,) positions to compute rows for, counted in row-major order; all of them
                without it.

        Returns:
            (N, Q, K), positions in row-major order, K after subsampling. With ``axes="space"`` N
            counts frames (N * T of them), with "time" it counts places (N * H * W).
        """
        theta, phi, _, w_f = self._embed(x)
        if queries is not None:
            theta = theta[:, queries]
        return ops.attention(theta, phi, pairwise=self.pairwise, scale=self.scale, w_f=w_f)

    def pool_window(self, size: Sequence[int]) -> list[int]:
        """Positions that one key covers along each axis of a map of this size, such as (H, W)."""
        # A map narrower than the stride is pooled to one position, not to none.
        window = [_at_most(length, self.subsample) for length in size]
        if self.dim == 3:
            window[0] = 1
        return window

    def _respond(self, x: Tensor) -> Tensor:
        """Map x -> map y with D channels, Eq. 1."""
        theta, phi, g, w_f = self._embed(x)
        if self.pairwise == "gaussian":
            y = ops.gaussian(theta, phi, g, path=self.path)
        elif self.pairwise == "embedded_gaussian":
            y = ops.embedded_gaussian(theta, phi, g, scale=self.scale, path=self.path)
        elif self.pairwise == "dot_product":
            y = ops.dot_product(theta, phi, g, path=self.path)
        else:
            y = ops.concatenation(theta, phi, g, w_f, path=self.path)
        return self._to_map(y, x)

    def _project(self, y: Tensor) -> Tensor:
        """Map y -> map W_z y with its norm."""
        conv: Any = self.conv_out
        norm: Any = self.norm
        if norm is None:
            return conv(y)
        frozen = isinstance(norm, FrozenBatchNorm2d)
        if frozen or (isinstance(norm, _BatchNorm) and not norm.training):
            # Its statistics are constants: the norm is part of the convolution.
            factor = norm.weight * (norm.running_var + norm.eps).rsqrt()
            weight = conv.weight * factor.view(-1, *[1] * (self.dim + 1))
            bias = norm.bias + (conv.bias - norm.running_mean) * factor
            return _CONV_FUNCTION[self.dim](y, weight, bias)
        out = conv(y)
        # Contiguous, because strided rows take PyTorch twice the time.
        return norm(out.flatten(2).contiguous()).view_as(out)

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
        """Map -> rows theta (N, Q, D), phi (N, K, D), g (N, K, D), and w_f of concatenation.

        D of theta and phi is C for ``gaussian``, and 1 where w_f could go into the convolution.
        """
        theta: Callable[[Tensor], Tensor] = self.theta
        phi: Callable[[Tensor], Tensor] = self.phi
        w_f = None
        after_conv = self.subsample_position == "after_conv" and self.subsample > 1
        if self.pairwise == "concatenation":
            # f takes one number from theta and one from phi: one channel is all that is needed.
            w_theta, w_phi = self.concat_project.weight.view(1, -1).chunk(2, dim=1)
            one = torch.ones_like(w_theta[:, :1])
            theta = self._weighted(self.theta, w_theta)
            if not after_conv:
                phi, w_phi = self._weighted(self.phi, w_phi), one
            w_f = torch.cat([one, w_phi], dim=1)[0]
        if after_conv:
            phi_map, g_map = self._pool(phi(x)), self._pool(self.g(x))
        else:
            keys = self._pool(x)
            phi_map, g_map = phi(keys), self.g(keys)
        return self._to_rows(theta(x)), self._to_rows(phi_map), self._to_rows(g_map), w_f

    def _weighted(self, conv: Any, w: Tensor) -> Callable[[Tensor], Tensor]:
        """A convolution to one channel, w . conv(x), for w (1, D)."""
        weight = (w @ conv.weight.flatten(1)).view(1, -1, *[1] * self.dim)
        bias = (w @ conv.bias[:, None])[0]
        return partial(_CONV_FUNCTION[self.dim], weight=weight, bias=bias)

    def _pool(self, x: Tensor) -> Tensor:
        if self.subsample == 1:
            return x
        return _MAX_POOL[self.dim](x, self.pool_window(x.shape[2:]))

    def _to_rows(self, x: Tensor) -> Tensor:
        """Map -> (N, P, C); the axes over which j does not run join N."""
        if self.axes == "space":
            x = x.transpose(1, 2).flatten(0, 1)
        elif self.axes == "time":
            x = x.permute(0, 3, 4, 1, 2).flatten(0, 2)
        return x.flatten(2).transpose(1, 2)

    def _to_map(self, rows: Tensor, x: Tensor) -> Tensor:
        """(N, P, D) -> map with the axes of x; undoes :meth:`_to_rows`."""
        rows, channels = rows.transpose(1, 2), rows.shape[-1]
        if self.dim < 3 or self.axes == "spacetime":
            return rows.reshape(x.shape[0], channels, *x.shape[2:])
        n, _, t, h, w = x.shape
        if self.axes == "space":
            return rows.reshape(n, t, channels, h, w).transpose(1, 2)
        return rows.reshape(n, h, w, channels, t).permute(0, 3, 4, 1, 2)


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
    """Insert a child behind the child ``after`` of a module that runs its children in order.

    The other children keep their names, and with them their keys in checkpoints.
    """
    children = dict(parent.named_children())
    for child_name in children:
        delattr(parent, child_name)
    for child_name, child in children.items():
        parent.add_module(child_name, child)
        if child_name == after:
            parent.add_module(name, module)


def _at_most(length: Any, limit: int) -> Any:
    # In a trace a length is a tensor, and a comparison in Python would hold for that size alone.
    return length.clamp(max=limit) if isinstance(length, Tensor) else min(length, limit)


def _check(name: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")

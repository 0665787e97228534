"""The non-local block, z = W_z y + x, for 1-D, 2-D and 3-D maps (Sec. 3.3 of the paper).

Shapes: N batch, C in, D inner, P positions, Q queries, K keys; "map" is (N, C, W), (N, C, H, W) or
(N, C, T, H, W).
"""

from __future__ import annotations

import torch.nn.functional as F
from detectron2.layers import CNNBlockBase, get_norm
from torch import Tensor, nn

from nl_detectron import ops

NORMS = ("", "BN", "SyncBN", "GN")
SUBSAMPLE_POSITIONS = ("before_conv", "after_conv")
AXES = ("spacetime", "space", "time")

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


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
        self.inner_channels = inner_channels = max(in_channels // reduction, 1)

        conv = _CONV[dim]
        embedded = pairwise != "gaussian"
        self.theta = conv(in_channels, inner_channels, 1) if embedded else nn.Identity()
        self.phi = conv(in_channels, inner_channels, 1) if embedded else nn.Identity()
        self.g = conv(in_channels, inner_channels, 1)
        if pairwise == "concatenation":
            self.concat_project = conv(2 * inner_channels, 1, 1, bias=False)
        self.conv_out = conv(inner_channels, in_channels, 1)
        self.norm = get_norm(norm, in_channels)
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
        theta, phi, g = self._embed(x)
        if self.pairwise == "gaussian":
            y = ops.gaussian(theta, phi, g)
        elif self.pairwise == "embedded_gaussian":
            y = ops.embedded_gaussian(theta, phi, g, scale=self.scale)
        elif self.pairwise == "dot_product":
            y = ops.dot_product(theta, phi, g)
        else:
            y = ops.concatenation(theta, phi, g, self.concat_project.weight.flatten())
        out = self.conv_out(self._to_map(y, x))
        if self.norm is not None:
            # As (N, C, P, 1) every map is right for detectron2's 2-D norms, and for its freeze().
            out = self.norm(out.flatten(2).unsqueeze(-1)).view_as(out)
        return x + out

    def attention(self, x: Tensor) -> Tensor:
        """The explicit attention matrix of the block for the map x.

        Returns:
            (N, Q, K), positions in row-major order, K after subsampling. With ``axes="space"`` N
            counts frames (N * T of them), with "time" it counts places (N * H * W).
        """
        theta, phi, _ = self._embed(x)
        w_f = self.concat_project.weight.flatten() if self.pairwise == "concatenation" else None
        return ops.attention(theta, phi, pairwise=self.pairwise, scale=self.scale, w_f=w_f)

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map -> theta (N, Q, D), phi (N, K, D), g (N, K, D); D is C in a Gaussian theta, phi."""
        theta = self.theta(x)
        if self.subsample_position == "before_conv":
            keys = self._pool(x)
            phi, g = self.phi(keys), self.g(keys)
        else:
            phi, g = self._pool(self.phi(x)), self._pool(self.g(x))
        return self._to_rows(theta), self._to_rows(phi), self._to_rows(g)

    def _pool(self, x: Tensor) -> Tensor:
        if self.subsample == 1:
            return x
        # A map narrower than the stride is pooled to one position, not to none.
        kernel = [min(self.subsample, size) for size in x.shape[2:]]
        if self.dim == 3:
            kernel[0] = 1
        return _MAX_POOL[self.dim](x, kernel)

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


def _check(name: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")

"""The paper's equations as slow loops, one pair of positions at a time.

They are what the package is compared with, so nothing of it is imported here.

Shapes: Q queries, K keys, D inner width, C channels. Paper: `Non-local Neural Networks`,
https://arxiv.org/abs/1711.07971
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def response(theta_i: Tensor, phi: Tensor, g: Tensor, pairwise: str, scale=True, w_f=None):
    """y_i of one query over the keys phi (K, D) with values g (K, E), Eq. 1."""
    y = g.new_zeros(g.shape[1])
    if len(g) == 0:
        return y
    if pairwise in ("gaussian", "embedded_gaussian"):  # Eq. 2 and 3
        # D ** -0.5 is from the released code. exp(-max) cancels in f / C(x), and avoids overflow.
        factor = len(theta_i) ** -0.5 if scale and pairwise == "embedded_gaussian" else 1
        affinity = [theta_i @ phi_j * factor for phi_j in phi]
        largest = max(affinity)
        f = [torch.exp(a - largest) for a in affinity]
        c = sum(f)
    elif pairwise == "dot_product":  # Eq. 4
        f = [theta_i @ phi_j for phi_j in phi]
        c = len(f)
    else:  # Eq. 5
        f = [torch.relu(w_f @ torch.cat([theta_i, phi_j])) for phi_j in phi]
        c = len(f)
    for f_j, g_j in zip(f, g):
        y = y + f_j / c * g_j
    return y


def operation(theta, phi, g, pairwise: str, scale=True, w_f=None, key_mask=None) -> Tensor:
    """Eq. 1 for theta (N, Q, D), phi (N, K, D), g (N, K, E); masked keys are skipped."""
    y = g.new_zeros(*theta.shape[:2], g.shape[2])
    for n, i in itertools.product(range(theta.shape[0]), range(theta.shape[1])):
        keys = torch.ones(g.shape[1], dtype=torch.bool) if key_mask is None else key_mask[n]
        y[n, i] = response(theta[n, i], phi[n][keys], g[n][keys], pairwise, scale, w_f)
    return y


def conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolution with kernel size 1: a matrix product at every position."""
    y = x.new_zeros(x.shape[0], weight.shape[0], *x.shape[2:])
    for n, *place in itertools.product(range(x.shape[0]), *map(range, x.shape[2:])):
        y[(n, slice(None), *place)] = weight.flatten(1) @ x[(n, slice(None), *place)] + bias
    return y


def max_pool(x: Tensor, stride: int) -> Tensor:
    """Max over stride ** 2 positions, never over time; incomplete windows are dropped."""
    sizes = list(x.shape[2:])
    strides = [min(stride, size) for size in sizes]
    if len(sizes) == 3:
        strides[0] = 1
    pooled = x.new_zeros(*x.shape[:2], *[size // s for size, s in zip(sizes, strides)])
    for place in itertools.product(*map(range, pooled.shape[2:])):
        window = [slice(p * s, (p + 1) * s) for p, s in zip(place, strides)]
        pooled[(..., *place)] = x[(slice(None), slice(None), *window)].flatten(2).amax(dim=2)
    return pooled


def block(
    x: Tensor,
    weights: dict[str, Tensor],
    pairwise: str,
    scale=True,
    subsample=1,
    subsample_position="before_conv",
    axes="spacetime",
) -> Tensor:
    """z = W_z y + x, Eq. 6, for a map x of 1 to 3 dimensions; ``weights`` is a state dict."""

    def embed(name: str, x: Tensor) -> Tensor:
        if pairwise == "gaussian" and name in ("theta", "phi"):
            return x
        return conv(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    theta = embed("theta", x)
    if subsample_position == "before_conv":
        pooled = max_pool(x, subsample)
        phi, g = embed("phi", pooled), embed("g", pooled)
    else:
        phi, g = max_pool(embed("phi", x), subsample), max_pool(embed("g", x), subsample)
    w_f = weights["concat_project.weight"].flatten() if pairwise == "concatenation" else None

    y = x.new_zeros(x.shape[0], g.shape[1], *x.shape[2:])
    for n, *i in itertools.product(range(x.shape[0]), *map(range, x.shape[2:])):
        keys = {"spacetime": (...,), "space": (i[0], ...), "time": (..., *i[1:])}[axes]
        phi_i = phi[n][(slice(None), *keys)].flatten(1).T
        g_i = g[n][(slice(None), *keys)].flatten(1).T
        theta_i = theta[(n, slice(None), *i)]
        y[(n, slice(None), *i)] = response(theta_i, phi_i, g_i, pairwise, scale, w_f)
    return x + conv(y, weights["conv_out.weight"], weights["conv_out.bias"])


def plain_operation(theta, phi, g, pairwise: str, scale=True, w_f=None, key_mask=None) -> Tensor:
    """:func:`operation` as matrix products, to differentiate with autograd."""
    if pairwise == "concatenation":
        w_theta, w_phi = w_f.chunk(2)
        f = ((theta @ w_theta)[:, :, None] + (phi @ w_phi)[:, None, :]).relu()
    else:
        f = theta @ phi.transpose(1, 2)
    if pairwise in ("gaussian", "embedded_gaussian"):
        if scale and pairwise == "embedded_gaussian":
            f = f * theta.shape[2] ** -0.5
        if key_mask is not None:
            f = f.masked_fill(~key_mask[:, None, :], float("-inf"))
        return f.softmax(dim=2).nan_to_num(0.0) @ g  # nan: no key is left
    number = torch.full((len(g), 1, 1), g.shape[1], dtype=g.dtype)
    if key_mask is not None:
        f = f * key_mask[:, None, :]
        number = key_mask.sum(1)[:, None, None].to(g.dtype)
    return f @ g / number.clamp(min=1)


def plain_block(
    x: Tensor,
    weights: dict[str, Tensor],
    pairwise: str,
    scale=True,
    subsample=1,
    subsample_position="before_conv",
    axes="spacetime",
    norm="",
    training=False,
) -> Tensor:
    """:func:`block` as tensor products, to differentiate with autograd; with the norm after W_z.

    Every tensor is made contiguous, so that memory layouts play no role.
    """

    def conv(name: str, x: Tensor) -> Tensor:
        bias = weights[f"{name}.bias"].view(-1, *[1] * (x.dim() - 2))
        return torch.einsum("dc,nc...->nd...", weights[f"{name}.weight"].flatten(1), x) + bias

    def pool(x: Tensor) -> Tensor:
        for axis in range(3 if x.dim() == 5 else 2, x.dim()):
            stride = min(subsample, x.shape[axis])
            whole = x.narrow(axis, 0, x.shape[axis] // stride * stride)
            x = whole.unflatten(axis, (-1, stride)).amax(axis + 1)
        return x

    def rows(x: Tensor) -> Tensor:
        """(sets of positions that see each other, positions, channels)"""
        x = x.movedim(1, -1)  # N [T] H W C
        if axes == "space":
            x = x.flatten(0, 1)
        elif axes == "time":
            x = x.movedim(1, 3).flatten(0, 2)
        return x.flatten(1, -2).contiguous()

    x = x.contiguous()
    embed = (lambda name, x: x) if pairwise == "gaussian" else conv
    if subsample_position == "before_conv":
        phi, g = embed("phi", pool(x)), conv("g", pool(x))
    else:
        phi, g = pool(embed("phi", x)), pool(conv("g", x))
    w_f = weights["concat_project.weight"].flatten() if pairwise == "concatenation" else None
    y = plain_operation(rows(embed("theta", x)), rows(phi), rows(g), pairwise, scale, w_f)
    size = x.shape[2:]
    if axes == "time":
        y = y.view(x.shape[0], *size[1:], size[0], g.shape[1]).movedim(3, 1).movedim(-1, 1)
    else:
        y = y.view(x.shape[0], *size, g.shape[1]).movedim(-1, 1)
    w_y = conv("conv_out", y.contiguous())
    if norm:
        w_y = plain_norm(w_y, weights, norm, training)
    return x + w_y


def plain_norm(x: Tensor, weights: dict[str, Tensor], norm: str, training: bool) -> Tensor:
    """(x - mean) / sqrt(var + 1e-5) * weight + bias; GN has 32 groups."""
    per_channel = (1, -1, *[1] * (x.dim() - 2))
    if norm == "GN":
        groups = x.reshape(x.shape[0], 32, -1)
        mean, var = groups.mean(2, keepdim=True), groups.var(2, correction=0, keepdim=True)
        out = ((groups - mean) / (var + 1e-5).sqrt()).view_as(x)
    else:
        axes = [0, *range(2, x.dim())]
        mean, var = weights["norm.running_mean"], weights["norm.running_var"]
        if training:
            mean, var = x.mean(axes), x.var(axes, correction=0)
        out = (x - mean.view(per_channel)) / (var.view(per_channel) + 1e-5).sqrt()
    return out * weights["norm.weight"].view(per_channel) + weights["norm.bias"].view(per_channel)

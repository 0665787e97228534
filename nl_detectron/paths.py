"""How the sums of the non-local operation are computed: functions from rows to rows.

The functions of :mod:`nl_detectron.ops` say what is computed and choose among these. "Pairs" are
pairs of a query and a key: a matrix of them is what peers build, and what most of these avoid.

Shapes: N batch, Q queries, K keys, D inner width of theta and phi, E width of g.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Pairs that exist at a time in blocked_softmax_sum: 8 MB in float32. With fewer, matrix products
# are too narrow to be fast.
BLOCK_PAIRS = 2**21


def softmax(theta: Tensor, phi: Tensor, scale: bool, key_mask: Tensor | None) -> Tensor:
    """softmax_j(theta_i . phi_j), (N, Q, K) in at least float32; 0 where there are no keys."""
    # An unscaled product of half-precision features passes 65504 long before training fails, so the
    # product, not only the softmax, is in float32.
    with no_autocast(theta):
        theta, phi = at_least_float32(theta), at_least_float32(phi)
        if scale:
            theta = theta * _scale(theta)
        affinity = theta @ phi.transpose(-2, -1)
        if key_mask is None:
            return affinity.softmax(dim=-1)
        without_keys = ~key_mask.any(dim=-1)[:, None, None]
        affinity = affinity.masked_fill(~key_mask[:, None, :], float("-inf"))
        return affinity.softmax(dim=-1).masked_fill(without_keys, 0.0)


def softmax_sum(
    theta: Tensor, phi: Tensor, g: Tensor, scale: bool, key_mask: Tensor | None
) -> Tensor:
    """sum_j softmax_j(theta_i . phi_j) g_j with the matrix of all pairs."""
    return softmax(theta, phi, scale, key_mask).to(g.dtype) @ g


def blocked_softmax_sum(
    theta: Tensor, phi: Tensor, g: Tensor, scale: bool, key_mask: Tensor | None
) -> Tensor:
    """:func:`softmax_sum` for some queries at a time. No second derivative.

    A loop over blocks cannot be compiled or traced for many sizes: there it is
    :func:`fused_softmax_sum`.
    """
    if compiling():
        return fused_softmax_sum(theta, phi, g, scale, key_mask)
    rows = [at_least_float32(t) for t in (theta, phi, g)]
    if scale:
        rows[0] = rows[0] * _scale(theta)
    with no_autocast(theta):
        return _BlockedSoftmaxSum.apply(*rows, key_mask).to(g.dtype)


class _BlockedSoftmaxSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, theta: Tensor, phi: Tensor, g: Tensor, key_mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(theta, phi, g, key_mask)
        # Written into one tensor: small results between the blocks would fragment the heap.
        y = g.new_empty(*theta.shape[:2], g.shape[2])
        for n, rows, p in _softmax_blocks(theta, phi, key_mask):
            y[n, rows] = p @ g[n]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("path 'blocked' has no second derivative; path 'naive' has one")
        theta, phi, g, key_mask = ctx.saved_tensors
        d_theta, d_phi, d_g = torch.empty_like(theta), torch.zeros_like(phi), torch.zeros_like(g)
        for n, rows, p in _softmax_blocks(theta, phi, key_mask):
            d_g[n].baddbmm_(p.mT, dy[n, rows])
            # A softmax p with gradient dp passes on p (dp - sum p dp). The sum also is dy . y, but
            # only summed like this it cancels where one key has all the weight.
            d_affinity = (dy[n, rows] @ g[n].mT).mul_(p)
            d_affinity.addcmul_(p, d_affinity.sum(dim=-1, keepdim=True), value=-1)
            d_phi[n].baddbmm_(d_affinity.mT, theta[n, rows])
            d_theta[n, rows] = d_affinity @ phi[n]
        return d_theta, d_phi, d_g, None


def _softmax_blocks(
    theta: Tensor, phi: Tensor, key_mask: Tensor | None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Samples, queries, and the rows of their softmax (samples, queries, K)."""
    (samples, queries), keys = theta.shape[:2], max(phi.shape[1], 1)
    samples_step = max(BLOCK_PAIRS // max(queries * keys, 1), 1)
    queries_step = max(BLOCK_PAIRS // keys, 1)
    for first in range(0, samples, samples_step):
        n = slice(first, first + samples_step)
        mask = None if key_mask is None else key_mask[n]
        for start in range(0, queries, queries_step):
            rows = slice(start, start + queries_step)
            yield n, rows, softmax(theta[n, rows], phi[n], False, mask)


def fused_softmax_sum(
    theta: Tensor, phi: Tensor, g: Tensor, scale: bool, key_mask: Tensor | None
) -> Tensor:
    """:func:`softmax_sum` by PyTorch's scaled_dot_product_attention. No second derivative.

    The gradients of theta and phi have an absolute error of some eps |dy_i| |y_i| |phi_j| (or
    |theta_i|), because the kernels subtract dy . y where sum p dp would cancel. Where one key has
    nearly all the weight, exact gradients are far smaller than that.

    Which kernel runs: on a CPU PyTorch's own flash attention, for any width, provided that all
    widths are equal and rows contiguous (else the matrix of all pairs, silently). On CUDA flash
    attention up to width 256 in half precision, else the memory-efficient kernel, which takes any
    width; for float64 the matrix.
    """
    factor = _scale(theta) if scale else 1.0
    width = max(theta.shape[-1], g.shape[-1])
    dtype = torch.promote_types(torch.promote_types(theta.dtype, phi.dtype), g.dtype)
    if key_mask is not None:
        # A softmax over no keys is nan; over all of them, with g = 0, it gives the 0 that is due.
        key_mask = (key_mask | ~key_mask.any(dim=-1, keepdim=True))[:, None, None, :]
    query, key, value = (_as_head(t.to(dtype), width) for t in (theta, phi, g))
    with no_autocast(theta):
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=key_mask, scale=factor)
    return y[:, 0, :, : g.shape[-1]].to(g.dtype)


def relu_sum(a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    """sum_j ReLU(a_i + b_j) g_j of a (N, Q), b (N, K), g (N, K, E) with the matrix of all pairs."""
    return (a[:, :, None] + b[:, None, :]).relu() @ g


def sorted_relu_sum(a: Tensor, b: Tensor, g: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """:func:`relu_sum` in O((Q + K) (log K + E)).

    In descending order of b, the keys with a_i + b_j > 0 are the first few. So the sum is that of
    g_j over them times a_i, plus that of b_j g_j: prefix sums hold both, for every query.

    Args:
        a: (N, Q).
        b: (N, K).
        g: (N, K, E), 0 for the keys that do not take part.
        key_mask: (N, K) bool, True for the keys that take part.
    """
    dtype = g.dtype
    a, b, g = at_least_float32(a), at_least_float32(b), at_least_float32(g)
    # An offset of b that a takes back would cancel in the two sums, and their digits with it.
    with torch.no_grad():
        known = torch.ones_like(b) if key_mask is None else key_mask.to(b.dtype)
        offset = (b * known).sum(-1, keepdim=True) / known.sum(-1, keepdim=True).clamp(min=1)
    a, b = a + offset, b - offset
    b, order = b.sort(dim=-1, descending=True)
    with torch.no_grad():
        number = torch.searchsorted(-b, a)  # of keys with a_i + b_j > 0
    sample = torch.arange(g.shape[0], device=g.device)[:, None]
    # The first row, of zeros, is the sum over no keys.
    g = F.pad(g[sample, order], (0, 0, 1, 0))
    b = F.pad(b, (1, 0))[:, :, None]
    sum_g, sum_bg = g.cumsum(dim=1)[sample, number], (b * g).cumsum(dim=1)[sample, number]
    return (a[:, :, None] * sum_g + sum_bg).to(dtype)


def compiling() -> bool:
    """Whether a program for many sizes is being made: compiled, exported or traced."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def _as_head(rows: Tensor, width: int) -> Tensor:
    """(N, P, D) -> (N, 1, P, width), filled up with zeros."""
    if rows.shape[-1] < width:
        rows = F.pad(rows, (0, width - rows.shape[-1]))
    return rows[:, None].contiguous()


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Let products be computed in the dtype that they are given."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device):  # "meta", where FLOPs are counted
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _scale(theta: Tensor) -> float:
    # A number even where sizes are traced, as float32 tensors: D belongs to the weights.
    return int(theta.shape[-1]) ** -0.5

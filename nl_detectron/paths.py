"""How the sums of the non-local operation are computed: functions from rows to rows.

:mod:`nl_detectron.ops` says what is computed and chooses among these functions. A "pair" is a query
and a key: other implementations build the matrix of all pairs, most of these functions avoid it.

Shapes: N batch, Q queries, K keys, D inner width of theta and phi, E width of g.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Pairs per block in blocked_softmax_sum: 20 MB in float32. With fewer, matrix products are too
# narrow to be fast.
BLOCK_PAIRS = 5 * 2**20

# Products of at least this many numbers per sample are computed as convolutions in these dtypes.
MIN_CONVOLVED_PAIRS = 2**16
CONVOLVED_DTYPES = (torch.float32,)

# Larger affinities are not left rounded to bfloat16.
MAX_ROUNDED_AFFINITY = 8.0


def softmax(theta: Tensor, phi: Tensor, scale: bool, key_mask: Tensor | None) -> Tensor:
    """softmax_j(theta_i . phi_j), (N, Q, K) in at least float32.

    Here and below, samples without keys get the softmax over all of them: with g = 0, y is 0.
    """
    # Unscaled products of half-precision features exceed 65504 in a healthy training, so the
    # product is computed in float32, not only the softmax.
    with no_autocast(theta):
        return _softmax(at_least_float32(theta), at_least_float32(phi), scale, key_mask)


def softmax_sum(
    theta: Tensor, phi: Tensor, g: Tensor, scale: bool, key_mask: Tensor | None
) -> Tensor:
    """sum_j softmax_j(theta_i . phi_j) g_j with the matrix of all pairs.

    On a CPU, rows of bfloat16 are multiplied in bfloat16 (:func:`_bfloat16_affinity`), which
    changes y, to first order, by at most
    2**-7 max |g| (max(MAX_ROUNDED_AFFINITY, 2**-8 max |affinity|) + log K + 1).
    """
    dtype = g.dtype
    with no_autocast(theta):
        theta, phi, g = _operands(theta, phi, g)
        if _by_convolution(theta, phi) and len(g) > 1:  # one sample at a time
            masks = None if key_mask is None else key_mask.split(1)
            y = [
                softmax_sum(*rows, scale, masks and masks[n])
                for n, rows in enumerate(zip(theta.split(1), phi.split(1), g.split(1)))
            ]
            return torch.cat(y).to(dtype)
        return product(_softmax(theta, phi, scale, key_mask), g.mT).to(dtype)


def blocked_softmax_sum(
    theta: Tensor, phi: Tensor, g: Tensor, scale: bool, key_mask: Tensor | None
) -> Tensor:
    """:func:`softmax_sum`, a block of queries at a time. No second derivative.

    A loop over blocks cannot be compiled or traced for many sizes: :func:`fused_softmax_sum`
    replaces it there.
    """
    if compiling():
        return fused_softmax_sum(theta, phi, g, scale, key_mask)
    dtype = g.dtype
    with no_autocast(theta):
        theta, phi, g = _operands(theta, phi, g)
        if scale and phi.dtype != torch.bfloat16:  # once, not once a block
            phi, scale = _scale(theta) * phi, False
        return _BlockedSoftmaxSum.apply(theta, phi, g, scale, key_mask).to(dtype)


class _BlockedSoftmaxSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, theta: Tensor, phi: Tensor, g: Tensor, scale: bool, key_mask: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(theta, phi, g, key_mask)
        ctx.scale = scale
        # One tensor for all results: small ones allocated between the blocks fragment the heap.
        y = g.new_empty(*theta.shape[:2], g.shape[2])
        values = g.mT.contiguous()  # once, not once a block
        for n, rows, mask in _blocks(theta, phi, key_mask):
            y[n, rows] = product(_softmax(theta[n, rows], phi[n], scale, mask), values[n])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("path 'blocked' has no second derivative; path 'naive' has one")
        theta, phi, g, key_mask = ctx.saved_tensors
        d_theta = torch.empty_like(theta)
        # At least float32: the sums of many blocks would lose digits.
        d_phi, d_g = (torch.zeros_like(at_least_float32(t)) for t in (phi, g))
        with no_autocast(theta):  # which may be on for backward passes too
            for n, rows, mask in _blocks(theta, phi, key_mask):
                queries, keys = (t.detach().requires_grad_() for t in (theta[n, rows], phi[n]))
                with torch.enable_grad():
                    p = _softmax(queries, keys, ctx.scale, mask)
                d_p = product(dy[n, rows], g[n])
                d_theta[n, rows], d_phi_block = torch.autograd.grad(p, (queries, keys), d_p)
                d_phi[n] += d_phi_block
                d_g[n] += p.detach().mT @ dy[n, rows]
        return d_theta, d_phi.to(phi.dtype), d_g.to(g.dtype), None, None


def _blocks(
    theta: Tensor, phi: Tensor, key_mask: Tensor | None
) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Yield slices of samples and of queries, and the samples' mask."""
    (samples, queries), pairs = theta.shape[:2], max(theta.shape[1] * phi.shape[1], 1)
    samples_step = max(BLOCK_PAIRS // pairs, 1)
    queries_step = max(math.ceil(queries / math.ceil(pairs / BLOCK_PAIRS)), 1)
    for first in range(0, samples, samples_step):
        n = slice(first, first + samples_step)
        mask = None if key_mask is None else key_mask[n]
        for start in range(0, queries, queries_step):
            yield n, slice(start, start + queries_step), mask


def _softmax(theta: Tensor, phi: Tensor, scale: bool, key_mask: Tensor | None) -> Tensor:
    """softmax_j(theta_i . phi_j) in the dtype of its operands."""
    factor = _scale(theta) if scale else 1.0
    hidden = None if key_mask is None else ~_never_empty(key_mask)[:, None, :]
    if theta.dtype == torch.bfloat16:
        return _bfloat16_affinity(theta, phi, factor, hidden).softmax(dim=-1)
    affinity = product(theta, factor * phi if scale else phi)
    if hidden is not None:
        affinity.masked_fill_(hidden, float("-inf"))
    return affinity.softmax(dim=-1)


def _bfloat16_affinity(theta: Tensor, phi: Tensor, factor: float, hidden: Tensor | None) -> Tensor:
    """factor * theta_i . phi_j in bfloat16, less a number per query where it is large.

    Rounding an affinity a to bfloat16 changes its weight p by up to 2**-8 |a| p. Where affinities
    are large, they are computed again, less the largest of their query: products are summed in
    float32, so only the difference t is rounded, and the sum over keys of t p is at most log K.
    """

    def affinity(offset: Tensor, beta: int) -> Tensor:
        a = torch.baddbmm(offset, theta, phi.mT, beta=beta, alpha=factor)
        return a if hidden is None else a.masked_fill_(hidden, float("-inf"))

    rounded = affinity(theta.new_empty(1, 1, 1), 0)
    if not rounded.numel():
        return rounded
    largest = rounded.detach().amax(dim=-1, keepdim=True)
    return affinity(largest, -1) if largest.abs().max() > MAX_ROUNDED_AFFINITY else rounded


def product(rows: Tensor, others: Tensor) -> Tensor:
    """rows (N, P, D) times the transpose of others (N, R, D): (N, P, R).

    On a CPU, a float32 convolution, which is oneDNN's, takes down to half the time of BLAS.
    """
    if not _by_convolution(rows, others) or len(rows) > 1:
        return rows @ others.mT
    others = others[0].contiguous()  # strided weights make a convolution slower than a copy does
    # Strides of new axes are those of a channels-last map, so that the result is one, too.
    x = rows[0][None, None].permute(0, 3, 1, 2)
    return F.conv2d(x, others[:, :, None, None])[:, :, 0].mT


def _by_convolution(rows: Tensor, others: Tensor) -> bool:
    return (
        not compiling()
        and rows.is_cpu
        and rows.dtype in CONVOLVED_DTYPES
        and rows.shape[1] * others.shape[1] >= MIN_CONVOLVED_PAIRS
    )


def operand_dtype(*rows: Tensor) -> torch.dtype:
    """The dtype in which rows are multiplied: float64, float32 or, on a CPU, bfloat16.

    Instructions sum bfloat16 in float32. A program for many sizes is one for float32.
    """
    dtype = functools.reduce(torch.promote_types, [t.dtype for t in rows])
    lean = dtype == torch.bfloat16 and rows[0].is_cpu and not compiling()
    return dtype if dtype == torch.float64 or lean else torch.float32


def _operands(*rows: Tensor) -> list[Tensor]:
    dtype = operand_dtype(*rows)
    return [t.to(dtype) for t in rows]


def fused_softmax_sum(
    theta: Tensor, phi: Tensor, g: Tensor, scale: bool, key_mask: Tensor | None
) -> Tensor:
    """:func:`softmax_sum` by PyTorch's scaled_dot_product_attention. No second derivative.

    The gradients of theta and phi have an absolute error of about eps |dy_i| |y_i| |phi_j| (or
    |theta_i|), because the kernels subtract dy . y where sum p dp would cancel. Where one key has
    nearly all the weight, the exact gradients are far smaller than that.

    The kernel on a CPU is PyTorch's flash attention, of any width, if all widths are equal and rows
    contiguous (otherwise PyTorch silently builds the matrix of all pairs). On CUDA it is flash
    attention in half precision up to width 256, else the memory-efficient kernel, which takes any
    width; float64 gets the matrix.
    """
    factor = _scale(theta) if scale else 1.0
    width = max(theta.shape[-1], g.shape[-1])
    dtype = torch.promote_types(torch.promote_types(theta.dtype, phi.dtype), g.dtype)
    if key_mask is not None:
        key_mask = _never_empty(key_mask)[:, None, None, :]
    query, key, value = (_as_head(t.to(dtype), width) for t in (theta, phi, g))
    with no_autocast(theta):
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=key_mask, scale=factor)
    return y[:, 0, :, : g.shape[-1]].to(g.dtype)


def relu_sum(a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    """sum_j ReLU(a_i + b_j) g_j of a (N, Q), b (N, K), g (N, K, E) with the matrix of all pairs."""
    return (a[:, :, None] + b[:, None, :]).relu() @ g


def sorted_relu_sum(a: Tensor, b: Tensor, g: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """:func:`relu_sum` in O((Q + K) (log K + E)).

    With keys in descending order of b, those with a_i + b_j > 0 come first. Over them, the sum is
    a_i times the sum of g_j, plus the sum of b_j g_j: two prefix sums serve every query.

    Args:
        a: (N, Q).
        b: (N, K).
        g: (N, K, E), 0 for keys that are masked out.
        key_mask: (N, K) bool, True for the keys to sum over.
    """
    dtype = g.dtype
    a, b, g = at_least_float32(a), at_least_float32(b), at_least_float32(g)
    # A common offset of b, undone by a, would cancel between the two sums and cost digits.
    with torch.no_grad():
        known = torch.ones_like(b) if key_mask is None else key_mask.to(b.dtype)
        offset = (b * known).sum(-1, keepdim=True) / known.sum(-1, keepdim=True).clamp(min=1)
    a, b = a + offset, b - offset
    b, order = b.sort(dim=-1, descending=True)
    with torch.no_grad():
        number = torch.searchsorted(-b, a)  # of keys with a_i + b_j > 0
    sample = torch.arange(g.shape[0], device=g.device)[:, None]
    # The row of zeros in front is the sum over no keys.
    g = F.pad(g[sample, order], (0, 0, 1, 0))
    b = F.pad(b, (1, 0))[:, :, None]
    sum_g, sum_bg = g.cumsum(dim=1)[sample, number], (b * g).cumsum(dim=1)[sample, number]
    return (a[:, :, None] * sum_g + sum_bg).to(dtype)


def compiling() -> bool:
    """Whether a program for many sizes is being compiled, exported or traced."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def _never_empty(key_mask: Tensor) -> Tensor:
    """The mask, but all keys instead of none, over which a softmax is nan."""
    return key_mask | ~key_mask.any(dim=-1, keepdim=True)


def _as_head(rows: Tensor, width: int) -> Tensor:
    """(N, P, D) -> (N, 1, P, width), padded with zeros."""
    if rows.shape[-1] < width:
        rows = F.pad(rows, (0, width - rows.shape[-1]))
    return rows[:, None].contiguous()


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Turn autocast off, so that products are computed in the dtype of their operands."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device):  # "meta", where FLOPs are counted
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _scale(theta: Tensor) -> float:
    # int(), because a trace turns sizes into float32 tensors, and D is fixed by the weights.
    return int(theta.shape[-1]) ** -0.5

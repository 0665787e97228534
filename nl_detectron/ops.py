"""The non-local operation, y_i = 1/C(x) sum_j f(x_i, x_j) g(x_j), in the paper's four forms of f.

Positions are rows, as the paper writes them: ``theta`` holds theta(x_i) for
each query i, ``phi`` and ``g`` hold phi(x_j) and g(x_j) for each key j. Transposed views of a
channels-first map serve as well as copies. One function per form computes y; :func:`attention`
gives the explicit matrix f / C(x), for pictures and for tests.

Shapes: N batch, Q queries, K keys, D inner width of theta and phi, E width of g.

Paper: `Non-local Neural Networks`, Sec. 3.2, https://arxiv.org/abs/1711.07971
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

PAIRWISE = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")


def gaussian(theta: Tensor, phi: Tensor, g: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
    """Non-local operation with f = exp(x_i . x_j), C(x) = sum_j f: a softmax over the keys (Eq. 2).

    The form has no embedding: ``theta`` and ``phi`` are the features x themselves.

    Args:
        theta: queries, (N, Q, D).
        phi: keys, (N, K, D).
        g: values, (N, K, E).
        key_mask: (N, K) bool, True for the keys that take part. Without any, y is 0.

    Returns:
        (N, Q, E), dtype of ``g``.
    """
    return embedded_gaussian(theta, phi, g, scale=False, key_mask=key_mask)


def embedded_gaussian(
    theta: Tensor, phi: Tensor, g: Tensor, *, scale: bool = True, key_mask: Tensor | None = None
) -> Tensor:
    """Non-local operation with f = exp(theta_i . phi_j), C(x) = sum_j f (Eq. 3).

    Args:
        theta: queries, (N, Q, D).
        phi: keys, (N, K, D).
        g: values, (N, K, E).
        scale: multiply the affinity by D ** -0.5. Not in the paper; in every released config of it.
        key_mask: (N, K) bool, True for the keys that take part. Without any, y is 0.

    Returns:
        (N, Q, E), dtype of ``g``.
    """
    if key_mask is not None:
        g = g.masked_fill(~key_mask[:, :, None], 0.0)  # for the sake of inf and nan: 0 * nan is nan
    return _softmax_attention(theta, phi, scale, key_mask).to(g.dtype) @ g


def dot_product(theta: Tensor, phi: Tensor, g: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
    """Non-local operation with f = theta_i . phi_j, C(x) = number of keys (Eq. 4).

    f is linear in theta, so theta (phi^T g) is the same sum without a Q x K matrix; the cheaper of
    the two orders is taken.

    Args:
        theta: queries, (N, Q, D).
        phi: keys, (N, K, D).
        g: values, (N, K, E).
        key_mask: (N, K) bool, True for the keys that take part. Without any, y is 0.

    Returns:
        (N, Q, E), dtype of ``g``.
    """
    num_queries, width = theta.shape[-2:]
    num_keys, value_width = g.shape[-2:]
    g = _divided_by_number_of_keys(g, key_mask)
    affinity_first = num_queries * num_keys * (width + value_width)
    keys_first = (num_queries + num_keys) * width * value_width
    if keys_first <= affinity_first:
        return theta @ (phi.transpose(-2, -1) @ g)
    return (theta @ phi.transpose(-2, -1)) @ g


def concatenation(
    theta: Tensor, phi: Tensor, g: Tensor, w_f: Tensor, *, key_mask: Tensor | None = None
) -> Tensor:
    """Non-local operation with f = ReLU(w_f^T [theta_i, phi_j]), C(x) = number of keys (Eq. 5).

    w_f^T [theta_i, phi_j] is a sum of two scalars, one per query and one per key, so the pairs need
    Q x K floats, not the 2D x Q x K of a literal concatenation.

    Args:
        theta: queries, (N, Q, D).
        phi: keys, (N, K, D).
        g: values, (N, K, E).
        w_f: (2D,), the weights of theta first.
        key_mask: (N, K) bool, True for the keys that take part. Without any, y is 0.

    Returns:
        (N, Q, E), dtype of ``g``.
    """
    return _concatenation_affinity(theta, phi, w_f) @ _divided_by_number_of_keys(g, key_mask)


def attention(
    theta: Tensor,
    phi: Tensor,
    *,
    pairwise: str,
    scale: bool = True,
    w_f: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """The matrix f(x_i, x_j) / C(x) that the operation multiplies with g, spelt out.

    It holds Q x K floats per sample: 1.1 GB in float32 for an unsampled res3 map of an 800 x 1333
    image.

    Args:
        theta: queries, (N, Q, D).
        phi: keys, (N, K, D).
        pairwise: one of :data:`PAIRWISE`.
        scale: as in :func:`embedded_gaussian`; the other forms have no scale.
        w_f: (2D,), for concatenation only.
        key_mask: (N, K) bool, True for the keys that take part.

    Returns:
        (N, Q, K), at least float32. Rows sum to 1 for the Gaussian forms.

    Raises:
        ValueError: unknown ``pairwise``, or concatenation without ``w_f``.
    """
    if pairwise not in PAIRWISE:
        raise ValueError(f"pairwise must be one of {PAIRWISE}, got {pairwise!r}")
    if pairwise in ("gaussian", "embedded_gaussian"):
        return _softmax_attention(theta, phi, scale and pairwise == "embedded_gaussian", key_mask)
    theta, phi = _at_least_float32(theta), _at_least_float32(phi)
    if pairwise == "dot_product":
        affinity = theta @ phi.transpose(-2, -1)
    elif w_f is None:
        raise ValueError("pairwise 'concatenation' needs w_f, a (2D,) tensor, got None")
    else:
        affinity = _concatenation_affinity(theta, phi, _at_least_float32(w_f))
    one_over_c = _divided_by_number_of_keys(affinity.new_ones(*phi.shape[:-1], 1), key_mask)
    return affinity * one_over_c.transpose(-2, -1)


def _softmax_attention(theta: Tensor, phi: Tensor, scale: bool, key_mask: Tensor | None) -> Tensor:
    # An unscaled product of half-precision features passes 65504 long before training fails, so the
    # product, not only the softmax, is in float32; autocast would put it back.
    device = theta.device.type
    can_autocast = torch.amp.is_autocast_available(device)  # not on "meta", where FLOPs are counted
    with torch.autocast(device, enabled=False) if can_autocast else nullcontext():
        theta, phi = _at_least_float32(theta), _at_least_float32(phi)
        if scale:
            theta = theta * theta.shape[-1] ** -0.5
        affinity = theta @ phi.transpose(-2, -1)
        if key_mask is None:
            return affinity.softmax(dim=-1)
        rows_without_keys = ~key_mask.any(dim=-1)[:, None, None]
        affinity = affinity.masked_fill(~key_mask[:, None, :], float("-inf"))
        return affinity.softmax(dim=-1).masked_fill(rows_without_keys, 0.0)


def _concatenation_affinity(theta: Tensor, phi: Tensor, w_f: Tensor) -> Tensor:
    width = theta.shape[-1]
    a, b = theta @ w_f[:width], phi @ w_f[width:]
    return (a[:, :, None] + b[:, None, :]).relu()


def _divided_by_number_of_keys(g: Tensor, key_mask: Tensor | None) -> Tensor:
    # 1/C goes into g, before the sum over keys: in half precision the bare sum may overflow.
    if key_mask is None:
        return g / max(g.shape[-2], 1)
    number_of_keys = key_mask.sum(dim=-1).clamp(min=1)
    return g.masked_fill(~key_mask[:, :, None], 0.0) / number_of_keys[:, None, None].to(g.dtype)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()

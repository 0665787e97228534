"""The non-local operation, y_i = 1/C(x) sum_j f(x_i, x_j) g(x_j), in the paper's four forms of f.

Positions are rows, as in the paper: ``theta`` holds theta(x_i) for each query i, ``phi`` and ``g``
hold phi(x_j) and g(x_j) for each key j. Transposed views of a channels-first map are as good as
copies. One function per form computes y; :func:`attention` computes the matrix f / C(x) itself, for
figures and tests.

Each form has several paths to the same sum (:data:`PATHS`): "naive" computes the Q x K matrix,
the others never hold it. :func:`choose_path` chooses.

===========  ========================  =============================================================
linear       dot_product               theta (phi^T g), O((Q + K) D E)
sorted       concatenation             prefix sums over sorted keys, O(K log K + (Q + K) E)
fused        the two Gaussian forms    ``torch.nn.functional.scaled_dot_product_attention``
blocked      the two Gaussian forms    a block of queries at a time
===========  ========================  =============================================================

"fused" and "blocked" have no second derivative. Of half precision, sums and softmax are in float32.
On a CPU, products of bfloat16 stay in bfloat16, within a bound (:func:`.paths.softmax_sum`).

Shapes: N batch, Q queries, K keys, D inner width of theta and phi, E width of g.

Paper: `Non-local Neural Networks`, Sec. 3.2, https://arxiv.org/abs/1711.07971
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from nl_detectron import paths

PAIRWISE = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
PATHS = {
    "gaussian": ("naive", "blocked", "fused"),
    "embedded_gaussian": ("naive", "blocked", "fused"),
    "dot_product": ("naive", "linear"),
    "concatenation": ("naive", "sorted"),
}

# A matrix of this many pairs (1 MB in float32) stays in a core's cache: "naive" is fastest.
MAX_NAIVE_PAIRS = 2**18

# Of the Gaussian forms, by device, dtype of the products and whether gradients are needed: up to
# how many pairs per sample "naive" is fastest, and the path beyond. Measured by
#     python dev/benchmark_non_local.py --pairwise embedded_gaussian --dtype float32 bfloat16
# except on CUDA, where PyTorch documents kernels for what is not float64. "blocked" takes a third
# more products in the backward pass, so for gradients, a res4 map of an image is still "naive".
GAUSSIAN_PATHS = {
    ("cpu", torch.float32, False): (5 * 2**20, "blocked"),
    ("cpu", torch.float32, True): (5 * 2**22, "blocked"),
    ("cpu", torch.bfloat16, False): (2**23, "blocked"),
    ("cpu", torch.bfloat16, True): (5 * 2**22, "blocked"),
    ("cuda", torch.float32, False): (0, "fused"),
    ("cuda", torch.float32, True): (0, "fused"),
}


def gaussian(
    theta: Tensor,
    phi: Tensor,
    g: Tensor,
    *,
    key_mask: Tensor | None = None,
    path: str | None = None,
) -> Tensor:
    """Non-local operation with f = exp(x_i . x_j), C(x) = sum_j f: a softmax over the keys (Eq. 2).

    There is no embedding: ``theta`` and ``phi`` are the features x themselves.

    Args:
        theta: queries, (N, Q, D).
        phi: keys, (N, K, D).
        g: values, (N, K, E).
        key_mask: (N, K) bool, True for the keys to sum over. If there are none, y is 0.
        path: one of :data:`PATHS` of the form; None lets :func:`choose_path` choose.

    Returns:
        (N, Q, E), dtype of ``g``.

    Raises:
        ValueError: unknown ``path``.
    """
    return embedded_gaussian(theta, phi, g, scale=False, key_mask=key_mask, path=path)


def embedded_gaussian(
    theta: Tensor,
    phi: Tensor,
    g: Tensor,
    *,
    scale: bool = True,
    key_mask: Tensor | None = None,
    path: str | None = None,
) -> Tensor:
    """Non-local operation with f = exp(theta_i . phi_j), C(x) = sum_j f (Eq. 3).

    As :func:`gaussian`; ``scale`` multiplies the affinity by D ** -0.5, which is not in the paper,
    but in every released config of it.
    """
    path = choose_path("embedded_gaussian", theta, phi, g, scale, path)
    phi, g = _zero_masked(key_mask, phi, g)
    compute = {
        "naive": paths.softmax_sum,
        "blocked": paths.blocked_softmax_sum,
        "fused": paths.fused_softmax_sum,
    }[path]
    return compute(theta, phi, g, scale, key_mask)


def dot_product(
    theta: Tensor,
    phi: Tensor,
    g: Tensor,
    *,
    key_mask: Tensor | None = None,
    path: str | None = None,
) -> Tensor:
    """Non-local operation with f = theta_i . phi_j, C(x) = number of keys (Eq. 4).

    As :func:`gaussian`. f is linear in theta, so theta (phi^T g) is the same sum without a Q x K
    matrix.
    """
    path = choose_path("dot_product", theta, phi, g, path=path)
    phi, g = _zero_masked(key_mask, phi, g)
    dtype = g.dtype
    with paths.no_autocast(theta):
        theta, phi, g = _in_one_dtype(theta, phi, g)
        g = g / _number_of_keys(g, key_mask)
        if path == "linear":
            y = paths.product(theta, g.mT @ phi)
        else:
            y = paths.product(paths.product(theta, phi), g.mT)
    return y.to(dtype)


def concatenation(
    theta: Tensor,
    phi: Tensor,
    g: Tensor,
    w_f: Tensor,
    *,
    key_mask: Tensor | None = None,
    path: str | None = None,
) -> Tensor:
    """Non-local operation with f = ReLU(w_f^T [theta_i, phi_j]), C(x) = number of keys (Eq. 5).

    As :func:`gaussian`; ``w_f`` (2D,) holds the weights of theta, then those of phi, so that
    w_f^T [theta_i, phi_j] is a sum of two scalars, one per query and one per key.
    """
    path = choose_path("concatenation", theta, phi, g, path=path)
    phi, g = _zero_masked(key_mask, phi, g)
    dtype = g.dtype
    with paths.no_autocast(theta):
        theta, phi, g, w_f = _in_one_dtype(theta, phi, g, w_f)
        g = g / _number_of_keys(g, key_mask)
        a, b = _concatenation_terms(theta, phi, w_f)
        if path == "sorted":
            y = paths.sorted_relu_sum(a, b, g, key_mask)
        else:
            y = paths.relu_sum(a, b, g)
    return y.to(dtype)


def choose_path(
    pairwise: str,
    theta: Tensor,
    phi: Tensor,
    g: Tensor,
    scale: bool = True,
    path: str | None = None,
) -> str:
    """The path that an operation takes, one of ``PATHS[pairwise]``.

    A program that is compiled, exported or traced serves many sizes: there the choice does not
    depend on Q and K.

    Args:
        pairwise: one of :data:`PAIRWISE`.
        theta: as given to the operation.
        phi: likewise.
        g: likewise.
        scale: as in :func:`embedded_gaussian`; the other forms have no scale.
        path: the path to take, which is checked and returned; None to choose one.

    Raises:
        ValueError: unknown ``path``.
    """
    if path is not None:
        if path not in PATHS[pairwise]:
            hint = "; 'textbook' is now called 'naive'" if path == "textbook" else ""
            allowed = f"path must be one of {PATHS[pairwise]} for {pairwise}"
            raise ValueError(f"{allowed}, got {path!r}{hint}")
        return path
    (_, queries, width), (_, keys, value_width) = theta.shape, g.shape
    if pairwise == "dot_product":
        multiplications = (queries + keys) * width * value_width
        if paths.compiling() or multiplications <= queries * keys * (width + value_width):
            return "linear"
        return "naive"
    if pairwise == "concatenation":
        if paths.compiling() or queries * keys > MAX_NAIVE_PAIRS:
            return "sorted"
        return "naive"
    if paths.compiling():
        return "fused"
    gradient = torch.is_grad_enabled() and (
        theta.requires_grad or phi.requires_grad or g.requires_grad
    )
    key = theta.device.type, paths.operand_dtype(theta, phi, g), gradient
    most, large = GAUSSIAN_PATHS.get(key, (MAX_NAIVE_PAIRS, "blocked"))
    # Where a softmax saturates, as an unscaled one does, the gradients of "fused" are inexact.
    if large == "fused" and gradient and not (scale and pairwise == "embedded_gaussian"):
        most, large = MAX_NAIVE_PAIRS, "blocked"
    return "naive" if queries * keys <= most else large


def attention(
    theta: Tensor,
    phi: Tensor,
    *,
    pairwise: str,
    scale: bool = True,
    w_f: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """The matrix f(x_i, x_j) / C(x) by which the operation multiplies g.

    It has Q x K floats per sample: 1.1 GB in float32 for a res3 map of an 800 x 1333 image, without
    subsampling.

    Args:
        theta: queries, (N, Q, D).
        phi: keys, (N, K, D).
        pairwise: one of :data:`PAIRWISE`.
        scale: as in :func:`embedded_gaussian`; the other forms have no scale.
        w_f: (2D,), for concatenation only.
        key_mask: (N, K) bool, True for the keys to sum over.

    Returns:
        (N, Q, K), at least float32. Rows sum to 1 for the Gaussian forms.

    Raises:
        ValueError: unknown ``pairwise``, or concatenation without ``w_f``.
    """
    if pairwise not in PAIRWISE:
        raise ValueError(f"pairwise must be one of {PAIRWISE}, got {pairwise!r}")
    if pairwise in ("gaussian", "embedded_gaussian"):
        scaled = scale and pairwise == "embedded_gaussian"
        weights = paths.softmax(theta, phi, scaled, key_mask)
        return weights if key_mask is None else weights.masked_fill(~key_mask[:, None, :], 0.0)
    theta, phi = paths.at_least_float32(theta), paths.at_least_float32(phi)
    with paths.no_autocast(theta):
        if pairwise == "dot_product":
            affinity = theta @ phi.transpose(-2, -1)
        elif w_f is None:
            raise ValueError("pairwise 'concatenation' needs w_f, a (2D,) tensor, got None")
        else:
            a, b = _concatenation_terms(theta, phi, paths.at_least_float32(w_f))
            affinity = (a[:, :, None] + b[:, None, :]).relu()
    if key_mask is not None:
        affinity = affinity.masked_fill(~key_mask[:, None, :], 0.0)
    return affinity / _number_of_keys(phi, key_mask)


def _concatenation_terms(theta: Tensor, phi: Tensor, w_f: Tensor) -> tuple[Tensor, Tensor]:
    """Return a (N, Q) and b (N, K) of w_f^T [theta_i, phi_j] = a_i + b_j."""
    w_theta, w_phi = w_f[:, None].split([theta.shape[-1], phi.shape[-1]])
    return (theta @ w_theta)[..., 0], (phi @ w_phi)[..., 0]


def _in_one_dtype(*tensors: Tensor) -> list[Tensor]:
    """Promote to one dtype, float16 to float32.

    Sums over thousands of positions overflow float16, and the weight of each in a mean underflows;
    the same goes for the sums over queries in the backward pass.
    """
    dtype = functools.reduce(torch.promote_types, [t.dtype for t in tensors])
    dtype = torch.float32 if dtype == torch.float16 else dtype
    return [t.to(dtype) for t in tensors]


def _zero_masked(key_mask: Tensor | None, *keys: Tensor) -> tuple[Tensor, ...]:
    """Set keys that are masked out to zero: an inf or nan there would survive a weight of 0."""
    if key_mask is None:
        return keys
    return tuple(rows.masked_fill(~key_mask[:, :, None], 0.0) for rows in keys)


def _number_of_keys(keys: Tensor, key_mask: Tensor | None) -> Tensor | int:
    """C(x) of the forms without a softmax, at least 1; a number, or one per sample, (N, 1, 1)."""
    if key_mask is None:
        return max(keys.shape[1], 1)
    return key_mask.sum(dim=-1).clamp(min=1)[:, None, None].to(keys.dtype)

"""The paths: their results, precision and memory, and which one is chosen."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nl_detectron import ops, paths
from tests import oracles
from tests.test_ops import FORMS, operate, sample

LEAN = [(p, path) for p, names in ops.PATHS.items() for path in names if path != "naive"]


@settings(deadline=None, max_examples=75, derandomize=True)
@given(
    form=st.sampled_from(FORMS),
    shape=st.tuples(
        *[st.integers(low, high) for low, high in [(0, 3), (0, 9), (0, 9), (1, 5), (1, 5)]]
    ),
    size=st.sampled_from([1e-30, 1e-3, 1.0, 1e3, 1e15]),
    integers=st.booleans(),
    mask=st.booleans(),
    seed=st.integers(0, 999),
)
def test_every_path(form, shape, size, integers, mask, seed):
    torch.manual_seed(seed)
    args = sample(*shape)
    if integers:  # many equal scores, and many a_i + b_j that are 0
        args = [t.round() for t in args]
    args = [size * t for t in args]
    key_mask = torch.rand(args[1].shape[:2]) > 0.5 if mask else None
    pairwise, scale, _ = form
    y = operate(form, *args, key_mask)
    theta, phi, g, w_f = args
    if size == 1e15 and pairwise in ("gaussian", "embedded_gaussian"):
        # Rounding decides which key wins, but the mean that a softmax gives stays one.
        return assert_close(y, y.clamp(-g.abs().max(), g.abs().max()) if g.numel() else y)
    expected = oracles.plain_operation(theta, phi, g, pairwise, scale, w_f, key_mask)
    # Terms may cancel: what counts is the size of the largest. Logits of the Gaussian forms grow
    # with the square of the features, and so does the error of the softmax.
    theta, phi, g, w_f = (t.abs() for t in args)
    largest = oracles.plain_operation(theta, phi, g, pairwise, scale, w_f, key_mask)
    tolerance = 1e-12 * largest.max().item() if largest.numel() else 0.0
    assert_close(y, expected, rtol=1e-9, atol=tolerance)


def outputs_and_gradients(function, *args):
    *args, dy = args
    args = [t.detach().requires_grad_() for t in args]
    y = function(*args)
    return y, *torch.autograd.grad(y, args, dy)


def plain_relu_sum(a, b, g):
    return torch.cat([(rows[..., None] + b[:, None]).relu() @ g for rows in a.split(999, dim=1)], 1)


@pytest.mark.parametrize(
    "b", [[-3.0, -2.0, -5.0], [2.0, 2.0, 2.0], [1.0, -1.0, 1.0], [0.5]], ids=str
)
def test_sorted_with_equal_and_inactive_scores(b):
    a, b = torch.tensor([[-1.0, 0.0, 1.0, -2.0]]).double(), torch.tensor([b]).double()
    args = a, b, torch.randn(1, b.shape[1], 3).double(), torch.randn(1, 4, 3).double()
    got = outputs_and_gradients(paths.sorted_relu_sum, *args)
    assert_close(got, outputs_and_gradients(plain_relu_sum, *args))


@pytest.mark.parametrize("masked", [False, True], ids=["all keys", "half of the keys"])
@pytest.mark.parametrize("offset", [0.0, 100.0, 1000.0])
def test_sorted_is_precise_in_float32(offset, masked):
    keys = 4201
    a, b = torch.randn(1, 2000) - offset, torch.randn(1, keys) + offset
    g, dy = torch.randn(1, keys, 8), torch.randn(1, 2000, 8)
    mask = torch.rand(1, keys) < 0.5 if masked else None
    if masked:
        b, g = b.masked_fill(~mask, 0.0), g.masked_fill(~mask[..., None], 0.0)

    def function(a, b, g):
        return paths.sorted_relu_sum(a, b, g, mask)

    got = outputs_and_gradients(function, a, b, g, dy)
    exact = outputs_and_gradients(plain_relu_sum, *(t.double() for t in (a, b, g, dy)))
    if masked:  # keys that do not take part have no gradient to compare
        got = [*got[:3], got[3].masked_fill(~mask[..., None], 0.0)]
        exact = [*exact[:3], exact[3].masked_fill(~mask[..., None], 0.0)]
    for t, truth in zip(got, exact):
        assert (t - truth).abs().max() < 2e-6 * truth.abs().max()


def test_concatenation_tells_sorted_which_keys_take_part():
    theta, phi = torch.randn(1, 700, 1) - 1000, torch.randn(1, 900, 1) + 1000
    g, w_f, mask = torch.randn(1, 900, 3), torch.ones(2), torch.rand(1, 900) < 0.5
    got = operate(("concatenation", True, "sorted"), theta, phi, g, w_f, mask)
    args = (t.double() for t in (theta, phi, g))
    exact = oracles.plain_operation(*args, "concatenation", True, w_f.double(), mask)
    assert (got - exact).abs().max() < 2e-6 * exact.abs().max()


# The gaussian form of a map: a position is its own strongest key, and the exact gradients of theta
# and phi vanish. That of g is left.
@pytest.mark.parametrize("least", [1, 2**30], ids=["convolution", "matmul"])
@pytest.mark.parametrize("activation", [1, 4, 16])
@pytest.mark.parametrize("path", ["naive", "blocked", None])
@pytest.mark.parametrize("pairwise", ["gaussian", "embedded_gaussian"])
def test_gradients_where_the_softmax_saturates(pairwise, path, activation, least, monkeypatch):
    monkeypatch.setattr(paths, "MIN_CONVOLVED_PAIRS", least)
    x, dy = activation * torch.randn(1, 530, 32), torch.randn(1, 530, 32)

    def function(x):
        return operate((pairwise, True, path), x, x, x, None)

    def plain(x):
        return oracles.plain_operation(x, x, x, pairwise)

    got = outputs_and_gradients(function, x, dy)
    plainly = outputs_and_gradients(plain, x, dy)
    exact = outputs_and_gradients(plain, x.double(), dy.double())
    # Rounding an affinity to float32 changes the softmax, however it is computed.
    for t, float32, truth in zip(got, plainly, exact):
        bound = 5 * (float32 - truth).abs().max() + 2e-6 * truth.abs().max()
        assert (t - truth).abs().max() <= bound


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any torch operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


def largest(pairwise, path, *shape):
    args = [t.requires_grad_() for t in sample(*shape)]
    with LargestTensor() as recorded:
        operate((pairwise, True, path), *args).sum().backward()
    return recorded.numel


def test_naive_concatenation_holds_pairs_without_their_channels():
    n, q, k = 2, 31, 29
    assert largest("concatenation", "naive", n, q, k, 11, 7) == n * q * k


@pytest.mark.parametrize(("pairwise", "path"), LEAN)
def test_no_tensor_of_all_pairs(pairwise, path, monkeypatch):
    n, q, k, d = 2, 211, 199, 3
    monkeypatch.setattr(paths, "BLOCK_PAIRS", 10 * k)
    assert largest(pairwise, path, n, q, k, d, d) <= 10 * max(q, k) * n


# In a process of its own, because the peak of resident memory never falls.
PEAKS = """
import json, resource, sys, torch
sys.path[:0] = {path!r}
from tests.test_paths import LEAN, operate, sample

def run(pairwise, path, q):
    args = [t.requires_grad_() for t in sample(1, q, q, 16, 16, dtype=torch.float32)]
    operate((pairwise, True, path), *args).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = max(run(*case, 600) for case in LEAN)  # all libraries are loaded now
print(json.dumps([run(*case, 16700) - before for case in [*LEAN, ("concatenation", "naive")]]))
"""


@pytest.mark.slow  # what is allocated is also watched above
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kB on Linux only")
def test_peak_memory():
    code = PEAKS.format(path=sys.path)
    command = [sys.executable, "-W", "ignore", "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    *lean, naive = json.loads(run.stdout)
    matrix = 16700 * 16700 * 4
    assert max(lean) < matrix / 4, dict(zip(LEAN, lean))
    assert naive > matrix  # so that it would be seen


# res4 of an 800 x 1333 image, keys pooled 2 x 2; C = 1024
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(
    ("pairwise", "width"),
    [("gaussian", 1024), ("embedded_gaussian", 512), ("dot_product", 512), ("concatenation", 1)],
)
def test_a_large_map_is_computed_without_a_tensor_of_all_pairs(pairwise, width, gradient):
    theta, phi, g, _ = sample(1, 4200, 1050, width, 512, dtype=torch.float32, device="meta")
    assert ops.choose_path(pairwise, theta.requires_grad_(gradient), phi, g) != "naive"


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("pairwise", ["gaussian", "embedded_gaussian"])
def test_no_path_that_loses_digits_of_the_gradient_is_chosen(pairwise, scale, monkeypatch):
    """On a device whose fused kernels are fastest; on CUDA they are accepted for a scaled form."""
    for gradient in (False, True):
        monkeypatch.setitem(
            ops.GAUSSIAN_PATHS,
            ("meta", torch.float32, gradient),
            ops.GAUSSIAN_PATHS["cuda", torch.float32, gradient],
        )
    accepted = scale and pairwise == "embedded_gaussian"
    theta, phi, g, _ = sample(1, 900, 900, 3, 3, dtype=torch.float32, device="meta")
    for t in (theta, phi, g):
        assert ops.choose_path(pairwise, theta, phi, g, scale) == "fused"
        t.requires_grad_()
        chosen = ops.choose_path(pairwise, theta, phi, g, scale)
        assert chosen == ("fused" if accepted else "blocked")
        with torch.no_grad():
            assert ops.choose_path(pairwise, theta, phi, g, scale) == "fused"
        t.requires_grad_(False)


@pytest.mark.parametrize("shape", [(2, 31, 29, 5, 7), (2, 2, 3, 31, 29), (1, 7, 5, 3, 3)])
def test_dot_product_takes_the_order_with_fewer_multiplications(shape):
    theta, phi, g, w_f = sample(*shape)

    def count(function):
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    orders = [lambda: theta @ (phi.mT @ g), lambda: (theta @ phi.mT) @ g]
    chosen = count(lambda: operate(("dot_product", True, None), theta, phi, g, w_f))
    assert chosen == min(map(count, orders))


KEYS = 16800  # of an unsampled res3 map


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [0.01, 1, 12])
@pytest.mark.parametrize(
    ("pairwise", "path"), [(p, q) for p in ("dot_product", "concatenation") for q in ops.PATHS[p]]
)
def test_float16_with_thousands_of_keys(pairwise, path, size, masked):
    """Sums over keys, and in the backward pass over queries, beyond what float16 can hold."""
    theta, phi, g, _ = (size * t for t in sample(1, 700, KEYS, 16, 16, dtype=torch.float32))
    theta, phi, g = (t.abs().half() for t in (theta, phi, g))  # so that nothing cancels
    w_f, dy = torch.full((32,), 1 / 32).half(), torch.rand(1, 700, 16).half()
    mask = torch.rand(1, KEYS) < 0.5 if masked else None

    def function(theta, phi, g):
        return operate((pairwise, True, path), theta, phi, g, w_f, mask)

    def plain(theta, phi, g):
        return oracles.plain_operation(theta, phi, g, pairwise, True, w_f.double(), mask)

    got = outputs_and_gradients(function, theta, phi, g, dy)
    exact = outputs_and_gradients(plain, *(t.double() for t in (theta, phi, g, dy)))
    for t, truth in zip(got, exact):
        assert t.dtype == torch.float16
        # float16 has a step of 2**-24 around zero
        assert_close(t.double(), truth, rtol=2e-3, atol=2**-24)


def test_more_keys_than_float16_can_count():
    keys = 70_000
    theta, phi = torch.ones(1, 1, 1).half(), torch.ones(1, keys, 1).half()
    mask = torch.ones(1, keys, dtype=torch.bool)
    for pairwise, w_f in (("dot_product", None), ("concatenation", torch.tensor([0.0, 1.0]))):
        w_f = None if w_f is None else w_f.half()
        for path in ops.PATHS[pairwise]:
            y = operate((pairwise, True, path), theta, phi, 3 * phi, w_f, mask)  # all f are 1
            assert_close(y, torch.full((1, 1, 1), 3.0).half())
        weights = ops.attention(theta, phi, pairwise=pairwise, w_f=w_f, key_mask=mask)
        assert_close(weights, torch.full((1, 1, keys), 1 / keys))


@pytest.mark.parametrize("path", ["naive", "blocked"])
@pytest.mark.parametrize("size", [0.5, 2, 8, 30])  # affinities of 2, 40, 600, 9000
def test_bfloat16_stays_within_its_bound(path, size):
    """The bound that softmax_sum states."""
    theta, phi, g, _ = sample(2, 13, 300, 16, 8, dtype=torch.float32)
    theta, phi, g = ((f * t).bfloat16() for f, t in zip((size, size, 1), (theta, phi, g)))
    y = operate(("embedded_gaussian", False, path), theta, phi, g, None)
    theta, phi, g = (t.double() for t in (theta, phi, g))
    exact = oracles.plain_operation(theta, phi, g, "embedded_gaussian", False)
    largest = (theta @ phi.mT).abs().max().item()
    size = max(paths.MAX_ROUNDED_AFFINITY, 2**-8 * largest) + math.log(300) + 1
    error = (y.double() - exact).abs().max().item()
    assert error <= 2**-7 * size * g.abs().max().item()
    # What rounding large affinities would have cost
    if largest > 500:
        rounded = (theta @ phi.mT).bfloat16().double().softmax(-1) @ g
        assert error < 0.1 * (rounded - exact).abs().max().item()


@pytest.mark.parametrize("path", ["naive", "blocked"])
@pytest.mark.parametrize("size", [1, 8])
def test_bfloat16_gradients(path, size):
    """Not further from those of float64 than plain products of bfloat16 are."""
    theta, phi, g, _ = sample(1, 130, 300, 64, 32, dtype=torch.float32)
    args = [(f * t).bfloat16() for f, t in zip((size, size, 1), (theta, phi, g))]
    args.append(torch.randn(1, 130, 32).bfloat16())

    def function(theta, phi, g):
        return operate(("embedded_gaussian", True, path), theta, phi, g, None)

    def plain(theta, phi, g):
        return (theta @ phi.mT * 64**-0.5).softmax(dim=-1) @ g

    got, plainly = outputs_and_gradients(function, *args), outputs_and_gradients(plain, *args)
    exact = outputs_and_gradients(plain, *(t.double() for t in args))
    for t, bfloat16, truth in zip(got, plainly, exact):
        assert t.dtype == torch.bfloat16
        assert (t - truth).norm() <= 1.1 * (bfloat16 - truth).norm()
        assert (t - truth).norm() <= 0.02 * truth.norm()


@pytest.mark.parametrize(
    ("dtype", "queries", "keys", "chosen", "chosen_for_gradients"),
    [
        (torch.float32, 3136, 784, "naive", "naive"),  # res3 of 4 frames, pooled
        (torch.float32, 16800, 4200, "blocked", "blocked"),  # res3 of an image, pooled
        (torch.float32, 4200, 4200, "blocked", "naive"),  # res4
        (torch.float16, 16800, 4200, "blocked", "blocked"),
        (torch.bfloat16, 4200, 1050, "naive", "naive"),  # res4 of an image, pooled
        (torch.bfloat16, 16800, 4200, "blocked", "blocked"),
        (torch.float64, 530, 530, "blocked", "blocked"),
    ],
    ids=str,
)
def test_path_by_dtype(dtype, queries, keys, chosen, chosen_for_gradients):
    theta, phi, g, _ = sample(1, queries, keys, 2, 2, dtype=dtype)
    assert ops.choose_path("embedded_gaussian", theta, phi, g) == chosen
    theta.requires_grad_()
    assert ops.choose_path("embedded_gaussian", theta, phi, g) == chosen_for_gradients
    assert ops.choose_path("gaussian", theta, phi, g) == chosen_for_gradients


def test_path_of_a_program_does_not_depend_on_sizes(monkeypatch):
    monkeypatch.setattr(paths, "compiling", lambda: True)
    for pairwise, chosen in zip(ops.PAIRWISE, ("fused", "fused", "linear", "sorted")):
        for size, dtype in itertools.product((2, 900), (torch.float32, torch.bfloat16)):
            rows = sample(1, size, size, 3, 3, dtype=dtype)[:3]
            assert ops.choose_path(pairwise, *rows) == chosen


def test_blocked_backward_pass_within_autocast():
    args = [*sample(1, 130, 170, 32, 16, dtype=torch.float32)[:3], torch.randn(1, 130, 16)]

    def function(theta, phi, g):
        return operate(("embedded_gaussian", True, "blocked"), theta, phi, g, None)

    expected = outputs_and_gradients(function, *args)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(outputs_and_gradients(function, *args), expected)

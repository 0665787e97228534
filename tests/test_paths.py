"""The ways of computing a sum: which is chosen, that they agree, what they hold in memory."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from nl_detectron import ops, paths
from tests.test_ops import operate, sample

LEAN = [(p, path) for p, names in ops.PATHS.items() for path in names if path != "textbook"]


@settings(deadline=None, max_examples=50, derandomize=True)
@given(
    case=st.sampled_from(LEAN),
    shape=st.tuples(
        *[st.integers(low, high) for low, high in [(0, 3), (0, 9), (0, 9), (1, 5), (1, 5)]]
    ),
    size=st.sampled_from([1e-30, 1e-3, 1.0, 1e3, 1e15]),
    integers=st.booleans(),
    mask=st.booleans(),
    seed=st.integers(0, 999),
)
def test_paths_agree(case, shape, size, integers, mask, seed):
    torch.manual_seed(seed)
    args = sample(*shape)
    if integers:  # many equal scores, and many a_i + b_j that are 0
        args = [t.round() for t in args]
    args = [size * t for t in args]
    key_mask = torch.rand(args[1].shape[:2]) > 0.5 if mask else None
    pairwise, path = case
    y = operate((pairwise, True, path), *args, key_mask)
    expected = operate((pairwise, True, "textbook"), *args, key_mask)
    # Terms may cancel: what counts is the size of the largest. Logits of the Gaussian forms grow
    # with the square of the features, and so does the error of the softmax.
    largest = operate((pairwise, True, "textbook"), *(t.abs() for t in args), key_mask)
    tolerance = 1e-12 * largest.max().item() if largest.numel() else 0.0
    if size == 1e15 and pairwise in ("gaussian", "embedded_gaussian"):
        return assert_close(y.isfinite(), expected.isfinite())  # rounding decides which key wins
    assert_close(y, expected, rtol=1e-9, atol=tolerance)


@pytest.mark.parametrize(
    "b", [[-3.0, -2.0, -5.0], [2.0, 2.0, 2.0], [1.0, -1.0, 1.0], [0.5]], ids=str
)
def test_sorted_with_equal_and_inactive_scores(b):
    a, b = torch.tensor([[-1.0, 0.0, 1.0, -2.0]]).double(), torch.tensor([b]).double()
    g = torch.randn(1, b.shape[1], 3).double()
    for t in (a, b, g):
        t.requires_grad_()
    y, expected = paths.sorted_relu_sum(a, b, g), paths.relu_sum(a, b, g)
    assert_close(y, expected)
    dy = torch.randn_like(y)
    assert_close(
        torch.autograd.grad(y, (a, b, g), dy), torch.autograd.grad(expected, (a, b, g), dy)
    )


def test_sorted_is_precise_in_float32():
    a, b, g = torch.randn(1, 16800), torch.randn(1, 16800), torch.randn(1, 16800, 8)
    dy = torch.randn(1, 16800, 8)

    def sums_and_gradients(*args):
        *args, dy = (t.detach().requires_grad_() for t in args)
        y = paths.sorted_relu_sum(*args)
        return y, *torch.autograd.grad(y, args, dy)

    got = sums_and_gradients(a, b, g, dy)
    expected = sums_and_gradients(a.double(), b.double(), g.double(), dy.double())
    for t, exact in zip(got, expected):
        assert (t - exact).abs().max() < 1e-6 * exact.abs().max()


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


def test_textbook_concatenation_holds_pairs_without_their_channels():
    n, q, k = 2, 31, 29
    assert largest("concatenation", "textbook", n, q, k, 11, 7) == n * q * k


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
print(json.dumps([run(*case, 16700) - before for case in [*LEAN, ("concatenation", "textbook")]]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kB on Linux only")
def test_peak_memory():
    code = PEAKS.format(path=sys.path)
    command = [sys.executable, "-W", "ignore", "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    *lean, textbook = json.loads(run.stdout)
    matrix = 16700 * 16700 * 4
    assert max(lean) < matrix / 4, dict(zip(LEAN, lean))
    assert textbook > matrix  # so that it would be seen


@pytest.mark.parametrize(
    ("pairwise", "shape", "path"),
    [
        # res4 of an 800 x 1333 image, keys pooled 2 x 2; C = 1024
        ("embedded_gaussian", (1, 4200, 1050, 512, 512), "fused"),
        ("gaussian", (1, 4200, 1050, 1024, 512), "blocked"),
        ("dot_product", (1, 4200, 1050, 512, 512), "linear"),
        ("concatenation", (1, 4200, 1050, 1, 512), "sorted"),
        # 2**18 pairs of a sample, and some more
        ("embedded_gaussian", (3, 512, 512, 8, 8), "textbook"),
        ("embedded_gaussian", (3, 512, 513, 8, 8), "fused"),
        ("concatenation", (3, 512, 512, 1, 8), "textbook"),
        ("concatenation", (3, 512, 513, 1, 8), "sorted"),
        # keypoint head, 100 RoIs; C = 512
        ("embedded_gaussian", (100, 196, 196, 256, 256), "textbook"),
        ("gaussian", (100, 196, 196, 512, 256), "textbook"),
        ("dot_product", (100, 196, 49, 256, 256), "textbook"),
        ("dot_product", (100, 196, 196, 256, 256), "textbook"),
        ("concatenation", (100, 196, 196, 1, 256), "textbook"),
    ],
)
def test_choice(pairwise, shape, path):
    theta, phi, g, _ = sample(*shape, dtype=torch.float32, device="meta")
    assert ops.choose_path(pairwise, theta, phi, g) == path


@pytest.mark.parametrize("shape", [(2, 31, 29, 5, 7), (2, 2, 3, 31, 29), (1, 7, 5, 3, 3)])
def test_dot_product_takes_the_order_with_fewer_multiplications(shape):
    n, q, k, d, e = shape
    theta, phi, g, _ = sample(*shape)
    linear = n * (k * d * e + q * d * e) <= n * (q * k * d + q * k * e)
    assert ops.choose_path("dot_product", theta, phi, g) == ("linear" if linear else "textbook")

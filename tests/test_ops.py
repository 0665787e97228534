"""The operation against loops, hand calculations, and the identities of its four forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from nl_detectron import ops, paths
from tests import oracles

# (pairwise, scale, path); only one form has a scale
FORMS = [
    (pairwise, scale, path)
    for pairwise, names in ops.PATHS.items()
    for scale in ((True, False) if pairwise == "embedded_gaussian" else (True,))
    for path in names
]
IDS = ["-".join((pairwise, path, *[""] * scale)) for pairwise, scale, path in FORMS]
forms = pytest.mark.parametrize("form", FORMS, ids=IDS)
GAUSSIAN_FORMS = ("gaussian", "embedded_gaussian")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Let the tests' few queries need more than one block, the last one smaller."""
    monkeypatch.setattr(paths, "BLOCK_PAIRS", 2 * 5)


def operate(form, theta, phi, g, w_f, key_mask=None):
    """The package's operation."""
    pairwise, scale, path = form
    args = [theta, phi, g, w_f] if pairwise == "concatenation" else [theta, phi, g]
    options = {"scale": scale} if pairwise == "embedded_gaussian" else {}
    return getattr(ops, pairwise)(*args, key_mask=key_mask, path=path, **options)


def attend(form, theta, phi, w_f, key_mask=None):
    """The package's attention matrix."""
    pairwise, scale, _ = form
    w_f = w_f if pairwise == "concatenation" else None
    return ops.attention(theta, phi, pairwise=pairwise, scale=scale, w_f=w_f, key_mask=key_mask)


def expect(form, theta, phi, g, w_f, key_mask=None):
    """The oracle's operation, in float64."""
    args = (t.double() for t in (theta, phi, g))
    return oracles.operation(*args, *form[:2], w_f=w_f.double(), key_mask=key_mask)


def sample(n=2, q=3, k=5, d=7, e=11, dtype=torch.float64, device="cpu"):
    shapes = [(n, q, d), (n, k, d), (n, k, e), (2 * d,)]
    return [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]


def masked_sample():
    """A sample, and a mask that differs between its two maps."""
    mask = torch.tensor([[True, False, True, True, False], [False, False, False, True, False]])
    return *sample(), mask


# By hand. One query, two keys, f = 1 and 3 or as said; g = 4 and 8.
LN3 = math.log(3)
BY_HAND = {
    # f = exp(0), exp(ln 3); C = 4
    "gaussian": (("gaussian", True), [1], [[0], [LN3]], 1 / 4 * 4 + 3 / 4 * 8),
    # theta . phi = 0, 2 ln 3; D ** -0.5 = 1/2
    "scaled": (
        ("embedded_gaussian", True),
        [1, 1, 1, 1],
        [[0, 0, 0, 0], [2 * LN3, 0, 0, 0]],
        1 / 4 * 4 + 3 / 4 * 8,
    ),
    # f = exp(0), exp(2 ln 3) = 9; C = 10
    "unscaled": (
        ("embedded_gaussian", False),
        [1, 1, 1, 1],
        [[0, 0, 0, 0], [2 * LN3, 0, 0, 0]],
        1 / 10 * 4 + 9 / 10 * 8,
    ),
    # f = 2, 6; C = 2
    "dot_product": (("dot_product", True), [2], [[1], [3]], (2 * 4 + 6 * 8) / 2),
    # w_f = (1, -1): f = relu(2 - 1), relu(2 - 3); C = 2
    "concatenation": (("concatenation", True), [2], [[1], [3]], (1 * 4 + 0 * 8) / 2),
}


@pytest.mark.parametrize(("form", "theta", "phi", "y"), BY_HAND.values(), ids=BY_HAND)
def test_by_hand(form, theta, phi, y):
    theta, phi = torch.tensor([[theta]]).double(), torch.tensor([phi]).double()
    g, w_f = torch.tensor([[[4.0], [8.0]]]).double(), torch.tensor([1.0, -1.0]).double()
    for path in ops.PATHS[form[0]]:
        got = operate((*form, path), theta, phi, g, w_f)
        assert_close(got, torch.tensor([[[y]]]).double())


# The last two make dot_product take one and the other order of its multiplications.
@pytest.mark.parametrize("shape", [(2, 3, 5, 7, 11), (3, 11, 7, 5, 2), (2, 1, 1, 3, 5)])
@forms
def test_oracle(form, shape, device):
    args = sample(*shape, device=device)
    assert_close(operate(form, *args), expect(form, *args))
    y = operate(form, *(t.float() for t in args))
    assert_close(y, expect(form, *args).float(), atol=1e-4, rtol=1e-4)


@forms
def test_masked_keys_are_left_out(form):
    theta, phi, g, w_f, mask = masked_sample()
    y = operate(form, theta, phi, g, w_f, mask)
    assert_close(y, expect(form, theta, phi, g, w_f, mask))
    phi[~mask], g[~mask] = 1e3, -1e3
    assert_close(operate(form, theta, phi, g, w_f, mask), y)
    for n in range(2):
        alone = (theta[n : n + 1], phi[n : n + 1, mask[n]], g[n : n + 1, mask[n]], w_f)
        assert_close(operate(form, *alone), y[n : n + 1])


@forms
def test_masked_keys_are_left_out_of_convolutions(form, monkeypatch):
    """Products that large float32 maps have; here in float64."""
    monkeypatch.setattr(paths, "CONVOLVED_DTYPES", (torch.float64,))
    monkeypatch.setattr(paths, "MIN_CONVOLVED_PAIRS", 1)
    *args, mask = masked_sample()
    assert_close(operate(form, *args, mask), expect(form, *args, mask))


@forms
def test_without_keys_the_response_is_zero(form):
    args = [t.requires_grad_() for t in sample()]
    mask = torch.tensor([[False] * 5, [True] * 5])
    y = operate(form, *args, mask)
    assert_close(y[0], torch.zeros(3, 11).double())
    assert_close(y[1], expect(form, *args)[1])
    y.sum().backward()
    for t in args:
        assert t.grad is None or t.grad.isfinite().all()
    theta, phi, _, w_f = args
    assert not attend(form, theta, phi, w_f, mask)[0].any()


@forms
def test_attention(form):
    theta, phi, g, w_f, mask = masked_sample()
    identity = torch.eye(5, dtype=torch.float64).expand(2, 5, 5)
    attention = attend(form, theta, phi, w_f)
    assert_close(attention, expect(form, theta, phi, identity, w_f))
    assert_close(attention @ g, operate(form, theta, phi, g, w_f))
    masked = attend(form, theta, phi, w_f, mask)
    assert_close(masked, expect(form, theta, phi, identity, w_f, mask))
    if form[0] in GAUSSIAN_FORMS:
        assert_close(attention.sum(-1), torch.ones(2, 3).double())
        assert_close(masked.sum(-1), torch.ones(2, 3).double())


def test_attention_rejects():
    theta, phi, *_ = sample()
    with pytest.raises(ValueError, match="pairwise must be one of .*'dot_product'.* got 'softmax'"):
        ops.attention(theta, phi, pairwise="softmax")
    with pytest.raises(ValueError, match=r"needs w_f, a \(2D,\) tensor, got None"):
        ops.attention(theta, phi, pairwise="concatenation")


@forms
def test_gradients(form):
    args = [t.requires_grad_() for t in sample(2, 3, 5, 2, 3)]
    mask = torch.tensor([[True, False, True, True, False], [False] * 5])
    for key_mask in (None, mask):

        def function(*args, key_mask=key_mask):
            return operate(form, *args, key_mask)

        assert torch.autograd.gradcheck(function, args)
        if form[2] in ("fused", "blocked"):
            message = "derivative .* is not implemented|has no second derivative"
            with pytest.raises(RuntimeError, match=message):
                torch.autograd.gradgradcheck(function, args)
        else:  # f of concatenation has no second derivative, but only where its ReLU bends.
            assert torch.autograd.gradgradcheck(function, args)


@forms
def test_queries_are_equivariant_and_keys_invariant_to_their_order(form):
    theta, phi, g, w_f, mask = masked_sample()
    y = operate(form, theta, phi, g, w_f, mask)
    order = torch.tensor([2, 0, 1])
    assert_close(operate(form, theta[:, order], phi, g, w_f, mask), y[:, order])
    order = torch.tensor([3, 0, 4, 2, 1])
    assert_close(operate(form, theta, phi[:, order], g[:, order], w_f, mask[:, order]), y)


@forms
def test_equal_keys_give_the_mean_of_the_values(form):
    theta, phi, g, w_f = sample()
    phi = phi[:, :1].expand(2, 5, 7)
    y = operate(form, theta, phi, g, w_f)
    # f of the Gaussian forms is normalised; of the others, it is a factor of the mean.
    ones = torch.ones(2, 5, 1, dtype=torch.float64)
    factor = 1 if form[0] in GAUSSIAN_FORMS else expect(form, theta, phi, ones, w_f)
    assert_close(y, factor * g.mean(dim=1, keepdim=True).expand(2, 3, 11))


@forms
def test_non_contiguous_inputs(form):
    args = sample()
    views = [t.transpose(-2, -1).contiguous().transpose(-2, -1) for t in args[:3]]
    assert not any(v.is_contiguous() for v in views)
    w_f = torch.stack([args[3], args[3]], dim=1)[:, 0]
    assert_close(operate(form, *views, w_f), expect(form, *args))


def half_precision_bound(form, theta, phi, g, w_f, eps):
    """What rounding the operands and results of three products to a precision eps may cost.

    Affinities of the Gaussian forms are in float32. The size of a sum is that of its absolute
    terms, since they may cancel.
    """
    theta, phi, g, w_f = (t.double().abs() for t in (theta, phi, g, w_f))
    if form[0] in GAUSSIAN_FORMS:
        float32 = torch.finfo(torch.float32).eps
        exponent = 2 * theta.shape[-1] * float32 * (theta @ phi.transpose(1, 2)).max()
        return (4 * eps + 2 * exponent) * g.max()
    if form[0] == "dot_product":
        f = theta @ phi.transpose(1, 2)
    else:
        d = theta.shape[-1]
        f = (theta @ w_f[:d])[:, :, None] + (phi @ w_f[d:])[:, None, :]
    return 4 * eps * f @ g / g.shape[1]


@pytest.mark.parametrize("factor", [1, 16, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@forms
def test_half_precision(form, dtype, factor, device):
    args = [factor * t for t in sample(2, 13, 17, 64, 31, device=device)]
    args[3] /= factor * 8  # weights do not grow with activations
    args = [t.to(dtype) for t in args]
    y, expected = operate(form, *args), expect(form, *args)
    assert y.dtype == dtype
    largest = torch.finfo(dtype).max
    bound = half_precision_bound(form, *args, torch.finfo(dtype).eps)
    # What is beyond the dtype is infinite, and never nan.
    beyond = expected.abs() > largest + bound
    assert beyond.any() == ((form[0], dtype, factor) == ("dot_product", torch.float16, 256))
    assert torch.equal(y[beyond].double(), expected[beyond].sign() * torch.inf)
    fits = expected.abs() < largest - bound
    error = (y[fits].double() - expected[fits]).abs()
    assert (error <= bound.expand_as(y)[fits]).all()


@pytest.mark.parametrize("factor", [1, 16, 256])
@forms
def test_autocast(form, factor):
    args = [factor * t for t in sample(2, 13, 17, 64, 31, dtype=torch.float32)]
    args[3] /= factor * 8
    with torch.autocast("cpu", torch.bfloat16):
        y = operate(form, *args)
    error = (y.double() - expect(form, *args)).abs()
    bound = half_precision_bound(form, *args, torch.finfo(torch.bfloat16).eps)
    assert (error <= bound).all(), (error / bound).max()


@pytest.mark.parametrize("path", ops.PATHS["gaussian"])
@pytest.mark.parametrize("pairwise", GAUSSIAN_FORMS)
def test_affinity_is_in_float32_under_autocast(pairwise, path):
    theta, phi = torch.ones(1, 1, 1), torch.tensor([[[256.0], [257.0]]])  # bfloat16 has no 257
    y = 1 / (1 + math.e) * 4 + math.e / (1 + math.e) * 8
    with torch.autocast("cpu", torch.bfloat16):
        got = operate((pairwise, True, path), theta, phi, torch.tensor([[[4.0], [8.0]]]), None)
    assert_close(got.float(), torch.tensor([[[y]]]), rtol=2**-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("path", ops.PATHS["gaussian"])
@pytest.mark.parametrize("pairwise", GAUSSIAN_FORMS)
def test_affinity_beyond_float16(pairwise, path, dtype):
    """Of 90,000 and 90,600: the second key has all the weight."""
    theta, phi, g = [[[300.0]]], [[[300.0], [302.0]]], [[[4.0], [8.0]]]
    args = (torch.tensor(t, dtype=dtype) for t in (theta, phi, g))
    assert operate((pairwise, True, path), *args, None).item() == 8


@forms
def test_attention_is_at_least_float32(form):
    theta, phi, _, w_f = sample()
    assert attend(form, theta, phi, w_f).dtype == torch.float64
    theta, phi, w_f = (t.half() for t in (theta, phi, w_f))
    identity = torch.eye(5).expand(2, 5, 5)
    expected = expect(form, theta, phi, identity, w_f).float()
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            attention = attend(form, theta, phi, w_f)
        assert attention.dtype == torch.float32
        assert_close(attention, expected)


@pytest.mark.parametrize("pairwise", ops.PAIRWISE)
def test_unknown_path(pairwise):
    with pytest.raises(ValueError, match=f"path must be one of .* for .*{pairwise}, got 'fast'"):
        operate((pairwise, True, "fast"), *sample())
    with pytest.raises(ValueError, match="got 'textbook'; 'textbook' is now called 'naive'"):
        operate((pairwise, True, "textbook"), *sample())

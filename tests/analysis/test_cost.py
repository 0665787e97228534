"""Cost found without computing: against PyTorch's records of real passes, counters, and by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from nl_detectron import NonLocalBlock, ops
from nl_detectron.analysis.cost import FVCORE_HANDLES, block_cost

N, C, D, Q, K = 2, 22, 11, 6 * 10, 3 * 5
CASES = [(p, path) for p, paths in ops.PATHS.items() for path in paths]
OUT = Q * D * C  # conv_out
ROWS = (Q + 2 * K) * C * D  # theta, phi, g
# By pairwise form and path, of one sample
EXPECTED = {
    ("gaussian", "naive"): K * C * D + Q * K * (C + D) + OUT,
    ("gaussian", "blocked"): K * C * D + Q * K * (C + D) + OUT,
    ("gaussian", "fused"): K * C * D + Q * K * 2 * C + OUT,  # g is filled up with zeros
    ("embedded_gaussian", "naive"): ROWS + Q * K * 2 * D + OUT,
    ("embedded_gaussian", "blocked"): ROWS + Q * K * 2 * D + OUT,
    ("embedded_gaussian", "fused"): ROWS + Q * K * 2 * D + OUT,
    ("dot_product", "naive"): ROWS + Q * K * 2 * D + OUT,
    ("dot_product", "linear"): ROWS + (Q + K) * D * D + OUT,
    # theta and phi with one channel each; a and b are that number times 1
    ("concatenation", "naive"): K * C * D + (Q + K) * (C + 1) + Q * K * D + OUT,
    ("concatenation", "sorted"): K * C * D + (Q + K) * (C + 1) + OUT,
}
# w_f into the convolutions of theta and phi, once for a batch: weights and biases
ONCE = {"concatenation": 2 * D * (C + 1)}


def really_saved(block, x):
    """Bytes of what autograd keeps, counted once where it keeps one memory twice."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        block(x)
    return sum(kept.values()) - sum(kept.get(p.data_ptr(), 0) for p in block.parameters())


def real_peak(block, x):
    """The most bytes that PyTorch's allocator had given out at a time, by its profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        y = block(x)
        y.backward(torch.ones_like(y))
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in events))


@pytest.fixture
def one_thread():
    """Fused attention takes scratch for each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("norm", ["", "BN"])
@pytest.mark.parametrize(("pairwise", "path"), CASES)
def test_memory_is_that_of_a_real_pass(pairwise, path, norm):
    block = NonLocalBlock(C, pairwise=pairwise, subsample=2, norm=norm)
    block.path = path
    x = torch.randn(N, C, 30, 50, requires_grad=True)
    cost = block_cost(block, x.shape)
    assert cost.path == path
    assert cost.saved_bytes == really_saved(block, x)
    # What an operator takes for itself alone, above all fused attention, is not in it.
    assert 0.6 < cost.peak_bytes / real_peak(block, x) < 1.03


def test_saved_bytes_by_hand():
    # y = x + conv_out(y'), y' = theta (phi^T g / K): what each product needs of its operands
    block = NonLocalBlock(C, pairwise="dot_product")
    block.path = "linear"
    rows = {"x": C * Q, "theta": D * Q, "phi": D * Q, "g / K": D * Q, "phi^T g": D * D, "y'": D * Q}
    assert block_cost(block, (N, C, 6, 10)).saved_bytes == 4 * N * sum(rows.values())


def test_a_checkpointed_block_saves_input_and_response_alone():
    block = NonLocalBlock(C, activation_checkpoint=True)
    assert block_cost(block, (N, C, 6, 10)).saved_bytes == 4 * N * Q * (C + D)


def test_peak_holds_the_pairs_or_does_not():
    block = NonLocalBlock(64)
    block.path = "naive"
    pairs = 4 * 1600 * 1600
    assert block_cost(block, (1, 64, 40, 40)).peak_bytes > 2 * pairs
    block.path = "fused"
    assert block_cost(block, (1, 64, 40, 40)).peak_bytes < pairs / 2


def test_multiplications_and_choice():
    with torch.device("meta"):
        block = NonLocalBlock(1024, pairwise="dot_product", subsample=2)
    cost = block_cost(block, (1, 1024, 50, 84))
    q, k, c, d = 4200, 1050, 1024, 512
    convolutions = 2 * q * c * d + 2 * k * c * d
    assert (cost.path, cost.parameters) == ("linear", 2_099_712)
    assert cost.macs == convolutions + (q + k) * d * d
    assert cost.naive_macs == convolutions + 2 * q * k * d
    assert next(block.parameters()).is_meta
    assert block.path is None


@pytest.mark.parametrize(("pairwise", "path"), CASES)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_counters_of_pytorch_and_fvcore(pairwise, path):
    block = NonLocalBlock(C, pairwise=pairwise, subsample=2).eval()
    block.path = path
    x = torch.randn(N, C, 6, 10)
    expected = N * EXPECTED[pairwise, path] + ONCE.get(pairwise, 0)
    for device in ("cpu", "meta"):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            block.to(device)(x.to(device))
        assert counter.get_total_flops() == 2 * expected
    block = block.to_empty(device="cpu")
    analysis = FlopCountAnalysis(block, x).set_op_handle(**FVCORE_HANDLES)
    if path == "blocked":  # fvcore traces, and a trace is not fixed to the blocks of a size
        expected = N * EXPECTED[pairwise, "fused"]
    assert analysis.unsupported_ops_warnings(False).total() == expected


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_attention_with_values_of_another_width():
    class Attention(nn.Module):
        def forward(self, theta, phi, g):
            return F.scaled_dot_product_attention(theta, phi, g)

    rows = torch.randn(2, 3, 5, 7), torch.randn(2, 3, 11, 7), torch.randn(2, 3, 11, 13)
    analysis = FlopCountAnalysis(Attention(), rows).set_op_handle(**FVCORE_HANDLES)
    assert analysis.total() == 2 * 3 * (5 * 7 * 11 + 5 * 11 * 13)

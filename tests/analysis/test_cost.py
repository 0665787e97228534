"""Cost found without computing, against PyTorch's own records of real passes and by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from nl_detectron import NonLocalBlock, ops
from nl_detectron.analysis.cost import block_cost

N, C, D, Q, K = 2, 22, 11, 6 * 10, 3 * 5
CASES = [(p, path) for p, paths in ops.PATHS.items() for path in paths]


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

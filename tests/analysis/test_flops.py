"""fvcore's and PyTorch's counters against each other and against multiplications by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nl_detectron import NonLocalBlock, ops
from nl_detectron.analysis.cost import FVCORE_HANDLES

N, C, Q, K = 2, 22, 6 * 10, 3 * 5
D = C // 2
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


@pytest.mark.parametrize(("pairwise", "path"), EXPECTED)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_counters(pairwise, path):
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


def test_all_paths_are_counted():
    assert {(p, path) for p, paths in ops.PATHS.items() for path in paths} == set(EXPECTED)

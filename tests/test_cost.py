"""Cost found without computing, against real passes and against multiplications by hand."""

from __future__ import annotations

import pytest
import torch

from nl_detectron import NonLocalBlock, ops
from nl_detectron.cost import block_cost, saved_bytes

N, C, D, Q, K = 2, 22, 11, 6 * 10, 3 * 5
CASES = [(p, path) for p, paths in ops.PATHS.items() for path in paths]


@pytest.mark.parametrize("norm", ["", "BN"])
@pytest.mark.parametrize(("pairwise", "path"), CASES)
def test_saved_bytes_are_those_of_a_real_pass(pairwise, path, norm):
    block = NonLocalBlock(C, pairwise=pairwise, subsample=2, norm=norm)
    block.path = path
    x = torch.randn(N, C, 6, 10, requires_grad=True)
    cost = block_cost(block, x.shape)
    assert cost.path == path
    assert cost.saved_bytes == saved_bytes(block, x)[0] > x.nbytes
    assert cost.peak_bytes >= cost.saved_bytes - x.nbytes


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
    block.path = "textbook"
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
    assert cost.textbook_macs == convolutions + 2 * q * k * d
    assert next(block.parameters()).is_meta
    assert block.path is None

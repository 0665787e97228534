"""Compute the parameters, multiply-adds and memory of a block without running it.

Passes run on tensors without data (PyTorch's ``FakeTensorMode``), which take the same paths and
save the same tensors as real ones.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from fvcore.nn.jit_handles import get_shape
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from nl_detectron.non_local import NonLocalBlock


@dataclass(frozen=True)
class BlockCost:
    """Cost of one block for one batch.

    Attributes:
        path: the path that the block takes, one of ``ops.PATHS``.
        parameters: number of parameters.
        macs: multiply-adds of convolutions and matrix products in the forward pass.
        naive_macs: the same for the naive path, which computes all pairs explicitly.
        saved_bytes: tensors saved for the backward pass, without the parameters.
        peak_bytes: peak of the live tensors over both passes, gradients included, input and
            parameters excluded. PyTorch does not know an operator's internal workspace.
    """

    path: str
    parameters: int
    macs: int
    naive_macs: int
    saved_bytes: int
    peak_bytes: int


def block_cost(
    block: NonLocalBlock, shape: Sequence[int], device: str | torch.device = "cpu"
) -> BlockCost:
    """Compute the cost of training a block on a map of the given shape (N, C, ...).

    Args:
        block: the block, on any device; it is not modified.
        shape: shape of its input.
        device: device it will run on, which can affect the choice of path.
    """
    block = copy.deepcopy(block).to("meta").train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        block.to_empty(device=device)
        x = torch.empty(shape, device=device, requires_grad=True)
        path = block.path_for(x)
        saved = saved_bytes(block, x)[0]
        with _LiveTensors() as live:
            y = block(x)
            y.backward(torch.ones_like(y))
        macs = _macs(block, x)
        block.path = "naive"
        return BlockCost(
            path=path,
            parameters=sum(p.numel() for p in block.parameters()),
            macs=macs,
            naive_macs=_macs(block, x),
            saved_bytes=saved,
            peak_bytes=live.peak,
        )


def saved_bytes(module: nn.Module, x: Tensor) -> tuple[int, Tensor]:
    """Run a module; return the bytes saved for backward, parameters excluded, and the output."""
    parameters = {p.untyped_storage()._cdata for p in module.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage()._cdata not in parameters:
            saved[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = module(x)
    return sum(storage.nbytes() for storage in saved.values()), y


def _macs(block: NonLocalBlock, x: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        block(x)
    return counter.get_total_flops() // 2


class _LiveTensors(TorchDispatchMode):
    """Tracks the bytes of live tensors created in this mode, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._add(t.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive.add(key)
            self.current += size
            self.peak = max(self.peak, self.current)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.current -= size


def _attention_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """Count the multiply-adds of theta phi^T and of its product with g."""
    (*batch, queries, width), keys, values = (get_shape(value) for value in inputs[:3])
    return prod(batch) * queries * keys[-2] * (width + values[-1])


# For fvcore's and detectron2's FlopCountAnalysis: ``.set_op_handle(**FVCORE_HANDLES)``. PyTorch's
# FlopCounterMode already counts fused attention.
FVCORE_HANDLES: dict[str, Callable[[list[Any], list[Any]], int]] = {
    "aten::scaled_dot_product_attention": _attention_flops
}

"""Count fused attention with fvcore, which has no handle for its operator and counts it as zero."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from fvcore.nn.jit_handles import get_shape


def _attention_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """Multiplications of theta phi^T and of its product with g."""
    (*batch, queries, width), keys, values = (get_shape(value) for value in inputs[:3])
    return prod(batch) * queries * keys[-2] * (width + values[-1])


# For fvcore's and detectron2's FlopCountAnalysis: ``.set_op_handle(**FVCORE_HANDLES)``. PyTorch's
# own FlopCounterMode needs no help.
FVCORE_HANDLES: dict[str, Callable[[list[Any], list[Any]], int]] = {
    "aten::scaled_dot_product_attention": _attention_flops
}

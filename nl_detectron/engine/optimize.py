"""A copy of a detector that does the same in less time, for inference only.

Constant norms are folded into their convolutions, maps are channels-last in memory, RoIAlign uses
all threads, and layers can compute in half precision. What they predict is decoded in float32.
"""

from __future__ import annotations

import copy
import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, ROIAlign
from detectron2.modeling import GeneralizedRCNN, ProposalNetwork
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import ROIHeads
from torch import Tensor, nn

from nl_detectron.non_local import NonLocalBlock
from nl_detectron.norm import fold_norm
from nl_detectron.paths import compiling

DTYPES = (None, torch.bfloat16, torch.float16)
FAST = {"fp32": None, "bf16": torch.bfloat16}  # by their names on command lines

# The layers that compute in half precision, if asked to.
_LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)

# In detectron2's heads, the layers whose outputs are decoded, and the heads that have them.
_PREDICTION_LAYERS = (
    *("objectness_logits", "anchor_deltas", "cls_score", "bbox_pred", "ctrness"),
    *("predictor", "score_lowres"),
)
_HEADS = ("rpn_head", "box_predictor", "mask_head", "keypoint_head", "sem_seg_head", "head")


def optimize_for_inference(model: nn.Module, dtype: torch.dtype | None = None) -> Any:
    """Return an optimized copy of a detector.

    It is a model of the same class, called in the same way. Results differ from those of ``model``
    by rounding; in half precision, also scores near a threshold may decide otherwise.

    Norms of batches and groups, in evaluation too (GN), stay as they are, in float32. The copy has
    parameters of its own: its state dict is not a checkpoint for the config of ``model``.

    Args:
        model: an R-CNN (``GeneralizedRCNN``, ``ProposalNetwork``) or a dense detector (RetinaNet,
            FCOS) of detectron2, with or without non-local blocks. It is not modified.
        dtype: ``torch.bfloat16`` or ``torch.float16`` to compute convolutions, linear layers and
            non-local blocks in; fast on CPUs with such instructions, and on GPUs. Boxes, scores,
            RoI features and the softmax of attention stay in float32. ``None``: all in float32.

    Raises:
        ValueError: another kind of model, another dtype, or, in half precision, a head of which it
            is not known which layers predict.
    """
    if not isinstance(model, (GeneralizedRCNN, ProposalNetwork, DenseDetector)):
        raise ValueError(
            "only detectors can be optimized (GeneralizedRCNN, ProposalNetwork, RetinaNet, FCOS), "
            f"got {type(model).__name__}"
        )
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype}")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    _fold_norms(model)
    _relu_in_place(model)
    model.to(memory_format=torch.channels_last)
    if dtype is not None:
        _compute_in(model, dtype)
    for module in model.modules():
        if isinstance(module, ROIPooler):
            module.level_poolers = nn.ModuleList(map(_in_threads, module.level_poolers))
            module.register_forward_pre_hook(_convert_maps)
        elif isinstance(module, ROIHeads):  # once for all of its poolers
            module.register_forward_pre_hook(_convert_features)
    return model


def optimize(model: nn.Module, fast: str | None) -> Any:
    """Optimize a model if the user of a command wants it: ``fast`` is one of :data:`FAST`."""
    return optimize_for_inference(model, FAST[fast]) if fast else model


def _fold_norms(model: nn.Module) -> None:
    """Fold constant norms into their convolutions: of detectron2's layers and of our blocks."""
    for module in model.modules():
        if isinstance(module, NonLocalBlock):
            _fold_norm(module, module.conv_out)
        elif isinstance(module, Conv2d):
            _fold_norm(module, module)


def _fold_norm(owner: Any, conv: Any) -> None:
    folded = None if owner.norm is None else fold_norm(conv, owner.norm)
    if folded is not None:
        weight, bias = folded
        conv.weight = nn.Parameter(weight, requires_grad=False)
        conv.bias = nn.Parameter(bias, requires_grad=False)
        owner.norm = None


def _relu_in_place(model: nn.Module) -> None:
    """Let ReLU write over the output of a convolution, where nothing else reads it."""
    for module in model.modules():
        if isinstance(module, Conv2d) and isinstance(module.activation, nn.ReLU):
            module.activation = nn.ReLU(inplace=True)
        elif isinstance(module, Conv2d) and module.activation is F.relu:
            module.activation = F.relu_
        elif isinstance(module, nn.Sequential):
            for layer, following in itertools.pairwise(module):
                if isinstance(layer, _LAYERS) and isinstance(following, nn.ReLU):
                    following.inplace = True


def _compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Let layers compute in ``dtype``, except those that predict.

    Those of RetinaNet take a fourth of its time: they compute in ``dtype``, too, and what they
    return is converted.
    """
    dense = isinstance(model, DenseDetector)
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if last in _HEADS and not _predicts(module):
            raise ValueError(
                f"{name}, a {type(module).__name__}, has none of the layers {_PREDICTION_LAYERS}: "
                f"what it predicts would be decoded in {dtype}; use dtype None"
            )
        predicts = last in _PREDICTION_LAYERS
        if isinstance(module, _LAYERS) and (dense or not predicts):
            module.to(dtype)
        if isinstance(module, NonLocalBlock) or module._parameters:
            module.register_forward_pre_hook(_to_own_dtype)
        if predicts and dense:
            module.register_forward_hook(_to_float32)


def _predicts(head: nn.Module) -> bool:
    names = (name.rpartition(".")[2] for name, _ in head.named_modules())
    return any(name in _PREDICTION_LAYERS for name in names)


def _to_own_dtype(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Convert the input of a layer to the dtype of its weights (a forward pre-hook)."""
    return args[0].to(next(module.parameters()).dtype), *args[1:]


def _to_float32(layer: nn.Module, args: tuple[Any, ...], prediction: Tensor) -> Tensor:
    """Convert the output of a layer (a forward hook)."""
    return prediction.float()


class _ThreadedROIAlign(ROIAlign):
    """RoIAlign in as many threads as PyTorch uses: torchvision's kernel for CPUs uses one."""

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Pool maps (N, C, H, W) in RoIs (R, 5) to (R, C, size, size)."""
        threads = torch.get_num_threads()
        if input.device.type != "cpu" or threads == 1 or compiling() or len(rois) < threads:
            return super().forward(input, rois)
        with ThreadPoolExecutor(threads) as pool:
            pooled = pool.map(partial(super().forward, input), rois.chunk(threads))
            return torch.cat(list(pooled))


def _in_threads(align: nn.Module) -> nn.Module:
    if type(align) is not ROIAlign:
        return align
    return _ThreadedROIAlign(
        align.output_size, align.spatial_scale, align.sampling_ratio, align.aligned
    )


def _convert_features(heads: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """As :func:`_convert_maps`, for the RoI heads (a forward pre-hook)."""
    images, features, *others = args
    return images, {name: _for_pooling(x) for name, x in features.items()}, *others


def _convert_maps(pooler: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Convert maps for RoIAlign (a forward pre-hook).

    It has RoIs in the dtype of the map, and bfloat16 knows no coordinate above 256 to a pixel.
    """
    maps, *others = args
    return [_for_pooling(x) for x in maps], *others


def _for_pooling(x: Tensor) -> Tensor:
    # In one copy. RoIAlign makes one in NCHW of any other map.
    return x.to(torch.promote_types(x.dtype, torch.float32), memory_format=torch.contiguous_format)

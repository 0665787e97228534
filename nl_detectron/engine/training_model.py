"""The same model, with the same parameters by the same names, computed in a faster way.

For training as well as evaluation; results differ by rounding. Checkpoints are those of the model
that the config describes. :mod:`nl_detectron.engine.optimize` is for inference only, and faster.
"""

from __future__ import annotations

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn

from nl_detectron.engine.options import RunOptions
from nl_detectron.norm import fold_norm

_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


def prepare_for_training(model: nn.Module, options: RunOptions) -> nn.Module:
    """Change a model in place as the options of a training run ask; return it.

    Raises:
        ValueError: an option would change nothing in this model.
    """
    if options.fold_norms:
        fold_frozen_norms(model)
    if options.channels_last:
        to_channels_last(model)
    return model


def fold_frozen_norms(model: nn.Module) -> None:
    """Let convolutions apply the frozen batch norms that follow them, in place.

    detectron2 multiplies and adds in two passes over the output of the convolution. Here its
    weights are multiplied and its bias is added before it: conv(x, w) f + b = conv(x, w f) + b.
    The gradient of w is multiplied by f in turn.

    Raises:
        ValueError: no convolution has a frozen norm.
    """
    convolutions = [
        module
        for module in model.modules()
        if type(module) is Conv2d and isinstance(module.norm, FrozenBatchNorm2d)
    ]
    if not convolutions:
        raise ValueError("--fold-norms: the model has no frozen batch norm (FrozenBN)")
    for module in convolutions:
        module.__class__ = _FoldedConv2d


def to_channels_last(model: nn.Module) -> None:
    """Store the weights of convolutions channels-last, in place; maps then are, too.

    Raises:
        ValueError: the model has no convolutions of images or clips.
    """
    weights = [parameter for parameter in model.parameters() if parameter.dim() in _LAYOUTS]
    if not weights:
        raise ValueError("--channels-last: the model has no convolutions of images or clips")
    for weight in weights:
        weight.data = weight.data.contiguous(memory_format=_LAYOUTS[weight.dim()])


class _FoldedConv2d(Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        if self.norm is None:  # folded for inference
            return super().forward(x)
        weight, bias = fold_norm(self, self.norm)  # type: ignore[misc]  # it is frozen
        x = self._conv_forward(x, weight, bias)
        return x if self.activation is None else self.activation(x)

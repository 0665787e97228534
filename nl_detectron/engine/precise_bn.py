"""Precise batch norm that a training can be resumed with."""

from __future__ import annotations

import torch.distributed as dist
from detectron2.engine import hooks
from detectron2.utils import comm
from fvcore.nn.precise_bn import get_bn_modules


class SameBatchesPreciseBN(hooks.PreciseBN):
    """Precise batch norm on the same batches every time, whether the training was resumed or not.

    Statistics of all processes are averaged (video-nonlocal-net: lib/utils/bn_helper.py).
    """

    def update_stats(self) -> None:
        """Compute the statistics."""
        self._data_iter = None
        super().update_stats()
        if comm.get_world_size() > 1:
            for norm in get_bn_modules(self._model):
                square = norm.running_var + norm.running_mean**2
                for moment in (norm.running_mean, square):
                    dist.all_reduce(moment)
                    moment /= comm.get_world_size()
                norm.running_var = square - norm.running_mean**2

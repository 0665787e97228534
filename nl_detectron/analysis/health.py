"""What a non-local block does to its features, in three numbers, for tables and training logs.

Shapes: N samples, Q queries, K keys.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nl_detectron.non_local import NonLocalBlock, find_blocks

logger = logging.getLogger(__name__)

MAX_SAMPLES, MAX_QUERIES = 8, 64


class BlockHealth(NamedTuple):
    """Three numbers about one call of a block.

    Attributes:
        residual_ratio: |W_z y| / |x|, Euclidean norms over the whole map. 0: the block does
            nothing.
        entropy: see :func:`entropy`.
        query_dependence: see :func:`query_dependence`.
    """

    residual_ratio: float
    entropy: float
    query_dependence: float


def entropy(attention: Tensor) -> float:
    """Mean entropy of the rows over log K: 1 where all keys weigh the same, 0 where one has all.

    Forms whose rows are not distributions are read as such: |a_j| / sum_k |a_k|. Rows of zeros are
    left out.

    Args:
        attention: (N, Q, K).

    Returns:
        A number in [0, 1]; nan where K is 1 or no row is left.
    """
    p = _as_distributions(attention)
    nats = torch.special.entr(p).sum(dim=-1)
    return (nats.nanmean() / math.log(p.shape[-1])).item() if p.shape[-1] > 1 else math.nan


def query_dependence(attention: Tensor) -> float:
    """How much the rows of a sample differ: the mean of 1/2 sum_k |p_ik - p_jk| over pairs i != j.

    0: all queries look at the same places, as `GCNet <https://arxiv.org/abs/1904.11492>`_ found in
    detection. 1: no two of them have a place in common. Rows are read as in :func:`entropy`.

    Args:
        attention: (N, Q, K).

    Returns:
        A number in [0, 1]; nan where no sample has two rows.
    """
    p = _as_distributions(attention)
    distances = torch.cdist(p, p, p=1.0) / 2  # total variation
    others = ~torch.eye(p.shape[1], dtype=torch.bool, device=p.device)
    return distances[:, others].nanmean().item()


@torch.no_grad()
def block_health(block: NonLocalBlock, x: Tensor, z: Tensor) -> BlockHealth:
    """Measure a block on its input x and output z, both (N, C, *size).

    Attention is computed for at most ``MAX_QUERIES`` queries of ``MAX_SAMPLES`` samples, always the
    same ones; no random number is drawn from the global generator.
    """
    size = x.shape[2:]
    queries = math.prod({"spacetime": size, "space": size[1:], "time": size[:1]}[block.axes])
    chosen = torch.randperm(queries, generator=torch.Generator().manual_seed(0))[:MAX_QUERIES]
    attention = block.attention(x[:MAX_SAMPLES], chosen.to(x.device))
    ratio = (z.float() - x.float()).norm() / x.float().norm()
    return BlockHealth(ratio.item(), entropy(attention), query_dependence(attention))


@contextmanager
def watch_health(
    model: nn.Module, report: Callable[[str, BlockHealth], None], *patterns: str
) -> Iterator[None]:
    """Measure blocks whenever the model runs within the context.

    Args:
        model: any model with non-local blocks, in training or not. Its output does not change.
        report: called with the name of the block and its health, for every call on a sample or
            more.
        patterns: as in :func:`nl_detectron.non_local.find_blocks`; without one, all blocks.

    Raises:
        ValueError: a pattern that no block matches.
    """

    def measure(name: str, block: NonLocalBlock, args: tuple[Tensor, ...], z: Tensor) -> None:
        if len(z):
            report(name, block_health(block, args[0], z))

    with ExitStack() as hooks:
        for name, block in find_blocks(model, *(patterns or "*")).items():
            hooks.enter_context(block.register_forward_hook(partial(measure, name)))
        yield


class BlockHealthHook(HookBase):
    """Logs the health of all blocks in training: a line each, and ``non_local/<block>/<number>``.

    TensorBoard and metrics.json show the latter. Between two measurements, nothing is computed. Add
    it to any detectron2 trainer: ``trainer.register_hooks([BlockHealthHook(100, trainer.model)])``.
    """

    def __init__(self, period: int, model: nn.Module):
        """Create the hook.

        Args:
            period: iterations from one measurement to the next, the first of all included.
            model: the trainer's.

        Raises:
            ValueError: a period below 1, or a model without non-local blocks.
        """
        if period < 1:
            raise ValueError(f"period must be at least 1, got {period}")
        self._period = period
        self._model = model.module if isinstance(model, DistributedDataParallel) else model
        self._watch = ExitStack()
        find_blocks(self._model, "*")

    def before_step(self) -> None:
        """Watch the step if it is its turn; only the main process logs."""
        if self.trainer.iter % self._period == 0 and comm.is_main_process():
            self._watch.enter_context(watch_health(self._model, _log))

    def after_step(self) -> None:
        """Take the hooks off the blocks."""
        self._watch.close()

    def after_train(self) -> None:
        """The same, after a step that failed."""
        self._watch.close()


def _log(name: str, health: BlockHealth) -> None:
    storage = get_event_storage()
    numbers = ", ".join(f"{k.replace('_', ' ')} {v:.3g}" for k, v in health._asdict().items())
    logger.info("iter: %d  %s: %s", storage.iter, name, numbers)
    for key, value in health._asdict().items():
        storage.put_scalar(f"non_local/{name}/{key}", value, smoothing_hint=False)


def _as_distributions(attention: Tensor) -> Tensor:
    weights = attention.abs()
    return weights / weights.sum(dim=-1, keepdim=True)  # 0 / 0 is nan

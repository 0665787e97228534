"""Three numbers that summarize what a non-local block does to its features.

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
    """Summary of one call of a block.

    Attributes:
        residual_ratio: |W_z y| / |x|, Euclidean norms over all maps; 0 means that the block does
            nothing.
        entropy: see :func:`entropy`.
        query_dependence: see :func:`query_dependence`.
    """

    residual_ratio: float
    entropy: float
    query_dependence: float


def entropy(attention: Tensor) -> float:
    """Return the mean entropy of the rows over log K: 1 for uniform rows, 0 for one-hot rows.

    Rows that are not distributions (dot product, concatenation) are normalized to
    |a_j| / sum_k |a_k|. Rows of zeros are ignored.

    Args:
        attention: (N, Q, K).

    Returns:
        A number in [0, 1]; nan if K is 1 or all rows are zero.
    """
    p = _as_distributions(attention)
    nats = torch.special.entr(p).sum(dim=-1)
    return (nats.nanmean() / math.log(p.shape[-1])).item() if p.shape[-1] > 1 else math.nan


def query_dependence(attention: Tensor) -> float:
    """Return the mean total variation distance between the rows of a sample.

    It is 1/2 sum_k |p_ik - p_jk|, averaged over i != j. 0: all queries attend to the same
    positions, as `GCNet <https://arxiv.org/abs/1904.11492>`_ found in detection. 1: no two queries
    share a key. Rows are normalized as in :func:`entropy`.

    Args:
        attention: (N, Q, K).

    Returns:
        A number in [0, 1]; nan if no sample has two nonzero rows.
    """
    p = _as_distributions(attention)
    distances = torch.cdist(p, p, p=1.0) / 2  # total variation
    others = ~torch.eye(p.shape[1], dtype=torch.bool, device=p.device)
    return distances[:, others].nanmean().item()


@torch.no_grad()
def block_health(
    block: NonLocalBlock, x: Tensor, z: Tensor, sizes: Tensor | None = None
) -> BlockHealth:
    """Measure a block on its input x and output z, both (N, C, *size).

    Attention is computed for at most ``MAX_QUERIES`` queries of ``MAX_SAMPLES`` samples. The
    queries are always the same, and the global random state is not touched.

    Args:
        block: the block.
        x: its input.
        z: its output.
        sizes: (N, 2), rows and columns of each map that are not padding, where the block masks
            padding: only they are measured. The numbers are means over the images then.
    """
    if sizes is not None:
        images = [
            [m[n : n + 1, :, :rows, :columns] for m in (x, z)]
            for n, (rows, columns) in enumerate(sizes[:MAX_SAMPLES].tolist())
        ]
        each = torch.tensor([block_health(block, *image) for image in images], dtype=torch.float64)
        return BlockHealth(*each.nanmean(dim=0).tolist())
    queries = math.prod(block.part_size(x.shape[2:]))
    chosen = torch.randperm(queries, generator=torch.Generator().manual_seed(0))[:MAX_QUERIES]
    attention = block.attention(x[:MAX_SAMPLES], chosen.to(x.device))
    ratio = (z.float() - x.float()).norm() / x.float().norm()
    return BlockHealth(ratio.item(), entropy(attention), query_dependence(attention))


@contextmanager
def watch_health(
    model: nn.Module, report: Callable[[str, BlockHealth], None], *patterns: str
) -> Iterator[None]:
    """Measure blocks in every forward pass within the context.

    Args:
        model: any model with non-local blocks, in training or evaluation mode. Its output does not
            change.
        report: called with the name and the health of a block, for every call with at least one
            sample.
        patterns: see :func:`nl_detectron.non_local.find_blocks`; default: all blocks.

    Raises:
        ValueError: a pattern matches no block.
    """

    def measure(name: str, block: NonLocalBlock, args: tuple[Tensor, ...], z: Tensor) -> None:
        if len(z):
            report(name, block_health(block, args[0], z, block.sizes_in_map()))

    with ExitStack() as hooks:
        for name, block in find_blocks(model, *(patterns or "*")).items():
            hooks.enter_context(block.register_forward_hook(partial(measure, name)))
        yield


class BlockHealthHook(HookBase):
    """Logs the health of all blocks in training, one line per block.

    The values also go to TensorBoard and metrics.json as ``non_local/<block>/<number>``. Iterations
    between two measurements are not slowed down. It works with any detectron2 trainer:
    ``trainer.register_hooks([BlockHealthHook(100, trainer.model)])``.
    """

    def __init__(self, period: int, model: nn.Module):
        """Create the hook.

        Args:
            period: number of iterations between measurements; the first iteration is measured.
            model: the trainer's model.

        Raises:
            ValueError: ``period`` is below 1, or the model has no non-local blocks.
        """
        if period < 1:
            raise ValueError(f"period must be at least 1, got {period}")
        self._period = period
        self._model = model.module if isinstance(model, DistributedDataParallel) else model
        self._watch = ExitStack()
        find_blocks(self._model, "*")

    def before_step(self) -> None:
        """Start measuring every ``period`` iterations, in the main process only."""
        if self.trainer.iter % self._period == 0 and comm.is_main_process():
            self._watch.enter_context(watch_health(self._model, _log))

    def after_step(self) -> None:
        """Remove the hooks from the blocks."""
        self._watch.close()

    def after_train(self) -> None:
        """Remove the hooks if a step failed."""
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

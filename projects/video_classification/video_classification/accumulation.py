"""A training step on a batch that is too large for the memory: in parts, one after the other."""

from __future__ import annotations

import time
from contextlib import nullcontext

import torch
from detectron2.engine import SimpleTrainer
from torch.nn.parallel import DistributedDataParallel


def accumulated_step(trainer: SimpleTrainer, parts: int) -> None:
    """Take the step that ``trainer.run_step()`` takes, with the memory of a part of the batch.

    The loss of a batch must be the mean over its clips. Then the gradients are those of the whole
    batch, but that batch norm sees only a part at a time.

    Args:
        trainer: also with mixed precision.
        parts: must divide the number of clips that a process has in a batch.
    """
    model, optimizer = trainer.model, trainer.optimizer
    scaler = getattr(trainer, "grad_scaler", None)  # of an AMPTrainer
    start = time.perf_counter()
    batch = next(trainer._data_loader_iter)
    data_time = time.perf_counter() - start
    size = len(batch) // parts
    optimizer.zero_grad()
    losses: dict[str, torch.Tensor] = {}
    for part in range(parts):
        # Gradients of all processes are added up once, with those of the last part.
        waits = part < parts - 1 and isinstance(model, DistributedDataParallel)
        with model.no_sync() if waits else nullcontext():
            with _mixed_precision(trainer):
                found = model(batch[part * size : (part + 1) * size])
            total = sum(found.values()) / parts
            (scaler.scale(total) if scaler else total).backward()
        for name, loss in found.items():
            losses[name] = losses.get(name, 0) + loss.detach() / parts
    trainer._write_metrics(losses, data_time)
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()


def _mixed_precision(trainer: SimpleTrainer) -> torch.autocast | nullcontext:
    if not hasattr(trainer, "grad_scaler"):
        return nullcontext()
    device = next(trainer.model.parameters()).device.type
    return torch.autocast(device, getattr(trainer, "precision", torch.float16))

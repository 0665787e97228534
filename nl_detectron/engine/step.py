"""A training step: in mixed precision, in parts, and skipped if it would ruin the weights."""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from nl_detectron.engine.signals import lost_workers_raise

logger = logging.getLogger("nl_detectron")

NONFINITE_FILE = "nonfinite.json"
LOSS_NORMALIZER = "loss_normalizer"
_NONFINITE = re.compile(r"\b(NaN|Inf|infinite)\b")
"""What detectron2's models say when they find such values themselves."""


class TrainingStep(SimpleTrainer):
    """Takes the steps of detectron2's ``SimpleTrainer`` and ``AMPTrainer``, and refuses bad ones.

    A step whose loss or gradients are not finite is skipped: weights, momentum and the running
    statistics of batch norm stay as they were. A loss that is not finite is multiplied by NaN
    before the backward pass. The gradients, which are added up over all processes, then tell every
    process about it, without a message of its own. With a gradient scaler, an overflow at a scale
    above 1 is no fault: the scaler reduces the scale.

    Attributes:
        nonfinite: number of steps that were skipped as faults.
        updated: the last iteration whose update of the weights has begun, -1 for none.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: DataLoader,
        optimizer: torch.optim.Optimizer,
        *,
        parts: int = 1,
        mixed_precision: bool = False,
        max_nonfinite: int = 10,
        output_dir: str = "",
    ):
        """Set up the step.

        Args:
            model: returns a dict of losses, each a mean over the batch if there are several parts.
            data_loader: yields batches: lists of images or clips.
            optimizer: of the model's parameters.
            parts: number of parts of a batch that are computed one after the other, with the memory
                of one. The gradients are those of the whole batch, but that batch norm sees only a
                part at a time.
            mixed_precision: on GPUs, float16 with a gradient scaler, as in ``AMPTrainer``; on the
                CPU, bfloat16, which needs none.
            max_nonfinite: number of steps to skip; one more ends the training.
            output_dir: where ``nonfinite.json`` tells why.
        """
        super().__init__(model, data_loader, optimizer)
        device = next(model.parameters()).device.type
        self._parts = parts
        self._max_nonfinite = max_nonfinite
        self._output_dir = output_dir
        self._autocast: Callable[[], Any] = nullcontext
        self._scaler: torch.amp.GradScaler | None = None
        if mixed_precision:
            half = torch.bfloat16 if device == "cpu" else torch.float16
            self._autocast = lambda: torch.autocast(device, half)
            if half == torch.float16:
                self._scaler = torch.amp.GradScaler(device)
        self._statistics: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.nonfinite = 0
        self.updated = -1

    def run_step(self) -> None:
        """Take a step, or skip it.

        Raises:
            FloatingPointError: one step more than ``max_nonfinite`` is not finite.
        """
        start = time.perf_counter()
        with lost_workers_raise():
            batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        random_state = _random_state()
        self._statistics = _running_statistics(self.model)
        self.optimizer.zero_grad()
        losses = self._backward(batch)
        if self._gradients_are_finite():
            self._write_metrics(losses, data_time)
        else:
            self.undo_statistics()
            if not self._scaler or self._scaler.get_scale() <= 1:
                self._count_nonfinite(batch, losses, random_state)
            elif not all(loss.isfinite() for loss in losses.values()):
                logger.warning("A loss is not finite in iteration %s: skipped", self.iter)
            if not self._scaler:
                return
        self.updated = self.iter
        if self._scaler:
            self._scaler.step(self.optimizer)
            self._scaler.update()
        else:
            self.optimizer.step()
        self._statistics = []

    def undo_statistics(self) -> None:
        """Put back the running statistics of batch norm that the last forward pass has changed."""
        for buffer, value in self._statistics:
            buffer.copy_(value)

    def _backward(self, batch: list[Any]) -> dict[str, torch.Tensor]:
        """Compute the gradients, and return the losses."""
        size = len(batch) // self._parts
        losses: dict[str, torch.Tensor] = {}
        for part in range(self._parts):
            # Gradients of all processes are added up once, with those of the last part.
            waits = part < self._parts - 1 and isinstance(self.model, DistributedDataParallel)
            with self.model.no_sync() if waits else nullcontext():
                with self._autocast():
                    found = self._forward(batch[part * size : (part + 1) * size])
                if isinstance(found, torch.Tensor):
                    found = {"total_loss": found}
                total = sum(found.values()) / self._parts
                total = total * torch.where(total.detach().isfinite(), 1.0, math.nan)
                (self._scaler.scale(total) if self._scaler else total).backward()
            for name, loss in found.items():
                losses[name] = losses.get(name, 0) + loss.detach() / self._parts
        return losses

    def _forward(self, batch: list[Any]) -> Any:
        """Return the losses: NaN if the model itself refuses to go on with NaN."""
        try:
            return self.model(batch)
        except (AssertionError, FloatingPointError) as error:
            reason = str(error)
            if not _NONFINITE.search(reason):
                raise
            module = _unwrapped(self.model)
            weights = [parameter for parameter in module.parameters() if parameter.requires_grad]
            # Other processes wait for gradients, which DistributedDataParallel has to see.
            module.forward = lambda _: {reason: math.nan * sum(w.sum() for w in weights)}
            try:
                return self.model(batch)
            finally:
                del module.forward

    def _gradients_are_finite(self) -> bool:
        """Return the same in every process, by the norm of all gradients as one vector."""
        norms = [
            torch.linalg.vector_norm(parameter.grad)
            for parameter in self.model.parameters()
            if parameter.grad is not None
        ]
        return bool(torch.stack(norms).sum().isfinite())

    def _count_nonfinite(
        self, batch: list[Any], losses: Mapping[str, torch.Tensor], random_state: list[Any]
    ) -> None:
        mine = {
            "losses": {name: _json_number(loss.item()) for name, loss in losses.items()},
            "images": [str(image.get("file_name", "")) for image in batch],
        }
        found = comm.all_gather(mine)
        too_many = self.nonfinite >= self._max_nonfinite
        if not too_many:
            self.nonfinite += 1
            logger.warning(
                "Iteration %s is skipped, as its loss or gradients are not finite (%s of at most "
                "%s in a run): %s",
                self.iter,
                self.nonfinite,
                self._max_nonfinite,
                _describe(found),
            )
            return
        for process, culprit in zip(found, comm.all_gather(self._culprit(batch, random_state))):
            process.update(culprit)
        path = Path(self._output_dir, NONFINITE_FILE)
        if comm.is_main_process():
            report = {"iteration": self.iter, "skipped": self.nonfinite, "processes": found}
            path.write_text(json.dumps(report, indent=1))
        raise FloatingPointError(
            f"the loss or the gradients of iteration {self.iter} are not finite, after "
            f"{self.nonfinite} iterations that were skipped for the same reason "
            f"(--max-nonfinite {self._max_nonfinite}); {path} names images and modules"
        )

    def _culprit(self, batch: list[Any], random_state: list[Any]) -> dict[str, Any]:
        """Find the first module whose output is not finite, or else the parameters."""
        model = _unwrapped(self.model)
        gradients = [
            name
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and not parameter.grad.isfinite().all()
        ]
        first: list[str] = []

        def check(name: str) -> Callable:
            def hook(module: nn.Module, _: Any, output: Any) -> None:
                if not first and not all(x.isfinite().all() for x in _tensors(output)):
                    first.append(f"{name} ({type(module).__name__})".lstrip())

            return hook

        hooks = [module.register_forward_hook(check(n)) for n, module in model.named_modules()]
        size = len(batch) // self._parts
        with torch.no_grad(), _restored(random_state):
            for part in range(self._parts):
                with self._autocast(), suppress(AssertionError, FloatingPointError):
                    model(batch[part * size : (part + 1) * size])
        for handle in hooks:
            handle.remove()
        self.undo_statistics()
        if first:
            return {"first_module": first[0]}
        return {"first_module": None, "gradients": gradients}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of optimizer and scaler, and the number of skipped steps.

        And the running mean by which RetinaNet divides its losses, which is not among its weights.
        """
        state = {**super().state_dict(), "nonfinite": self.nonfinite}
        if hasattr(_unwrapped(self.model), LOSS_NORMALIZER):
            state[LOSS_NORMALIZER] = getattr(_unwrapped(self.model), LOSS_NORMALIZER)
        if self._scaler:
            state["grad_scaler"] = self._scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state; that of a training without mixed precision has no scaler."""
        super().load_state_dict(state_dict)
        self.nonfinite = state_dict.get("nonfinite", 0)
        if LOSS_NORMALIZER in state_dict:
            setattr(_unwrapped(self.model), LOSS_NORMALIZER, state_dict[LOSS_NORMALIZER])
        if self._scaler and "grad_scaler" in state_dict:
            self._scaler.load_state_dict(state_dict["grad_scaler"])


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _running_statistics(model: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the buffers that a forward pass changes, with copies of their values."""
    return [
        (buffer, buffer.clone())
        for norm in get_bn_modules(model)
        for buffer in norm.buffers(recurse=False)
    ]


def _random_state() -> list[Any]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else states


@contextmanager
def _restored(random_state: list[Any]) -> Iterator[None]:
    """Draw the random numbers that followed a state of the generators, and then go on."""
    devices = [torch.cuda.current_device()] if random_state[1:] else []
    with torch.random.fork_rng(devices):
        torch.set_rng_state(random_state[0])
        if random_state[1:]:
            torch.cuda.set_rng_state(random_state[1])
        yield


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    """Yield the floating-point tensors in a module's output."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)


def _describe(processes: list[dict[str, Any]]) -> str:
    """Name losses and images of the processes whose losses are not finite, or else of all."""
    bad = [p for p in processes if any(isinstance(loss, str) for loss in p["losses"].values())]
    return "; ".join(
        ", ".join(f"{name} {loss}" for name, loss in process["losses"].items())
        + " for "
        + ", ".join(process["images"])
        for process in bad or processes
    )


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)

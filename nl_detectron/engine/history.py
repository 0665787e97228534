"""What a training has logged so far, kept when it is resumed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from detectron2.engine import HookBase
from torch import Tensor


class History(HookBase):
    """Keeps the scalars of all iterations in the checkpoint.

    The log's medians, its remaining time and the loss curves of an ablation come from there.
    """

    def __init__(self) -> None:
        self._restored: dict[str, dict[str, Tensor]] = {}

    def before_train(self) -> None:
        """Give the new storage what the checkpoint had."""
        histories = self.trainer.storage.histories()
        for name, restored in self._restored.items():
            for value, iteration in zip(restored["value"].tolist(), restored["iteration"].tolist()):
                histories[name].update(value, iteration)
        self._restored = {}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return the scalars of all iterations up to the trainer's, by name."""
        if not hasattr(self.trainer, "storage"):
            return self._restored
        state = {}
        for name, history in self.trainer.storage.histories().items():
            kept = [pair for pair in history.values() if pair[1] <= self.trainer.iter]
            state[name] = {
                "value": torch.tensor([value for value, _ in kept], dtype=torch.float64),
                "iteration": torch.tensor([iteration for _, iteration in kept]),
            }
        return state

    def load_state_dict(self, state_dict: dict[str, dict[str, Tensor]]) -> None:
        """Keep them until the training begins, which has a storage."""
        self._restored = state_dict


def drop_later_lines(file: Path, iteration: int) -> None:
    """Drop the lines of a metrics.json from an iteration on, and a last one that was cut off.

    Its writer has it open for appending, so it has to stay the same file.
    """
    if not file.exists():
        return
    lines = file.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _iteration(line) < iteration]
    same = next((i for i, (a, b) in enumerate(zip(lines, kept)) if a != b), len(kept))
    with file.open("r+b") as stream:
        stream.seek(_length(lines[:same]))
        stream.writelines(kept[same:])
        stream.truncate()


def _iteration(line: bytes) -> float:
    try:
        if line.endswith(b"\n"):
            return json.loads(line)["iteration"]
    except (ValueError, KeyError):
        pass
    return float("inf")


def _length(lines: Iterable[bytes]) -> int:
    return sum(map(len, lines))

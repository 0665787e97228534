"""How a training reacts to signals: it stops after an iteration, and is never cut off in one."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
DUPLICATE_SECONDS = 1.0
"""A terminal, a launcher and a scheduler may each deliver the same signal to a process."""


class StopOnSignal(HookBase):
    """Ends the training after the current iteration if any process receives a signal.

    The signals are SIGTERM, SIGINT and SIGUSR1. The state is saved, and every process exits with
    128 plus the signal's number. A second signal more than a second later ends a process at once.

    It is also a context manager: inside it, and only in the main thread, the signals are handled.

    Attributes:
        received: the signal that this process has received, 0 for none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._time = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        self.received = 0
        if _in_main_thread():
            self._previous = {n: signal.signal(n, self._receive) for n in STOP_SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def after_step(self) -> None:
        """Save and exit if a process has received a signal."""
        number = _maximum_of_processes(self.received)
        if number:
            self.trainer.stop(f"Stopped by {signal.Signals(number).name}", 128 + number)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._time = number, now
            if comm.is_main_process():
                name = signal.Signals(number).name
                os.write(2, f"{name}: stopping after this iteration; again: at once\n".encode())
        elif now - self._time > DUPLICATE_SECONDS:
            os._exit(128 + number)


def _maximum_of_processes(number: int) -> int:
    if comm.get_world_size() == 1:
        return number
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    maximum = torch.tensor(number, device=device)
    dist.all_reduce(maximum, dist.ReduceOp.MAX)
    return int(maximum)


_worker_handler: Any = None


@contextmanager
def lost_workers_raise() -> Iterator[None]:
    """Let PyTorch report a data-loader worker that died, inside this context alone.

    PyTorch raises the error in a handler of SIGCHLD, wherever the main thread happens to be: also
    in the middle of an update of the weights. Enter the context to take the next batch, which finds
    out about earlier deaths within seconds.
    """
    global _worker_handler
    if not _in_main_thread():
        yield
        return
    outside = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
    if _worker_handler:
        signal.signal(signal.SIGCHLD, _worker_handler)
    try:
        yield
    finally:
        _worker_handler = signal.signal(signal.SIGCHLD, outside)


@contextmanager
def forward_signals(processes: list[Any]) -> Iterator[None]:
    """Pass the signals that stop a training on to the processes that take part in it."""

    def forward(number: int, frame: FrameType | None) -> None:
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, number)

    if not _in_main_thread():
        yield
        return
    previous = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()

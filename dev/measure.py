"""What the benchmarks share: memory, and measurements in processes of their own."""

from __future__ import annotations

import ctypes
import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any


def in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a new process; return its result, or None if it failed."""
    # fork does not copy threads, so this process must not compute anything itself.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def call() -> None:
        try:
            sender.send(function(*args))
        except RuntimeError:  # out of memory, or mmcv's concatenation, which has no backward pass
            sender.send(None)

    process = context.Process(target=call)
    process.start()
    sender.close()  # recv then fails if the process is killed
    try:
        return receiver.recv()
    except EOFError:
        return None
    finally:
        process.join()


def return_freed_memory() -> None:
    """Return what is freed to the system at once (glibc), so that every run has the same peak."""
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD


def increase_at_peak(function: Callable[[], Any]) -> int:
    """Call a function; return how far the resident memory of this process rises, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = process_memory("VmRSS")
    function()
    return process_memory("VmHWM") - before


def process_memory(field: str) -> int:
    """Return a memory field of this process in bytes: VmRSS, or its peak VmHWM."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]

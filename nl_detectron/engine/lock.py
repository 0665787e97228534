"""One output folder, one run: a lock that is free again when its process is gone."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from nl_detectron.engine.checkpoint_files import write_atomically

LOCK_FILE = ".lock"
HOLDER_FILE = ".lock.json"
"""Says who holds the lock. It may be left by a run that was killed, the lock is not."""
PATIENCE = 5.0
"""Seconds to wait: processes of a run that was killed may need a moment to end."""


@contextmanager
def run_lock(folder: str | Path) -> Iterator[None]:
    """Hold the lock of an output folder, which is created if needed.

    Raises:
        ValueError: another run holds it, which is named.
        OSError: the folder cannot be written to.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_FILE, timeout=PATIENCE)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"OUTPUT_DIR {folder} is in use by {_holder(folder)}; wait until it has ended, or "
            "choose another OUTPUT_DIR"
        ) from None
    holder = folder / HOLDER_FILE
    try:
        with write_atomically(holder) as file:
            start = datetime.now().astimezone().isoformat(" ", "seconds")
            json.dump({"process": os.getpid(), "host": socket.gethostname(), "start": start}, file)
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _holder(folder: Path) -> str:
    try:
        holder = json.loads((folder / HOLDER_FILE).read_text(encoding="utf-8"))
        return f"process {holder['process']} on {holder['host']} since {holder['start']}"
    except (OSError, ValueError, TypeError, KeyError):  # not written yet
        return "another run"

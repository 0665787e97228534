"""What ends a training, besides signals: which failures a sentence explains, and who is lost."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nl_detectron.engine.loader import UnreadableFile

_LOST = re.compile(r"DataLoader worker|gloo|NCCL|[Cc]onnection (closed|reset) by peer|Broken pipe")
_LOST_PROCESS = "a data-loader worker or another process of the training"


@contextmanager
def explained_errors() -> Iterator[None]:
    """Exit with a sentence on errors that are no fault of the code."""
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        message = str(error) or type(error).__name__
        if isinstance(error, RuntimeError) and not _LOST.search(message):
            raise
        lost = "a data-loader worker" if "DataLoader" in message else _LOST_PROCESS
        first_sentence = message.strip().splitlines()[0].split(". ")[0].rstrip(".")
        raise SystemExit(f"{lost} is lost: {first_sentence}") from error
    except (FloatingPointError, OSError, UnreadableFile) as error:
        raise SystemExit(" ".join(str(error).split())) from error


def is_lost(host: str, pid: int, patience: float = 5.0) -> bool:
    """Return whether a process of this machine has ended, or ends soon."""
    if host != socket.gethostname():
        return False
    end = time.monotonic() + patience
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except ProcessLookupError:
            return True
        except OSError:  # another system than Linux
            state = ""
        if state in ("Z", "X"):  # not yet waited for by its parent
            return True
        time.sleep(0.1)
    return False

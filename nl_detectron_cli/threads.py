"""Configure OpenMP's threads; imports neither PyTorch nor OpenMP."""

from __future__ import annotations

import os


def limit_thread_spinning() -> None:
    """Let idle OpenMP threads spin only briefly before they sleep; call it before importing torch.

    By default they spin for long, more than a thousand times per iteration. If other processes need
    the cores, this makes training several times slower. A value set by the user is respected.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")

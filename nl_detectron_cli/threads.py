"""How the threads of a training wait for each other. Imports neither PyTorch nor OpenMP."""

from __future__ import annotations

import os


def let_threads_sleep() -> None:
    """Let a waiting thread spin only briefly before it sleeps; before PyTorch is imported.

    By default a waiting thread of OpenMP spins for long, more than a thousand times in each
    iteration. Where other work wants the cores, too, that wastes their time, and training takes
    several times as long. A variable that the user has set is left alone.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")

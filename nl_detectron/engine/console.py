"""Console output of the commands: one-line errors, and no warnings about detectron2's own code."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def errors_without_traceback() -> Iterator[None]:
    """Exit with code 1 and a one-line message, instead of a traceback, on invalid user input.

    Wrap the code that reads user input with it: arguments, files, configs. Errors raised elsewhere
    are bugs, and keep their traceback.
    """
    try:
        yield
    except (OSError, ValueError, ModuleNotFoundError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.filename:
            message = f"{error.filename}: {error.strerror}"
        raise SystemExit(" ".join(message.split())) from error


@contextmanager
def suppress_detectron2_warnings() -> Iterator[None]:
    """Hide two PyTorch warnings that only a change to detectron2's code could fix.

    The filters apply to all threads while the context is active.
    """
    with warnings.catch_warnings():
        # on import
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        # in the anchor generator
        warnings.filterwarnings("ignore", "torch.meshgrid: in an upcoming release", UserWarning)
        yield

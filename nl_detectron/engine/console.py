"""What a tool says on the console: mistakes in one sentence, no warning about detectron2's code."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def mistakes_in_one_sentence() -> Iterator[None]:
    """End the program with the message of an error, and exit code 1, instead of a traceback.

    It belongs around the code that reads what a person gave: arguments, files, configs. Errors from
    elsewhere are faults of the code, and keep their traceback.
    """
    try:
        yield
    except (OSError, ValueError, ModuleNotFoundError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.filename:
            message = f"{error.filename}: {error.strerror}"
        raise SystemExit(" ".join(message.split())) from error


@contextmanager
def quiet_detectron2() -> Iterator[None]:
    """Hide two warnings of PyTorch about how detectron2 calls it, which only detectron2 can mend.

    For programs and for imports: within the context, all threads are concerned.
    """
    with warnings.catch_warnings():
        # when it is imported
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        # when it makes anchors
        warnings.filterwarnings("ignore", "torch.meshgrid: in an upcoming release", UserWarning)
        yield

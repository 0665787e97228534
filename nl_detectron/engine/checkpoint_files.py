"""Checkpoint files: written whole or not at all, verified, and found again.

A ``.pth`` file is a zip archive. PyTorch stores a CRC-32 with each of its records but does not
compare it when it loads them; :func:`check_records` does.
"""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch import Tensor

from nl_detectron.safety.checkpoints import read

logger = logging.getLogger("nl_detectron")

TAG_FILE = "last_checkpoint"
"""Names the last checkpoint for detectron2's own tools. We do not rely on it."""
BEST_CHECKPOINT = "model_best"
_PARTIAL = ".partial"


class AtomicPathManager:
    """detectron2's ``PathManager``, except that local files appear complete or not at all."""

    def open(self, path: str, mode: str = "r", **options: Any) -> Any:
        """Open a file; see :func:`write_atomically` for modes "w" and "wb"."""
        if mode in ("w", "wb") and "://" not in path:
            return write_atomically(path, mode)
        return PathManager.open(path, mode, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(PathManager, name)


@contextmanager
def write_atomically(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that replaces ``path`` when it is complete and on disk.

    It is written next to ``path``. If the process is killed or an error occurs before it is
    complete, ``path`` is left as it was. A symbolic link is replaced, not followed.

    Args:
        path: a local file.
        mode: "w" for text in UTF-8, "wb" for bytes.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}{_PARTIAL}")
    partial.unlink(missing_ok=True)  # left by a process that was killed
    try:
        encoding = None if "b" in mode else "utf-8"
        with open(partial, mode.replace("w", "x"), encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # not all network file systems can sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_partial_files(folder: str | Path) -> None:
    """Remove what processes that were killed while writing left in a folder."""
    for path in Path(folder).glob(f".*{_PARTIAL}"):
        path.unlink(missing_ok=True)


def check_records(path: str | Path) -> None:
    """Compare the records of a zip archive with their checksums; other files are not checked.

    Unlike :func:`nl_detectron.safety.checkpoints.read`, it reads all of the file.

    Raises:
        ValueError: a record is damaged.
    """
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            # PyTorch reads nothing for a folder, and leaves its tensor as the memory was.
            folders = [entry.filename for entry in archive.infolist() if entry.external_attr & 16]
    except Exception as error:  # damaged files raise many kinds of errors
        raise ValueError(f"it is damaged: {error}") from error
    if damaged:
        raise ValueError(f"it is damaged: the checksum of {damaged} does not match")
    if folders:
        raise ValueError(f"it is damaged: {folders[0]} is marked as a folder")


def non_finite_tensors(state: Mapping[str, Any]) -> list[str]:
    """Return the names of the tensors that hold NaN or infinite values."""
    return [
        name
        for name, value in state.items()
        if isinstance(value, Tensor)
        and value.is_floating_point()
        # The sum is much faster, but may overflow.
        and not (value.sum().isfinite() or value.isfinite().all())
    ]


def newest_checkpoint(folder: str, *, quiet: bool = False) -> str:
    """Return the valid checkpoint of a training that was saved last; "" if the folder has none.

    The number of the iteration is read from the checkpoints; that with the best score only counts
    if there is no other. Checkpoints that are refused are named in the log, unless it is ``quiet``.
    The main process chooses for all.

    Raises:
        ValueError: the folder has checkpoints, or a tag of one, but all are refused.
    """
    chosen = _newest_checkpoint(folder) if comm.is_main_process() else None
    path, refused = comm.all_gather(chosen)[0]
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    if refused and not path:
        raise ValueError(
            f"OUTPUT_DIR {folder} has no valid checkpoint to resume from ({reasons}); to start "
            "from the beginning, remove the refused files or choose another OUTPUT_DIR"
        )
    if refused and not quiet:
        logger.warning("Refused in %s: %s. Using %s.", folder, reasons, Path(path).name)
    return path


def training_checkpoints(folder: str) -> list[str]:
    """Return the names of the checkpoints that a training left in a folder, also damaged ones."""
    found, damaged = _iterations(folder)
    return sorted([*found, *damaged])


def check_nothing_is_overwritten(folder: str) -> None:
    """Refuse to start a training in a folder that has the checkpoints of another one.

    Raises:
        ValueError: it has checkpoints.
    """
    if names := training_checkpoints(folder):
        more = f" and {len(names) - 1} more" if names[1:] else ""
        raise ValueError(
            f"OUTPUT_DIR {folder} already has checkpoints of a training ({names[0]}{more}); "
            "continue it with --resume, or choose another OUTPUT_DIR"
        )


def _newest_checkpoint(folder: str) -> tuple[str, dict[str, str]]:
    """Return the path, and why other files were refused, by name."""
    found, refused = _iterations(folder)
    best = f"{BEST_CHECKPOINT}.pth"
    chosen = ""
    for name in sorted(found, key=lambda name: (name != best, found[name], name), reverse=True):
        path = os.path.join(folder, name)
        try:
            check_records(path)
            if names := non_finite_tensors(open_checkpoint(path)["model"]):
                raise ValueError(f"{names[0]} is not finite")
        except (OSError, ValueError) as error:
            refused[name] = str(error)
        else:
            chosen = path
            break
    with suppress(FileNotFoundError):
        tag = Path(folder, TAG_FILE).read_bytes().decode(errors="replace").strip()
        if tag not in found and tag not in refused:
            refused[TAG_FILE] = f"it names {tag[:80]!r}, which is no checkpoint of a training"
    return chosen, refused


def _iterations(folder: str) -> tuple[dict[str, int], dict[str, str]]:
    """Return the iteration of each checkpoint of a training by name, and why others are damaged.

    Files with nothing but weights are in neither.
    """
    found, damaged = {}, {}
    for path in sorted(Path(folder).glob("*.pth")):
        try:
            checkpoint = open_checkpoint(str(path))
        except ValueError as error:
            damaged[path.name] = str(error)
            continue
        state = checkpoint.get("trainer", checkpoint)
        iteration = state.get("iteration") if isinstance(state, dict) else None
        if "model" in checkpoint and isinstance(iteration, int):
            found[path.name] = iteration
    return found, damaged


def open_checkpoint(path: str) -> dict[str, Any]:
    """Read a checkpoint, but leave its tensors on the disk until they are used.

    Raises:
        ValueError: it is damaged, or not a checkpoint.
    """
    try:
        if not os.path.getsize(path):
            raise ValueError("it is empty")
        checkpoint = read(path, mmap=True)
    except OSError as error:
        raise ValueError(error.strerror) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model", {}), dict):
        raise ValueError("it is not a checkpoint")
    return checkpoint

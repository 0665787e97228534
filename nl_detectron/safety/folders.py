"""Where outputs may be written: not through a symbolic link that leads out of their folder."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path


def check_output_file(path: str | Path) -> None:
    """Check that writing a file changes nothing outside of its folder.

    Raises:
        ValueError: it is a symbolic link to a file elsewhere; /dev/stdout and its like may be.
    """
    path = Path(path)
    if _leads_out(path, path.parent) and path.parent != Path("/dev"):
        _refuse(path)


def check_output_folder(folder: str | Path, subfolders: Collection[str] = ()) -> None:
    """Check that writing files into a folder changes nothing outside of it.

    Args:
        folder: the folder, which may itself be a symbolic link; it need not exist.
        subfolders: names of those that are written to as well, with all that is in them.

    Raises:
        ValueError: a symbolic link leads out of the folder: one to a file, or in the place of a
            subfolder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return
    for entry in folder.iterdir():
        if _leads_out(entry, folder) and (entry.name in subfolders or not entry.is_dir()):
            _refuse(entry)
        if entry.name in subfolders:
            for parent, folders, files in os.walk(entry):
                for name in (*folders, *files):
                    if _leads_out(Path(parent, name), folder):
                        _refuse(Path(parent, name))


def _leads_out(path: Path, folder: Path) -> bool:
    return path.is_symlink() and not _real(path).is_relative_to(_real(folder))


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # unlike Path.resolve, without an error for cycles


def _refuse(path: Path) -> None:
    raise ValueError(
        f"{path} is a symbolic link to {_real(path)}, which would be overwritten; remove the link "
        "or write elsewhere"
    )

"""Finds the files of the model zoo by their names. Standard library only: commands run it alone."""

from __future__ import annotations

import difflib
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_INSTALLED = _HERE / "configs"  # where setup.py copies them in a wheel
CONFIGS = _INSTALLED if _INSTALLED.is_dir() else _HERE.parents[1] / "configs"


def names() -> list[str]:
    """Return the names of all configs, YAML and Lazy, without those that others are made from."""
    files = (path.relative_to(CONFIGS) for path in _files())
    leaves = (f for f in files if f.parts[0] != "common" and not f.name.startswith("Base-"))
    return sorted(leaf.as_posix() for leaf in leaves)


def get_config_file(config_path: str) -> str:
    """Return the path of a config of this package.

    Args:
        config_path: its name relative to ``configs/``, such as
            "COCO-InstanceSegmentation/mask_rcnn_R_50_NL_FPN_1x.yaml".

    Raises:
        RuntimeError: there is none of this name.
    """
    path = CONFIGS / config_path
    if path not in _files():
        raise RuntimeError(
            f"{config_path} is not in the model zoo{_did_you_mean(config_path)} "
            f"It has {', '.join(names())}"
        )
    return str(path)


def find_config_file(path_or_name: str) -> str:
    """Return the path of a config that is named by its path, or by its name in the model zoo.

    Raises:
        ValueError: it is neither.
    """
    # detectron2 also opens addresses such as https://..., which cannot be looked up here.
    if "://" in path_or_name or Path(path_or_name).is_file():
        return path_or_name
    try:
        return get_config_file(path_or_name)
    except RuntimeError:
        raise ValueError(
            f"{path_or_name} is neither a file nor in the model zoo of nl_detectron"
            f"{_did_you_mean(path_or_name)}"
        ) from None


def _files() -> list[Path]:
    return [path for path in CONFIGS.rglob("*") if path.suffix in (".yaml", ".py")]


def _did_you_mean(name: str) -> str:
    nearest = difflib.get_close_matches(name, names(), n=1)
    return f"; did you mean {nearest[0]}?" if nearest else "."

"""Reading and writing checkpoints, without running code that a file may contain."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nl_detectron.safety.checkpoints import read, safetensors
from nl_detectron.safety.folders import check_output_file
from nl_detectron.weights.dialects import DIALECTS, Dialect

SUFFIXES = (".pth", ".pt", ".pyth", ".pkl", ".safetensors")


def load(path: str | Path) -> tuple[dict[str, Any], list[str]]:
    """Load the state dict of a checkpoint.

    No file can run code: see :func:`nl_detectron.safety.checkpoints.read`.

    Returns:
        The state dict, and the names of the other entries in the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown suffix, a damaged file, or one with other objects, the first of which
            is named.
        ModuleNotFoundError: a ``.safetensors`` file, but the package ``safetensors`` is missing.
    """
    path = check_suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        data = read(path)
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    known_keys = {dialect.state_dict_key for dialect in DIALECTS.values()}
    other_entries: list[str] = []
    if isinstance(data, dict):
        for key in data:
            if key in known_keys and isinstance(data[key], dict):
                data, other_entries = data[key], [str(other) for other in data if other != key]
                break
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ValueError(f"{path} holds a {type(data).__name__}, not a dictionary of named tensors")
    return data, other_entries


def save(state: Mapping[str, Tensor], path: str | Path, dialect: Dialect) -> None:
    """Write a state dict in the format of the suffix, under the key that the dialect's readers use.

    In a ``.pkl`` tensors become arrays; a ``.safetensors`` file holds nothing but tensors.

    Raises:
        ValueError: an unknown suffix, bfloat16 in a ``.pkl``, since numpy does not have it, or a
            symbolic link to a file elsewhere.
        ModuleNotFoundError: a ``.safetensors`` file, but the package ``safetensors`` is missing.
    """
    path = check_suffix(path)
    check_output_file(path)
    if path.suffix == ".safetensors":
        safetensors().save_file(dict(state), path)
        return
    values: dict[str, Any] = dict(state)
    if path.suffix == ".pkl":
        if any(value.dtype == torch.bfloat16 for value in values.values()):
            raise ValueError(f"{path}: arrays cannot hold bfloat16; write .pth or .safetensors")
        values = {name: value.numpy() for name, value in values.items()}
    key = dialect.state_dict_key
    data: dict[str, Any] = {key: values} if key else values
    if dialect.backbone is None:
        data["__author__"] = "nl_detectron"
        # Lets detectron2 load a ResNet into the backbone of a detector.
        data["matching_heuristics"] = not any(name.startswith("backbone.") for name in values)
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(data))
    else:
        torch.save(data, path)


def to_tensor(value: Any) -> Tensor | None:
    """Copy a tensor or an array of numbers into a new tensor; ``None`` for anything else."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        value = torch.from_numpy(np.array(value))
    if not isinstance(value, Tensor):
        return None
    return value.detach().clone(memory_format=torch.contiguous_format)


def check_suffix(path: str | Path) -> Path:
    """Return the path if its suffix is one of :data:`SUFFIXES`, else raise ``ValueError``."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: the suffix must be one of {SUFFIXES}, got {path.suffix!r}")
    return path

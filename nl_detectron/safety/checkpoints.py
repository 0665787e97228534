"""Reading checkpoints, without running code that they may contain."""

from __future__ import annotations

import io
import math
import os
import pickle
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from nl_detectron.safety.pickles import (
    NUMPY,
    Globals,
    RestrictedUnpickler,
    check_extent,
    read_pickle,
)


def read(path: str | Path, *, mmap: bool = False) -> Any:
    """Read what a checkpoint holds.

    A ``.pkl`` is read by an unpickler that makes only arrays, numbers, strings and containers of
    them, a ``.safetensors`` file by its library, and all others with
    ``torch.load(weights_only=True)``, after a check that the file is as large as what it asks for.

    Args:
        path: a local file.
        mmap: leave the tensors of a file that torch wrote on the disk until they are used.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is damaged, holds other objects, the first of which is named, or asks for
            more memory than its size explains; the message does not name the file.
        ModuleNotFoundError: a ``.safetensors`` file, but the package ``safetensors`` is missing.
    """
    path = Path(path)
    if path.suffix == ".pkl":
        with one_kind_of_error():
            return read_pickle(path)
    if path.suffix == ".safetensors":
        with one_kind_of_error():
            return safetensors().load_file(path)
    with one_kind_of_error(), checked_torch_file(path):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap or None)


class Refused(ValueError):
    """A file is damaged, or holds what is not read."""


@contextmanager
def checked_torch_file(path: str | Path) -> Iterator[None]:
    """Check a file that torch wrote; in the context, torch loads it, with numpy's numbers.

    Raises:
        OSError: the file cannot be opened.
        ValueError: as :func:`read`.
    """
    with one_kind_of_error():
        _check_torch_file(Path(path))
    with _numpy_allowed():
        yield


def safetensors() -> Any:
    """Return the module ``safetensors.torch``."""
    try:
        return import_module("safetensors.torch")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            ".safetensors files need the package safetensors: pip install safetensors",
            name=error.name,
        ) from None


@contextmanager
def one_kind_of_error() -> Iterator[None]:
    """Raise a ``ValueError`` for whatever a damaged file raises."""
    try:
        yield
    except (OSError, ModuleNotFoundError, Refused):
        raise
    except Exception as error:  # a damaged file raises almost anything
        message = str(error)
        if not isinstance(error, pickle.UnpicklingError) or "weights_only" in message:
            message = f"it is damaged, or another kind of file ({type(error).__name__})"
        raise Refused(message) from error


class _Storage(NamedTuple):
    """Stands for a tensor's memory while a file is checked."""

    nbytes: int
    itemsize: int


class _Tensor(NamedTuple):
    """Stands for a tensor while a file is checked."""

    nbytes: int


# torch's types of memory, by the bytes of a number.
_STORAGES = {"UntypedStorage": 1} | {
    f"{name}Storage": size
    for size, names in {
        1: "Bool Byte Char",
        2: "BFloat16 Half Short",
        4: "Float Int",
        8: "ComplexFloat Double Long",
        16: "ComplexDouble",
    }.items()
    for name in names.split()
}


def _tensor(storage: _Storage, offset: int, size: tuple[int, ...], *_: Any) -> _Tensor:
    return _Tensor(math.prod(size) * storage.itemsize)


def _tensor_of_type(
    storage: _Storage, offset: int, size: tuple[int, ...], *rest: Any
) -> _Tensor:  # the dtype is the last but one, or the last
    itemsize = next(value.itemsize for value in rest if isinstance(value, torch.dtype))
    return _Tensor(math.prod(size) * itemsize)


def _first(value: Any, *_: Any) -> Any:
    return value


def _from_type(function: Callable[..., Any], _: Any, arguments: tuple[Any, ...], state: Any) -> Any:
    return function(*arguments), state


def _all(*values: Any) -> tuple[Any, ...]:
    return values


_TORCH: Globals = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_type,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _all,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("torch.nn.parameter", "Parameter"): "a type",  # which may be named, but not called
    ("torch", "Tensor"): "a type",
    ("torch", "Size"): _first,
    ("torch", "device"): _all,
}


class _Checker(RestrictedUnpickler):
    """Reads the description of the tensors in a file that torch wrote, without making them."""

    def __init__(self, file: IO[bytes], size_of: Callable[[str], int]):
        super().__init__(file, _TORCH)
        self._size_of = size_of

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        value = getattr(torch, name, None) if module == "torch" else None
        return value if isinstance(value, torch.dtype) else super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        kind, itemsize, key, _, count, *_ = pid
        storage = _Storage(count * itemsize, itemsize)
        if kind != "storage" or storage.nbytes > self._size_of(key):
            raise pickle.UnpicklingError(
                f"{kind} {key} has {storage.nbytes} bytes, more than are in the file"
            )
        return storage


def _check_torch_file(path: Path) -> None:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(4) == b"PK\x03\x04":  # as torch decides
            with zipfile.ZipFile(file) as archive:
                data = _check_archive(archive, size)
        else:  # before torch 1.6: a number, a version, facts about the system, the data
            file.seek(0)
            data = [_Checker(file, lambda _: size).load() for _ in range(4)]
    check_extent(data, size)


def _check_archive(archive: zipfile.ZipFile, size: int) -> list[Any]:
    records = archive.infolist()
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise pickle.UnpicklingError("it is compressed, which torch never writes")
    names = Counter(record.filename.lower() for record in records)  # torch ignores the case
    if max(names.values(), default=0) > 1 or sum(record.file_size for record in records) > size:
        raise pickle.UnpicklingError("its records overlap")
    folder = records[0].filename.partition("/")[0]
    sizes = {record.filename: record.file_size for record in records}
    file = io.BytesIO(archive.read(f"{folder}/data.pkl"))  # all of it, so that its CRC is compared
    return [_Checker(file, lambda key: sizes.get(f"{folder}/data/{key}", -1)).load()]


def _numpy_allowed() -> AbstractContextManager[None]:
    """Let torch make numpy's numbers and arrays, which detectron2's checkpoints may hold."""
    if torch.__version__ < "2.6":  # refuses them
        return nullcontext()
    names: list[Any] = [(function, ".".join(name)) for name, function in NUMPY.items()]
    return torch.serialization.safe_globals(names)

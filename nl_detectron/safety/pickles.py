"""Pickles of numbers, read without running code, in time and memory bounded by the file's size."""

from __future__ import annotations

import itertools
import math
import os
import pickle
from collections import Counter, OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np

REFUSAL = (
    "it contains {}; only tensors, arrays, numbers, strings, and dictionaries and lists of them "
    "are loaded, because anything else could run code"
)

# A file may refer to the same tensor several times, as heads shared by several levels do, but not
# so often that converting it would fill the memory.
MAX_GROWTH = 16
MAX_DEPTH = 100
MAX_ENTRIES = 10_000_000


class DType:
    """Stands for ``numpy.dtype`` in a pickle: those of numbers alone."""

    def __init__(self, name: str, *_: Any):
        """Take the arguments that numpy writes, of which the first is the name."""
        self.dtype = np.dtype(str(name))
        if self.dtype.kind not in "biufc":
            raise pickle.UnpicklingError(REFUSAL.format(f"an array of {self.dtype}"))

    def __setstate__(self, state: Any) -> None:
        """Take the state that numpy writes: a version, the byte order, and nothing for numbers."""
        self.dtype = self.dtype.newbyteorder(state[1])

    def check(self, data: Any, shape: tuple[int, ...]) -> bytes:
        """Return the bytes of an array, as strings in Python 2, if they fill its shape."""
        data = data.encode("latin1") if isinstance(data, str) else data
        if not isinstance(data, (bytes, bytearray)):  # bytes(10**12) would make as many
            raise pickle.UnpicklingError(REFUSAL.format(f"an array of a {type(data).__name__}"))
        if min(shape, default=0) < 0 or math.prod(shape) * self.dtype.itemsize != len(data):
            raise pickle.UnpicklingError(f"an array of shape {shape} has {len(data)} bytes")
        return bytes(data)


class Array(np.ndarray):
    """Stands for ``numpy.ndarray`` in a pickle; empty until it is given its state."""

    def __new__(cls) -> Array:
        """Take no size, since numpy writes it with the bytes."""
        return super().__new__(cls, 0, np.int8)

    def __setstate__(self, state: Any) -> None:
        """Take the state that numpy writes, and check that the bytes fill the shape."""
        *_, shape, dtype, fortran, data = state
        checked: Any = (1, shape, dtype.dtype, bool(fortran), dtype.check(data, shape))
        super().__setstate__(checked)


def _scalar(dtype: DType, data: Any) -> Any:
    return np.frombuffer(dtype.check(data, ()), dtype.dtype)[0]


def _from_buffer(data: Any, dtype: DType, shape: tuple[int, ...], order: Any) -> np.ndarray:
    flat = np.frombuffer(dtype.check(data, shape), dtype.dtype)
    return flat.reshape(shape, order=order).copy()


def _new_array(kind: type, shape: tuple[int, ...], dtype: Any) -> Array:
    if kind is not Array or shape != (0,):
        raise pickle.UnpicklingError(REFUSAL.format(f"an array of {kind} and shape {shape}"))
    return Array()


def _encode(text: str, encoding: str) -> bytes:
    """Stand for ``_codecs.encode``, which Python 2's protocols use for bytes."""
    if encoding != "latin1":  # such as hex, which doubles its input
        raise pickle.UnpicklingError(REFUSAL.format(f"text encoded as {encoding}"))
    return text.encode("latin1")


Globals = dict[tuple[str, str], Any]
"""What a pickle may name: module and name -> what it is replaced by."""

NUMPY: Globals = {
    ("numpy", "ndarray"): Array,
    ("numpy", "dtype"): DType,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _new_array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}

_GLOBALS: Globals = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "Counter"): Counter,
    ("_codecs", "encode"): _encode,
    **{(builtins, "set"): set for builtins in ("builtins", "__builtin__")},
    **{(builtins, "bytes"): lambda: b"" for builtins in ("builtins", "__builtin__")},
    **{(builtins, "complex"): complex for builtins in ("builtins", "__builtin__")},
    **NUMPY,
}


_Unpickler: Any = pickle._Unpickler  # whose instructions can be replaced, unlike those in C


class RestrictedUnpickler(_Unpickler):
    """Makes arrays, numbers, strings and containers of them, and calls nothing else."""

    dispatch = dict(_Unpickler.dispatch)

    def __init__(self, file: IO[bytes], globals: Globals | None = None):
        """Read from the file; ``globals`` are allowed in addition."""
        super().__init__(file, encoding="latin1")  # for arrays of Python 2
        self.globals = {**_GLOBALS, **(globals or {})}

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name, or refuse it."""
        if (module, name) not in self.globals:
            raise pickle.UnpicklingError(REFUSAL.format(f"{module}.{name}"))
        return self.globals[module, name]

    def load_build(self) -> None:
        """Set the state of arrays, and the versions that a module's state dict carries."""
        state, instance = self.stack[-1], self.stack[-2]
        versions = isinstance(instance, OrderedDict) and set(state) <= {"_metadata"}
        if not (versions or isinstance(instance, (Array, DType))):
            raise pickle.UnpicklingError(REFUSAL.format(f"a state of {type(instance).__name__}"))
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build

    def load_put(self) -> None:
        """Remember a value under a number, for which Python's reader in C has an array."""
        super().load_put()
        self._check_memo()

    dispatch[pickle.PUT[0]] = load_put

    def load_long_binput(self) -> None:
        """Do the same; the number is written in binary."""
        super().load_long_binput()
        self._check_memo()

    dispatch[pickle.LONG_BINPUT[0]] = load_long_binput

    def load_bytearray8(self) -> None:
        """Read bytes before there is room for them, which the file may say are many."""
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8

    def _check_memo(self) -> None:
        if next(reversed(self.memo)) > MAX_ENTRIES:
            raise pickle.UnpicklingError(f"it numbers more than {MAX_ENTRIES} values")


def read_pickle(path: str | Path, globals: Globals | None = None) -> Any:
    """Read a pickle that holds arrays, numbers, strings and containers of them.

    What passes here does no harm to those who read it again with ``pickle.load``.

    Args:
        path: a local file.
        globals: what the pickle may name in addition.

    Raises:
        OSError: the file cannot be read.
        pickle.UnpicklingError: it holds anything else, which is named, or asks for more memory than
            its size explains. A damaged file raises almost any exception.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = RestrictedUnpickler(file, globals).load()
    check_extent([data], size)
    return data


def check_extent(data: Iterable[Any], size: int) -> None:
    """Check what was read from a file of ``size`` bytes, which may refer to its parts many times.

    Raises:
        pickle.UnpicklingError: the parts are nested too deeply, or are too many or too large when
            each is counted as often as it occurs.
    """
    entries = total = 0
    level = list(data)
    for _ in range(MAX_DEPTH):
        containers = [value for value in level if isinstance(value, (dict, list, tuple, set))]
        total += sum(getattr(value, "nbytes", 0) for value in level)
        entries += sum(len(container) for container in containers)
        if entries > MAX_ENTRIES:
            raise pickle.UnpicklingError(f"it holds more than {MAX_ENTRIES} entries")
        if total > MAX_GROWTH * size:
            raise pickle.UnpicklingError(
                f"it asks for {total} bytes of tensors, more than {MAX_GROWTH} times its size"
            )
        if not containers:
            return
        dicts = (values for values in containers if isinstance(values, dict))
        level = [*itertools.chain(*containers), *itertools.chain(*(d.values() for d in dicts))]
    raise pickle.UnpicklingError(f"its entries are nested more than {MAX_DEPTH} levels deep")

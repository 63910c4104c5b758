"""Pickles read without running anything that stands in them.

Of a pickle only tensors, arrays and containers are built. Data beside them becomes an `Inert`, and
so does what is never built; `refused` finds the latter, and says by its key where it stands.
"""

from __future__ import annotations

import io
import pickle
import reprlib
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any, ClassVar

import numpy as np
import torch

# What stands among the first bytes of torch.save's first format, which is no zip archive.
LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


class Inert:
    """Stands for an object that is not built: takes what pickle hands it, and does nothing."""

    # The global that would have made it, where that is none of the harmless ones.
    origin: ClassVar[str] = ""
    held: list[Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        self = super().__new__(cls)
        self.held = [args]
        return self

    def __call__(self, *args: Any) -> Inert:
        return type(self)(*args)

    def __setstate__(self, state: Any) -> None:
        self.held.append(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.held += [key, value]

    def append(self, item: Any) -> None:
        self.held.append(item)

    def extend(self, items: Any) -> None:
        self.held.extend(items)


class PickledDtype:
    """An array's type: of numbers or text, never of objects."""

    def __init__(self, spec: Any, *flags: Any) -> None:
        self.dtype = np.dtype(str(spec))

    def __setstate__(self, state: tuple) -> None:
        # What follows the byte order, NumPy would believe: sizes, and whether there are objects.
        self.dtype = self.dtype.newbyteorder(state[1])


class PickledArray:
    """An array, built from its bytes; ``array`` is None where it holds objects."""

    def __init__(self, *args: Any) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        shape, dtype, fortran, data = state[-4:]
        self.fill(data, dtype, shape, "F" if fortran else "C")

    def fill(self, data: Any, dtype: PickledDtype, shape: Any, order: Any) -> None:
        if dtype.dtype.hasobject:
            return
        if isinstance(data, str):  # a byte string of Python 2
            data = data.encode("latin1")
        self.array = np.ndarray(shape, dtype.dtype, buffer=data, order=order)
        if self.array.nbytes != len(data):
            raise ValueError(f"an array of {self.array.nbytes} bytes has {len(data)}")


def _from_buffer(
    data: Any, dtype: PickledDtype, shape: Any, order: Any, axes: Any = None
) -> PickledArray:
    pickled = PickledArray()
    pickled.fill(data, dtype, shape, "F" if order == "F" else "C")
    if axes is not None and pickled.array is not None:
        pickled.array = pickled.array.transpose(axes)
    return pickled


def _latin1(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


def _plain_dict(*args: Any) -> dict:
    return {}


def _plain_list(*args: Any) -> list:
    return []


def _storage(data: bytes) -> Any:
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise pickle.UnpicklingError(_damaged(error)) from error


# What trainers keep beside the weights: data of the standard library, NumPy's and torch's.
_BESIDE = {
    "argparse.Namespace", "types.SimpleNamespace", "collections.Counter",
    "builtins.bytearray", "builtins.complex", "builtins.range", "builtins.slice",
    "builtins.bool", "builtins.dict", "builtins.float", "builtins.int", "builtins.list",
    "builtins.str", "builtins.tuple",
    "datetime.date", "datetime.datetime", "datetime.time", "datetime.timedelta",
    "datetime.timezone", "decimal.Decimal", "fractions.Fraction", "uuid.UUID",
    "numpy.bool_", "numpy.ndarray", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
    "torch.torch_version.TorchVersion",
}  # fmt: skip
_BESIDE |= {
    f"{module}.{flavour}Path"
    for module in ("pathlib", "pathlib._local")
    for flavour in ("", "Pure", "Posix", "PurePosix", "Windows", "PureWindows")
}
_BESIDE |= {f"numpy.{kind.__name__}" for kind in np.sctypeDict.values()}

# Every global that a checkpoint may name, and what is put in its place.
_SAFE: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_BESIDE, Inert),
    "_codecs.encode": _latin1,
    "builtins.frozenset": frozenset,
    "builtins.set": set,
    "collections.OrderedDict": OrderedDict,
    "collections.defaultdict": _plain_dict,
    "collections.deque": _plain_list,
    "numpy.dtype": PickledDtype,
    **{f"numpy.{core}.multiarray._reconstruct": PickledArray for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _from_buffer for core in ("core", "_core")},
}
# What tensors consist of in a plain pickle; torch.load knows its own.
_TENSORS: dict[str, Any] = {
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch.storage._load_from_bytes": _storage,
    **{str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)},
}


# The unpickler in C allocates as much memory as an index of its memo says.
class _Unpickler(pickle._Unpickler):
    """Builds what is safe; everything else becomes an `Inert` that says what it would have been."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if module == "__builtin__":  # Python 2's name
            module = "builtins"
        full = f"{module}.{name}"
        made = self.known(full)
        if made is None:
            return type("Refused", (Inert,), {"origin": full})
        # A pickle may set attributes of what it names: never those of a function that others use.
        return partial(made) if isinstance(made, FunctionType) else made

    def known(self, full: str) -> Any:
        return _SAFE.get(full, _TENSORS.get(full))

    def load_bytearray8(self: Any) -> None:
        # Python's own fills as much memory as the length says, however long the file is.
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(length)))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


class _Outline(_Unpickler):
    """What torch.save's pickle consists of, without its tensors."""

    def known(self, full: str) -> Any:
        module, _, name = full.rpartition(".")
        if (
            full in _TENSORS
            or (module == "torch" and name.endswith(("Storage", "Tensor")))
            or module in ("torch._utils", "torch._tensor", "torch.serialization", "torch.storage")
            or module == "torch.nn.parameter"
        ):
            return Inert
        return _SAFE.get(full)

    def persistent_load(self, pid: Any) -> Any:
        # Of a module, torch's first format keeps the class together with its source.
        return pid[1] if isinstance(pid, tuple) and pid[0] == "module" else Inert(pid)


def load_pickle(path: Path) -> Any:
    """What a plain pickle holds.

    Raises:
        pickle.UnpicklingError: it is damaged, or names what is never built.
        EOFError: it ends too early.
    """
    with path.open("rb") as file:
        content = _load(_Unpickler(file, encoding="latin1"))
    reason = refused(content)
    if reason:
        raise pickle.UnpicklingError(reason)
    return content


def load_torch(path: Path) -> Any:
    """What a file of torch.save holds, in either of its formats.

    Raises:
        pickle.UnpicklingError: it is damaged, or names what is never built.
    """
    safe: Any = [(made, name) for name, made in _SAFE.items()]
    try:
        # Of a path, torch.load would look at the suffix.
        with path.open("rb") as file, torch.serialization.safe_globals(safe):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise pickle.UnpicklingError(_refused_by_torch(path) or _damaged(error)) from error
    except (LookupError, TypeError, AttributeError) as error:
        raise pickle.UnpicklingError(_damaged(error)) from error


def _refused_by_torch(path: Path) -> str:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive, archive.open(pickle_of(archive) or "") as file:
                return refused(_Outline(file).load())
        with path.open("rb") as file:
            for _ in ("magic number", "version", "machine"):
                _Outline(file).load()
            return refused(_Outline(file).load())
    except Exception:  # damaged as well
        return ""


def pickle_of(archive: zipfile.ZipFile) -> str | None:
    """Name of the entry in which torch.save keeps its pickle, None where there is none."""
    names = (name for name in archive.namelist() if name.count("/") == 1)
    return next((name for name in names if name.endswith("/data.pkl")), None)


def _load(unpickler: pickle._Unpickler) -> Any:
    try:
        return unpickler.load()
    except (EOFError, pickle.UnpicklingError):
        raise
    except Exception as error:  # bytes that are no pickle fail in as many ways as it has opcodes
        raise pickle.UnpicklingError(_damaged(error)) from error


def _damaged(error: Exception) -> str:
    # torch hides the cause behind advice to load the file without any protection.
    error = error.__context__ if isinstance(error.__context__, Exception) else error
    text = (str(error).strip() or "no reason given").splitlines()[0]
    return f"its pickle is damaged ({type(error).__name__}: {text})"


def refused(content: Any) -> str:
    """What a file holds that is never built, as part of a sentence; empty for nothing."""
    for keys, item in _walk(content):
        if origin := getattr(item, "origin", ""):
            what = f"an object of {origin}"
            if not keys:
                return f"it is {what}, not a dict of names and weights: {_REMEDY}"
            below = " > ".join(map(reprlib.repr, keys))
            return f"it holds {what} below {below}, which is never unpickled: {_REMEDY}"
    return ""


_REMEDY = (
    "save the weights alone, for instance torch.save({'model': model.state_dict()}, 'weights.pth')"
)


def _walk(content: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Everything in a pickle's content, each once, with the keys under which it stands."""
    waiting: list[tuple[tuple[Any, ...], Any]] = [((), content)]
    seen = set()
    while waiting:
        keys, item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        yield keys, item
        if isinstance(item, Mapping):
            # Three keys are as many as are told.
            inner = [
                ((*keys, key)[:3], part) for key, value in item.items() for part in (value, key)
            ]
        elif isinstance(item, list | tuple | set | frozenset):
            inner = [(keys, part) for part in item]
        elif isinstance(item, Inert):
            inner = [(keys, part) for part in item.held]
        else:
            continue
        waiting += reversed(inner)

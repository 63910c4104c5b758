"""Checkpoint files read without ever running what is pickled in them."""

from __future__ import annotations

import codecs
import json
import reprlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from expedite_d2.d2.checkpoint.checkpointer import why_unreadable
from expedite_d2.d2.checkpoint.unpickling import (
    LEGACY_MAGIC,
    PickledArray,
    load_pickle,
    load_torch,
    pickle_of,
)
from expedite_d2.d2.checkpoint.wrappings import state_dict_in

# What is found in place of weights, by how it begins.
_OTHER_FORMATS = {
    b"version https://git-lfs": "it is a git-lfs pointer, not the file itself: run git lfs pull",
    b"<!doctype": "it is a web page, not the file that the address was for",
    b"<html": "it is a web page, not the file that the address was for",
    b"<?xml": "it is XML, such as a server's error, not the file that the address was for",
    b"{": "it is JSON: where it is an index of shards, give its directory",
    b"\x1f\x8b": "it is compressed with gzip: unpack it",
    b"BZh": "it is compressed with bzip2: unpack it",
    b"\xfd7zXZ": "it is compressed with xz: unpack it",
    b"\x28\xb5\x2f\xfd": "it is compressed with zstd: unpack it",
    b"7z\xbc\xaf": "it is a 7z archive: unpack it",
    b"\x89HDF": "it is HDF5, as Keras writes it, not weights of PyTorch",
    b"\x93NUMPY": "it is a single NumPy array, not a dict of names and weights",
}
# The numbers that weights are made of.
_NUMBERS = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool,
    torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint64, torch.uint32, torch.uint16, torch.uint8,
}  # fmt: skip
# Messages quote names.
_LONGEST_NAME = 500
# The bit of a zip entry's attributes that marks a folder.
_DOS_FOLDER = 0x10
# Headers of safetensors are no longer than this.
_LONGEST_HEADER = 100_000_000


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Names and tensors of a checkpoint file, or of a transformers directory.

    Args:
        path: a file of safetensors, of torch.save or, as in Detectron2's model zoo, of pickle,
            whatever its suffix; a directory with ``config.json`` and weights, in one file or in
            shards; or the directory of a Segmenter release, ``checkpoint.pth`` beside
            ``variant.yml``. The weights may stand below one of ``wrappings.CONTAINERS``; of
            several, the first is taken, and the log says so. A file of ``export --base`` has its
            backbone in the file beside it that its ``base`` names.

    Returns:
        The state dict, on the CPU.

    Raises:
        FileNotFoundError: nothing there, or a directory without weights.
        ValueError: a file that cannot be read, that holds no state dict, or that holds objects
            other than numbers, arrays and the like, none of which is ever built.
    """
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} not found")
    files = _weights_of_directory(path) if path.is_dir() else [path]
    state: dict[str, Tensor] = {}
    for file in files:
        shard = _read_file(file)
        twice = next((name for name in shard if name in state), None)
        if twice is not None:
            raise ValueError(f"{path} holds {twice} in more than one of its shards")
        state |= shard
    return state


def backbone_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a state dict of this project's names that is the backbone."""
    return {name: tensor for name, tensor in state.items() if name.startswith("backbone.")}


def _weights_of_directory(path: Path) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        whole, index = path / name, path / f"{name}.index.json"
        if whole.is_file():
            return [whole]
        if index.is_file():
            return [path / shard for shard in _shards(index)]
    if (path / "variant.yml").is_file() and (path / "checkpoint.pth").is_file():
        return [path / "checkpoint.pth"]
    raise FileNotFoundError(
        f"{path} holds no weights: expected model.safetensors or pytorch_model.bin beside "
        "config.json, or checkpoint.pth beside variant.yml"
    )


def _shards(index: Path) -> list[str]:
    """Names of the files that an index of shards lists, each once."""
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f'{index} is no index of shards: expected JSON with a "weight_map" of names to files '
            f"({error})"
        ) from error
    wrong = [name for name in names if not _is_file_name(name)]
    if wrong:
        raise ValueError(f"{index} must list files beside it, got {reprlib.repr(wrong[0])}")
    return sorted(names)


def _is_file_name(name: Any) -> bool:
    return (
        isinstance(name, str)
        and "\0" not in name
        and Path(name).name == name
        and name not in ("", "..")
    )


def _read_file(path: Path) -> dict[str, Tensor]:
    content = _content(path)
    state = _tensors(path, content)
    base = content.get("base") if isinstance(content, Mapping) else None
    if base is None:
        return state
    if not _is_file_name(base):
        raise ValueError(
            f"{path}: base must be the name of a file beside it, got {reprlib.repr(base)}"
        )
    beside = path.with_name(base)
    if not beside.is_file():
        raise FileNotFoundError(f"{path} has its backbone in {beside}, which is not found")
    return backbone_of(_tensors(beside, _content(beside))) | state


def _content(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} not found")
    try:
        return _unpack(path)
    except Exception as error:  # corrupt files fail in as many ways as there are readers
        # Readers quote what they find, which may be the whole file.
        reason = why_unreadable(path, error)[:400]
        raise ValueError(f"{path} is not a readable checkpoint: {reason}") from error


def _tensors(path: Path, content: Any) -> dict[str, Tensor]:
    state = {}
    for key, value in state_dict_in(path, content).items():
        if isinstance(value, Tensor | PickledArray):
            name = str(key)
            if len(name) > _LONGEST_NAME or not name.isprintable():
                raise ValueError(f"{path}: {reprlib.repr(name)} is no name of a weight")
            state[name] = _tensor(path, name, value)
    return state


def _tensor(path: Path, name: str, value: Tensor | PickledArray) -> Tensor:
    """A plain tensor: what only looks like one would fail when half the model is loaded."""
    if isinstance(value, PickledArray):
        if value.array is None:
            raise ValueError(f"{path}: {name} must be numbers, got an array of objects")
        array = value.array
        try:
            # A copy in this machine's byte order: the array itself is read-only.
            return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
        except TypeError as error:
            raise ValueError(f"{path}: {name} must be numbers, got {array.dtype}") from error
    kinds = {
        "quantised": value.is_quantized,
        "nested": value.is_nested,
        "sparse": value.layout is not torch.strided,
        "meta": value.is_meta,
        str(value.dtype).removeprefix("torch."): value.dtype not in _NUMBERS,
    }
    kind = next((kind for kind, holds in kinds.items() if holds), None)
    if kind is not None:
        raise ValueError(f"{path}: {name} must be a dense tensor of real numbers, got a {kind} one")
    return value.detach()


def _unpack(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(512)
    # The kind is what the file begins with: suffixes are given as it happens.
    if int.from_bytes(start[:8], "little") < _LONGEST_HEADER and start[8:9] == b"{":
        return load_file(path)
    if start.startswith(b"PK"):
        _check_archive(path)
        return load_torch(path)
    if LEGACY_MAGIC in start[:32]:
        _check_protocol(start)
        return load_torch(path)
    text = start.lstrip(codecs.BOM_UTF8 + b" \t\r\n").lower()
    for magic, what in _OTHER_FORMATS.items():
        if text.startswith(magic.lower()):
            raise ValueError(what)
    if start[257:262] == b"ustar":
        raise ValueError("it is a tar archive: unpack it")
    return load_pickle(path)


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise ValueError(
                "it is a TorchScript archive, which is a program: save its state_dict() instead"
            )
        name = pickle_of(archive)
        if name is None:
            first = ", ".join(entry.filename[:40] for entry in entries[:3]) or "nothing"
            raise ValueError(f"it is a zip archive, but not torch.save's: it holds {first}")
        with archive.open(name) as file:
            _check_protocol(file.read(2))
        for entry in entries:
            # torch reads zeros from a file that says that it is a folder.
            if entry.external_attr & _DOS_FOLDER and not entry.is_dir():
                raise ValueError(f"its entry {entry.filename} says that it is a folder")
            # torch does not compare checksums; it writes 0 where it was told to compute none.
            if entry.CRC:
                with archive.open(entry) as file:
                    while file.read(1 << 20):
                        pass


def _check_protocol(start: bytes) -> None:
    if start[0] == 0x80 and start[1] > 2:
        raise ValueError(
            f"it is pickled with protocol {start[1]}, of which torch reads no weights safely: save "
            "it again without pickle_protocol"
        )

"""Checkpoint files read without ever running what is pickled in them."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from expedite_d2.d2.common import why_unreadable

# What Detectron2's and Mask2Former's pickles consist of: arrays, tensors and containers.
_ALLOWED = {
    ("collections", "OrderedDict"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy.core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "FloatStorage"),
    ("torch", "HalfStorage"),
    ("torch", "LongStorage"),
}


class _ArrayUnpickler(pickle.Unpickler):
    """Refuses every global that is not needed to rebuild an array or a tensor."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return lambda data: torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is not an array")
        return super().find_class(module, name)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Names and tensors of a checkpoint file, or of a transformers directory.

    Args:
        path: .safetensors; .pth, .pt or .bin of torch.save; .pkl of Detectron2's model zoo; or a
            directory with ``config.json`` and weights, in one file or in shards. A file of
            ``export --base`` has its backbone in the file beside it that its ``base`` names.

    Returns:
        The state dict, on the CPU.

    Raises:
        FileNotFoundError: nothing there, or a directory without weights.
        ValueError: a file that cannot be read, or that holds no state dict.
    """
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} not found")
    files = _weights_of_directory(path) if path.is_dir() else [path]
    state: dict[str, Tensor] = {}
    for file in files:
        state |= _read_file(file)
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
    raise FileNotFoundError(
        f"{path} holds no weights: expected model.safetensors or pytorch_model.bin beside "
        "config.json"
    )


def _shards(index: Path) -> list[str]:
    """Names of the files that an index of shards lists, each once."""
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{index} is no index of shards: expected JSON with a "weight_map" of names to files '
            f"({error})"
        ) from error


def _read_file(path: Path) -> dict[str, Tensor]:
    content = _content(path)
    state = _tensors(path, content)
    base = content.get("base") if isinstance(content, Mapping) else None
    if base is None:
        return state
    if not isinstance(base, str) or Path(base).name != base:
        raise ValueError(f"{path}: base must be the name of a file beside it, got {base!r}")
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
        reason = why_unreadable(path, error)
        raise ValueError(f"{path} is not a readable checkpoint: {reason}") from error


def _tensors(path: Path, content: Any) -> dict[str, Tensor]:
    """The state dict in what a file holds, which may have it under a key."""
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{path} holds no state dict: expected names and tensors, got {type(content).__name__}"
        )
    state = {
        str(name): torch.as_tensor(value)
        for name, value in content.items()
        if isinstance(value, Tensor | np.ndarray)
    }
    if not state:
        raise ValueError(f"{path} holds no state dict: there is no tensor among its entries")
    return state


def _unpack(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, encoding="latin1").load()
        if isinstance(content, Mapping):
            return content
        # torch.save's first format is a row of pickles that starts with a magic number.
    return torch.load(path, map_location="cpu", weights_only=True)

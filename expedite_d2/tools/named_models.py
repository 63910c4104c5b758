"""Models of timm by their names and of transformers by their directories, and pictures for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expedite_d2.errors import needs_extra

_CONFIG = "config.json"
_PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


def named_model(name: str, weights: bool = False) -> nn.Module:
    """Builds a model.

    Args:
        name: a directory that transformers' `save_pretrained` wrote, or a name of timm.
        weights: whether to load weights: those of the directory, timm's pretrained ones. Without,
            the model is on the `meta` device.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: neither of the two, or a directory of a model that transformers does not have.
        ImportError: the library is not installed.
    """
    if Path(name).is_dir():
        return _of_transformers(Path(name), weights).eval()
    with needs_extra("d2"):
        import timm
    if not timm.is_model(name):
        near = timm.list_models(f"{name}*")[:3]
        raise ValueError(
            "--model must be a directory of transformers or a model of timm, got "
            f"{name!r}" + (f"; near are {', '.join(near)}" if near else "")
        )
    if weights:
        return timm.create_model(name, pretrained=True).eval()
    with torch.device("meta"):
        return timm.create_model(name).eval()


def _of_transformers(directory: Path, weights: bool) -> nn.Module:
    path = directory / _CONFIG
    if not path.is_file():
        raise ValueError(f"--model must hold a {_CONFIG}, got the directory {directory} without")
    try:
        names = json.loads(path.read_text()).get("architectures") or []
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} must be a configuration of transformers: {error}") from error
    with needs_extra("d2"):
        import transformers
    kind = getattr(transformers, names[0], None) if names else None
    if kind is None:
        raise ValueError(
            f"{path} must name a class of transformers {transformers.__version__} in its "
            f"architectures, got {names}"
        )
    try:
        if weights:
            return kind.from_pretrained(directory)
        config = kind.config_class.from_pretrained(directory)
        with torch.device("meta"):
            return kind(config)
    except Exception as error:  # of many kinds: of files, of their contents, of what does not fit
        raise ValueError(f"--model {directory} cannot be read as a {names[0]}: {error}") from error


def pictures(
    name: str, model: nn.Module, folder: Path, count: int, size: tuple[int, int] | None = None
) -> list[dict[str, Tensor]]:
    """Reads pictures as a model takes them.

    Args:
        name: see `named_model`.
        model: the model of this name.
        folder: where the pictures lie; the first in the order of their names are read.
        count: how many, at most.
        size: height and width in pixels; by default as the model's own preparation makes them.

    Returns:
        Keywords of the model for each picture, with a batch of one.

    Raises:
        ValueError: no folder, no pictures or one that cannot be read, or a directory of
            transformers that does not tell how pictures are prepared, or prepares no such size.
    """
    if count < 1:
        raise ValueError(f"--images must be at least 1, got {count}")
    if not folder.is_dir():
        raise ValueError(f"--input must be a folder of pictures, got {folder}")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _PICTURES)[:count]
    if not paths:
        raise ValueError(f"--input must be a folder of pictures, got none in {folder}")
    opened = [_opened(path) for path in paths]
    if Path(name).is_dir():
        return [_prepared(Path(name), picture, size) for picture in opened]
    with needs_extra("d2"):
        from timm.data import create_transform, resolve_model_data_config
    options = resolve_model_data_config(model)
    if size is not None:
        options["input_size"] = (3, *size)
    transform = create_transform(**options)
    return [{"x": transform(picture)[None]} for picture in opened]


def _opened(path: Path) -> Any:
    with needs_extra("d2"):
        from PIL import Image
    try:
        with Image.open(path) as picture:
            if picture.mode.startswith(("I", "F")):
                raise ValueError(f"more than eight bits a channel ({picture.mode})")
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"--input has a picture that cannot be read, {path}: {error}") from error


def _prepared(directory: Path, picture: object, size: tuple[int, int] | None) -> dict[str, Tensor]:
    import transformers

    try:
        processor = transformers.AutoImageProcessor.from_pretrained(directory)
    except OSError as error:
        raise ValueError(
            f"{directory} must hold a preprocessor_config.json, which says how pictures are "
            "prepared: save the model's processor there"
        ) from error
    options: dict[str, Any] = {}
    if size is not None:
        options["size"] = {"height": size[0], "width": size[1]}
        if hasattr(processor, "crop_size"):
            options["crop_size"] = options["size"]
    pixels = processor(picture, return_tensors="pt", **options)["pixel_values"]
    made = tuple(pixels.shape[-2:])
    if size is not None and made != tuple(size):
        raise ValueError(
            f"--size must be one that {type(processor).__name__} prepares, got {tuple(size)}, of "
            f"which it made {made}"
        )
    return {"pixel_values": pixels}

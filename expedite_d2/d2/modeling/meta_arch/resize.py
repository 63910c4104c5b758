"""Results in the size that is asked for: without padding, resized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F


def result_size(inputs: Mapping[str, Any], image_size: tuple[int, int]) -> tuple[int, int]:
    """Returns the height and width of an image's result: those that its dict asks for, or its own.

    Args:
        inputs: a dict of Detectron2's format, perhaps with ``"height"`` and ``"width"``.
        image_size: (h, w) of the image in it.
    """
    return inputs.get("height", image_size[0]), inputs.get("width", image_size[1])


def crop_and_resize(maps: Tensor, image_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Removes the padding, then resizes bilinearly to the size of the result.

    Args:
        maps: (N, H, W) at the padded input's resolution.
        image_size: (h, w) of the image inside it.
        size: height and width of the result.

    Returns:
        (N, *size).
    """
    return resize(maps[:, : image_size[0], : image_size[1]], size)


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes (N, H, W) bilinearly to (N, *size), without a copy if the size is the same."""
    if maps.shape[-2:] == size:
        return maps
    if not len(maps):  # interpolate refuses empty channels
        return maps.new_zeros((0, *size))
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]

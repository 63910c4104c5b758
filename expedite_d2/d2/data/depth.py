"""Depth: reading the PNGs, and the mappers of monocular depth estimation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from expedite_d2.d2.config.rules import FLIPS, check, check_crop
from expedite_d2.d2.data.images import labels_size, read_image, read_labels
from expedite_d2.d2.data.mappers import (
    check_image_size,
    crop_size,
    jitter_colours,
    require_fields,
    to_tensor,
)
from expedite_d2.d2.provider import CfgNode

#: Value of ``INPUT.DATASET_MAPPER_NAME`` that selects the mappers of this file.
DEPTH_MAPPER_NAME = "depth"


def read_depth(path: str | Path, scale: float, offset: float | None = None) -> NDArray[np.float32]:
    """Reads a depth map, as data sets for monocular depth store it.

    Args:
        path: a PNG of one channel, usually of 16 bits.
        scale: metres per unit: 1/256 in KITTI, 1/1000 in NYUv2.
        offset: units added to each value, in a data set that measured all pixels, and may store
            them in 8 bits; None where 0 means that nothing was measured.

    Returns:
        (H, W) metres; 0 where nothing was measured.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a depth map.
    """
    units = read_labels(path)
    coarse = units.dtype == np.uint8 and offset is None
    if units.ndim != 2 or units.dtype.kind not in "iu" or coarse:
        bits = "16 bits" if offset is None else "whole numbers"
        raise ValueError(
            f"{path} is not a depth map: expected one channel of {bits}, "
            f"got {units.dtype} values of shape {units.shape}"
        )
    return (units.astype(np.float32) + np.float32(offset or 0.0)) * np.float32(scale)


def network_size(
    height: int, width: int, target: Sequence[int], multiple: int = 32
) -> tuple[int, int]:
    """Size at which DPT's release feeds an image: near ``target``, aspect ratio roughly kept.

    Of the two scales that would fit the height or the width, the one nearer to 1 applies to both
    sides; then each side is rounded to a multiple.

    Args:
        height, width: of the image.
        target: height and width that the network was trained at.
        multiple: the sides become multiples of it, at least one.
    """
    scales = (target[0] / height, target[1] / width)
    scale = scales[1] if abs(1 - scales[1]) < abs(1 - scales[0]) else scales[0]
    rows, columns = (
        max(multiple, int(np.round(scale * side / multiple)) * multiple) for side in (height, width)
    )
    return rows, columns


def crop_origin(size: Sequence[int], crop: Sequence[int], path: str) -> tuple[int, int]:
    """Top and left of KITTI's benchmark crop: at the bottom, centred.

    Raises:
        ValueError: the image is smaller than the crop.
    """
    top, rest = size[0] - crop[0], size[1] - crop[1]
    if top < 0 or rest < 0:
        raise ValueError(
            f"image {path} must be at least {crop[0]}x{crop[1]}, which its data set crops it to, "
            f"got {size[0]}x{size[1]}"
        )
    return top, rest // 2


def cut(array: NDArray[Any], origin: Sequence[int], size: Sequence[int]) -> NDArray[Any]:
    """A window of an image (H, W, C) or a map (H, W)."""
    return array[origin[0] : origin[0] + size[0], origin[1] : origin[1] + size[1]]


class DepthTestMapper:
    """Reads an image, takes its data set's benchmark crop and resizes as DPT's release does.

    ``MODEL.DPT.TEST_SIZE`` is the size that images are brought near to; see ``network_size``.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.image_format = cfg.INPUT.FORMAT
        self.target = cfg.MODEL.DPT.TEST_SIZE

    def __call__(self, entry: dict[str, Any]) -> dict[str, Any]:
        """The model's input.

        Args:
            entry: a dataset dict; where it has "benchmark_crop" (rows, columns), that window at the
                bottom centre is all the model sees.

        Returns:
            The entry with "image" (3, h, w) uint8, "height" and "width" of the (cropped) original,
            and with "crop" (top, left, rows, columns) where there was a crop.

        Raises:
            ValueError: an image that cannot be read, or of another size than its entry or depth.
        """
        image = read_image(entry["file_name"], self.image_format)
        check_image_size(entry, image.shape[:2])
        if "depth_file_name" in entry:
            # Before the crop: cut to one size, two maps that do not lie over each other would pass.
            _check_size(entry["depth_file_name"], labels_size(entry["depth_file_name"]), image)
        sample = dict(entry)
        if "benchmark_crop" in entry:
            size = entry["benchmark_crop"]
            origin = crop_origin(image.shape[:2], size, entry["file_name"])
            image = cut(image, origin, size)
            sample["crop"] = (*origin, *size)
        height, width = image.shape[:2]
        image = resize_image(image, network_size(height, width, self.target))
        return sample | {"image": to_tensor(image), "height": height, "width": width}


class DepthTrainMapper:
    """Crops by ``INPUT.CROP``, flips, changes colours: nothing that would change the depth.

    Images have the scale of the test, by which a single view tells distances: the same resizing to
    ``MODEL.DPT.TEST_SIZE`` comes before the crop.
    """

    def __init__(self, cfg: CfgNode) -> None:
        check(cfg, {"INPUT.RANDOM_FLIP": FLIPS})
        check_crop(cfg)
        self.input = cfg.INPUT
        self.image_format = cfg.INPUT.FORMAT
        self.target = cfg.MODEL.DPT.TEST_SIZE

    def usable(self, name: str, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """All entries: how many pixels have a depth shows when its map is read.

        Raises:
            ValueError: an entry has no depth.
        """
        fields = ("depth_file_name", "depth_scale")
        require_fields(name, entries, fields, f"is {DEPTH_MAPPER_NAME!r}")
        return entries

    def __call__(self, entry: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """One training sample.

        Args:
            entry: a dataset dict with "depth_file_name" and "depth_scale".
            rng: the source of every random choice.

        Returns:
            "image" (3, h, w) uint8 and "depth" (h, w) float32 in metres, 0 = no measure, beside the
            names that the entry has.

        Raises:
            ValueError: an image or a depth map that cannot be read, or sizes that differ.
        """
        image = read_image(entry["file_name"], self.image_format)
        check_image_size(entry, image.shape[:2])
        depth = read_depth(
            entry["depth_file_name"], entry["depth_scale"], entry.get("depth_offset")
        )
        _check_size(entry["depth_file_name"], depth.shape, image)
        if "benchmark_crop" in entry:
            size = entry["benchmark_crop"]
            origin = crop_origin(depth.shape, size, entry["file_name"])
            image, depth = cut(image, origin, size), cut(depth, origin, size)
        size = network_size(depth.shape[0], depth.shape[1], self.target)
        image, depth = resize_image(image, size), resize_depth(depth, size)
        if self.input.CROP.ENABLED:
            size = crop_size(self.input.CROP, (depth.shape[0], depth.shape[1]), rng)
            spare = (depth.shape[0] - size[0], depth.shape[1] - size[1])
            origin = (int(rng.integers(spare[0] + 1)), int(rng.integers(spare[1] + 1)))
            image, depth = cut(image, origin, size), cut(depth, origin, size)
        if self.input.RANDOM_FLIP == "horizontal" and rng.random() < 0.5:
            image, depth = image[:, ::-1], depth[:, ::-1]
        if self.input.COLOR_AUG_SSD:
            image = jitter_colours(image, rng)
        dropped = ("annotations", "segments_info")
        sample = {field: value for field, value in entry.items() if field not in dropped}
        return sample | {
            "image": to_tensor(image),
            "depth": torch.from_numpy(np.ascontiguousarray(depth)),
        }


def _check_size(path: str | Path, size: Sequence[int], image: NDArray[np.uint8]) -> None:
    if tuple(size) != image.shape[:2]:
        raise ValueError(f"{path} must have the image's size {image.shape[:2]}, got {tuple(size)}")


def resize_image(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """(H, W, 3) -> (*size, 3), bicubic."""
    if image.shape[:2] == size:
        return image
    source = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(source.resize(size[::-1], Image.Resampling.BICUBIC))


def resize_depth(depth: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """(H, W) -> size, each pixel's nearest: what was not measured is not mixed with what was."""
    if depth.shape == size:
        return depth
    source = Image.fromarray(np.ascontiguousarray(depth))
    return np.array(source.resize(size[::-1], Image.Resampling.NEAREST))

"""From dataset dicts to what the models take: read, augment, resize, make targets."""

from __future__ import annotations

import copy
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from pycocotools import mask as coco_mask

from expedite_d2.d2 import CfgNode, Instances

PAD_VALUE = 128  # grey that fills a training crop beyond its image, as Detectron2 does

_TASKS: dict[str, Literal["panoptic", "instance", "semantic"]] = {
    "coco_panoptic_lsj": "panoptic",
    "mask_former_panoptic": "panoptic",
    "coco_instance_lsj": "instance",
    "mask_former_instance": "instance",
    "mask_former_semantic": "semantic",
}


def read_image(path: str, image_format: str = "RGB") -> NDArray[np.uint8]:
    """Read an image file upright, as (H, W, 3) uint8 in the channel order "RGB" or "BGR".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that is not an image, or a truncated one.
    """
    try:
        with Image.open(path) as image:
            pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except FileNotFoundError:
        raise FileNotFoundError(f"image {path} not found") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"image {path} cannot be read: {error}") from error
    return pixels[:, :, ::-1] if image_format == "BGR" else pixels


def shortest_edge_size(height: int, width: int, shortest: int, longest: int) -> tuple[int, int]:
    """Size after scaling the shorter side to ``shortest``, the longer to at most ``longest``.

    Rounds as Detectron2's ResizeShortestEdge does.
    """
    scale = shortest / min(height, width)
    scaled = (scale * height, scale * width)
    if max(scaled) > longest:
        shrink = longest / max(scaled)
        scaled = (scaled[0] * shrink, scaled[1] * shrink)
    return int(scaled[0] + 0.5), int(scaled[1] + 0.5)


def to_tensor(image: NDArray[np.uint8]) -> torch.Tensor:
    """(H, W, 3) uint8 -> (3, H, W) uint8."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


class TestMapper:
    """Read an image and resize it by ``INPUT.MIN_SIZE_TEST`` and ``INPUT.MAX_SIZE_TEST``."""

    __test__ = False  # not a test, whatever its name tells pytest

    def __init__(self, cfg: CfgNode) -> None:
        self.image_format = cfg.INPUT.FORMAT
        self.shortest = cfg.INPUT.MIN_SIZE_TEST
        self.longest = cfg.INPUT.MAX_SIZE_TEST

    def __call__(self, entry: dict[str, Any]) -> dict[str, Any]:
        """The entry with "image" (3, h, w) uint8, and "height", "width" of the original."""
        image = read_image(entry["file_name"], self.image_format)
        height, width = image.shape[:2]
        if self.shortest > 0:
            rows, columns = shortest_edge_size(height, width, self.shortest, self.longest)
            if (rows, columns) != (height, width):
                resized = Image.fromarray(np.ascontiguousarray(image)).resize(
                    (columns, rows), Image.Resampling.BILINEAR
                )
                image = np.asarray(resized)
        return {**entry, "image": to_tensor(image), "height": height, "width": width}


class TrainMapper:
    """Jitter the scale, crop, flip, change colours, and make the targets of Mask2Former.

    ``INPUT.DATASET_MAPPER_NAME`` has Mask2Former's values: it tells the task, and whether the scale
    is jittered in ``INPUT.MIN_SCALE`` .. ``MAX_SCALE`` of ``INPUT.IMAGE_SIZE`` (names with "lsj") or
    the shorter side is drawn from ``INPUT.MIN_SIZE_TRAIN`` and ``INPUT.CROP.SIZE`` is cut out.
    """

    def __init__(self, cfg: CfgNode) -> None:
        name = cfg.INPUT.DATASET_MAPPER_NAME
        if name not in _TASKS:
            raise ValueError(
                f"INPUT.DATASET_MAPPER_NAME must be one of {', '.join(_TASKS)}, got {name!r}"
            )
        self.task = _TASKS[name]
        self.large_scale_jitter = name.endswith("_lsj")
        self.input = cfg.INPUT
        self.ignore = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE

    def __call__(self, entry: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """One training sample.

        Args:
            entry: a dataset dict.
            rng: the source of every random choice.

        Returns:
            The entry with "image" (3, h, w) uint8, "instances" with ``gt_classes`` (N,) and
            ``gt_masks`` (N, h, w) bool, and "sem_seg" (h, w) int64 where the data set has it.
        """
        entry = copy.copy(entry)
        image = read_image(entry["file_name"], self.input.FORMAT)
        labels, classes = self._segments(entry, *image.shape[:2])
        semantic = None
        if "sem_seg_file_name" in entry:
            semantic = np.asarray(Image.open(entry["sem_seg_file_name"]))

        crop = self._draw_crop(*image.shape[:2], rng)
        flip = self.input.RANDOM_FLIP == "horizontal" and rng.random() < 0.5
        if self.input.COLOR_AUG_SSD:
            image = _jitter_colours(image, rng)
        image = crop.cut(image, Image.Resampling.BILINEAR, PAD_VALUE)
        masks = crop.cut_masks(labels, len(classes))
        if semantic is not None:
            semantic = crop.cut(semantic, Image.Resampling.NEAREST, self.ignore)
        if flip:
            image, masks = image[:, ::-1], masks[:, :, ::-1]
            semantic = None if semantic is None else semantic[:, ::-1]

        if self.task == "semantic" and semantic is not None:
            classes = np.setdiff1d(np.unique(semantic), [self.ignore]).astype(np.int64)
            masks = semantic[None] == classes[:, None, None]
        visible = masks.reshape(len(masks), -1).any(axis=1)
        instances = Instances(image.shape[:2])
        instances.gt_classes = torch.from_numpy(classes[visible])
        instances.gt_masks = torch.from_numpy(np.ascontiguousarray(masks[visible]))
        entry["image"] = to_tensor(image)
        entry["instances"] = instances
        if semantic is not None:
            entry["sem_seg"] = torch.from_numpy(semantic.astype(np.int64))
        for field in ("annotations", "segments_info"):
            entry.pop(field, None)
        return entry

    def _segments(
        self, entry: dict[str, Any], height: int, width: int
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """A map of segment numbers from 1, or (N, H, W) masks if they may overlap; classes (N,)."""
        if self.task == "panoptic":
            png = np.asarray(Image.open(entry["pan_seg_file_name"]), dtype=np.uint32)
            ids = png[..., 0] + 256 * png[..., 1] + 65536 * png[..., 2]
            kept = [s for s in entry["segments_info"] if not s.get("iscrowd", 0)]
            labels = np.zeros(ids.shape, np.int32)
            for number, segment in enumerate(kept, 1):
                labels[ids == segment["id"]] = number
            return labels, np.array([s["category_id"] for s in kept], np.int64)
        kept = []
        if self.task == "instance":
            kept = [a for a in entry["annotations"] if not a.get("iscrowd", 0)]
        masks = np.zeros((len(kept), height, width), np.uint8)
        for mask, annotation in zip(masks, kept, strict=True):
            mask[:] = decode_segmentation(annotation["segmentation"], height, width)
        return masks, np.array([a["category_id"] for a in kept], np.int64)

    def _draw_crop(self, height: int, width: int, rng: np.random.Generator) -> _Crop:
        if self.large_scale_jitter:
            side = self.input.IMAGE_SIZE
            factor = rng.uniform(self.input.MIN_SCALE, self.input.MAX_SCALE)
            scale = min(side * factor / height, side * factor / width)
            scaled = (max(1, round(height * scale)), max(1, round(width * scale)))
            out = (side, side)
        else:
            shortest = int(rng.choice(self.input.MIN_SIZE_TRAIN))
            scaled = shortest_edge_size(height, width, shortest, self.input.MAX_SIZE_TRAIN)
            out = scaled
            if self.input.CROP.ENABLED:
                rows, columns = self.input.CROP.SIZE
                out = (int(rows), int(columns))
        top = rng.integers(max(scaled[0] - out[0], 0) + 1)
        left = rng.integers(max(scaled[1] - out[1], 0) + 1)
        return _Crop((height, width), scaled, (int(top), int(left)), out)


class _Crop:
    """A window of a scaled image, padded at the right and the bottom to a fixed size.

    Args:
        source: (H, W) of the original.
        scaled: (H, W) of the whole image after scaling.
        origin: (top, left) of the window in the scaled image.
        out: (h, w) of the result.
    """

    def __init__(
        self,
        source: tuple[int, int],
        scaled: tuple[int, int],
        origin: tuple[int, int],
        out: tuple[int, int],
    ) -> None:
        self.out = out
        self.size = (min(out[0], scaled[0]), min(out[1], scaled[1]))
        y, x = source[0] / scaled[0], source[1] / scaled[1]
        bottom, right = origin[0] + self.size[0], origin[1] + self.size[1]
        # Only the window is resampled, from fractional coordinates of the original.
        self.box = (origin[1] * x, origin[0] * y, right * x, bottom * y)

    def cut(self, array: NDArray[Any], resampling: Image.Resampling, pad: int) -> NDArray[Any]:
        """(H, W) or (H, W, 3) -> (h, w) or (h, w, 3)."""
        image = Image.fromarray(np.ascontiguousarray(array))
        cut = np.asarray(image.resize(self.size[::-1], resampling, box=self.box))
        if self.size == self.out:
            return cut
        padded = np.full((*self.out, *cut.shape[2:]), pad, cut.dtype)
        padded[: self.size[0], : self.size[1]] = cut
        return padded

    def cut_masks(self, labels: NDArray[Any], count: int) -> NDArray[np.bool_]:
        """A map of segment numbers (H, W), or masks (N, H, W) -> (N, h, w)."""
        if labels.ndim == 3:
            cuts = [self.cut(mask, Image.Resampling.NEAREST, 0) for mask in labels]
            return np.stack(cuts).astype(bool) if cuts else np.zeros((0, *self.out), bool)
        cut = self.cut(labels, Image.Resampling.NEAREST, 0)
        return cut[None] == np.arange(1, count + 1, dtype=cut.dtype)[:, None, None]


def decode_segmentation(segmentation: Any, height: int, width: int) -> NDArray[np.uint8]:
    """COCO polygons or run-length encoding -> (H, W), 0 or 1."""
    if isinstance(segmentation, list):
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        rle = coco_mask.frPyObjects(segmentation, height, width)
    else:
        rle = segmentation
    return coco_mask.decode(rle)


def _jitter_colours(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Brightness, contrast and saturation, each with probability 1/2, as SSD's augmentation."""
    pixels = image.astype(np.float32)
    if rng.random() < 0.5:
        pixels += rng.uniform(-32, 32)
    if rng.random() < 0.5:
        pixels *= rng.uniform(0.5, 1.5)
    if rng.random() < 0.5:
        grey = pixels.mean(axis=2, keepdims=True)
        pixels = grey + (pixels - grey) * rng.uniform(0.5, 1.5)
    return np.clip(pixels, 0, 255).astype(np.uint8)

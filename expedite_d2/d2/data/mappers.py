"""From dataset dicts to what the models take: read, augment, resize, make targets."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from expedite_d2.d2.config.keys import check_training_input
from expedite_d2.d2.data.images import is_turned, read_classes, read_image, read_label_map
from expedite_d2.d2.data.masks import decode_segmentation
from expedite_d2.d2.provider import CfgNode, Instances

Task = Literal["panoptic", "instance", "semantic"]

logger = logging.getLogger(__name__)

#: Grey that fills a training crop beyond its image, as Detectron2 does.
PAD_VALUE = 128

_TASKS: dict[str, Task] = {
    "coco_panoptic_lsj": "panoptic",
    "mask_former_panoptic": "panoptic",
    "coco_instance_lsj": "instance",
    "mask_former_instance": "instance",
    "mask_former_semantic": "semantic",
}
#: What an entry must have to be trained on.
_ANNOTATION: dict[Task, tuple[str, ...]] = {
    "panoptic": ("pan_seg_file_name", "segments_info"),
    "instance": ("annotations",),
    "semantic": ("sem_seg_file_name",),
}
#: The list that tells how much there is to learn from; labels of pixels tell it when they are read.
_OBJECTS: dict[Task, str] = {"panoptic": "segments_info", "instance": "annotations"}


def check_image_size(entry: Mapping[str, Any], size: Sequence[int]) -> None:
    """Compares the size that a data set gives an image with the upright picture's own.

    Args:
        entry: a dataset dict; "height" and "width" are looked at where it has them.
        size: (H, W) of the picture as ``read_image`` gives it.

    Raises:
        ValueError: another size, in which masks and boxes would lie elsewhere.
    """
    height, width = size
    told = (entry.get("height", height), entry.get("width", width))
    if told == (height, width):
        return
    path = entry["file_name"]
    message = (
        f"image {path} must have the size that its data set gives it, {told[0]}x{told[1]} "
        f"(height x width), got {height}x{width}"
    )
    if told == (width, height) and is_turned(path):
        message += (
            ": its orientation tag turns it by 90 degrees, and height, width, masks and boxes must "
            "be those of the upright picture, not of the stored one"
        )
    raise ValueError(message)


def shortest_edge_size(height: int, width: int, shortest: int, longest: int) -> tuple[int, int]:
    """Size after scaling the shorter side to ``shortest``, the longer to at most ``longest``.

    Rounds as Detectron2's ResizeShortestEdge does.
    """
    scale = shortest / min(height, width)
    scaled = (scale * height, scale * width)
    if max(scaled) > longest:
        shrink = longest / max(scaled)
        scaled = (scaled[0] * shrink, scaled[1] * shrink)
    return max(1, int(scaled[0] + 0.5)), max(1, int(scaled[1] + 0.5))


def resize_shortest_edge(
    image: NDArray[np.uint8], shortest: int, longest: int
) -> NDArray[np.uint8]:
    """(H, W, 3) resized bilinearly to ``shortest_edge_size``."""
    height, width = image.shape[:2]
    size = shortest_edge_size(height, width, shortest, longest)
    if size == (height, width):
        return image
    source = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(source.resize(size[::-1], Image.Resampling.BILINEAR))


def to_tensor(image: NDArray[np.uint8]) -> torch.Tensor:
    """(H, W, 3) uint8 -> (3, H, W) uint8."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def require_fields(
    name: str, entries: Sequence[Mapping[str, Any]], fields: Sequence[str], reason: str
) -> None:
    """Raises a ValueError where entries of a data set lack what the training mapper needs.

    Args:
        name: of the data set.
        entries: its dataset dicts.
        fields: what each of them must have.
        reason: what ``INPUT.DATASET_MAPPER_NAME`` is, in words.
    """
    for field in fields:
        lacking = [entry for entry in entries if field not in entry]
        if lacking:
            whole = len(lacking) == len(entries)
            found = (
                f"{name!r} has none"
                if whole
                else f"{len(lacking)} of the {len(entries)} images of {name!r} have none, the "
                f"first {lacking[0].get('file_name')}"
            )
            raise ValueError(
                f"INPUT.DATASET_MAPPER_NAME {reason}, which needs {field!r} in the data set; "
                f"{found}"
            )


class TestMapper:
    """Reads an image and resizes it by ``INPUT.MIN_SIZE_TEST`` and ``INPUT.MAX_SIZE_TEST``."""

    __test__ = False  # not a test, whatever its name tells pytest

    def __init__(self, cfg: CfgNode) -> None:
        self.image_format = cfg.INPUT.FORMAT
        self.shortest = cfg.INPUT.MIN_SIZE_TEST
        self.longest = cfg.INPUT.MAX_SIZE_TEST

    def __call__(self, entry: dict[str, Any]) -> dict[str, Any]:
        """The entry with "image" (3, h, w) uint8, and "height", "width" of the upright original.

        Raises:
            ValueError: an image that cannot be read, or of another size than the entry's.
        """
        image = read_image(entry["file_name"], self.image_format)
        height, width = image.shape[:2]
        check_image_size(entry, (height, width))
        if self.shortest > 0:
            image = resize_shortest_edge(image, self.shortest, self.longest)
        return {**entry, "image": to_tensor(image), "height": height, "width": width}


class TrainMapper:
    """Jitters the scale, crops, flips, changes colours, and makes the targets of Mask2Former.

    ``INPUT.DATASET_MAPPER_NAME`` has Mask2Former's values: it tells the task, and whether the scale
    is jittered in ``INPUT.MIN_SCALE`` .. ``MAX_SCALE`` of ``INPUT.IMAGE_SIZE`` (names with "lsj"),
    or the shorter side is drawn from ``INPUT.MIN_SIZE_TRAIN``, ``INPUT.CROP`` is cut out, and the
    result is padded to ``INPUT.SIZE_DIVISIBILITY``.
    """

    def __init__(self, cfg: CfgNode) -> None:
        name = cfg.INPUT.DATASET_MAPPER_NAME
        if name not in _TASKS:
            raise ValueError(
                f"INPUT.DATASET_MAPPER_NAME must be one of {', '.join(_TASKS)}, depth, got {name!r}"
            )
        check_training_input(cfg)
        self.task = _TASKS[name]
        self.large_scale_jitter = name.endswith("_lsj")
        self.input = cfg.INPUT
        self.image_format = cfg.INPUT.FORMAT
        self.ignore = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
        self.filter_empty = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS

    def usable(self, name: str, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The entries that are trained on.

        ``DATALOADER.FILTER_EMPTY_ANNOTATIONS`` leaves out those without any "annotations"
        (instance) or "segments_info" (panoptic) but crowds. Semantic labels are no list: images
        that have none stay, and teach nothing.

        Raises:
            ValueError: an entry has no annotation of this task.
        """
        reason = f"is for {self.task} segmentation"
        require_fields(name, entries, _ANNOTATION[self.task], reason)
        if self.task not in _OBJECTS or not self.filter_empty:
            return entries
        field = _OBJECTS[self.task]
        kept = [e for e in entries if any(not one.get("iscrowd", 0) for one in e[field])]
        if len(kept) < len(entries):
            logger.info(
                "data set %s: %d of %d images are left out, which have no %s but crowds "
                "(DATALOADER.FILTER_EMPTY_ANNOTATIONS)",
                name, len(entries) - len(kept), len(entries), field,
            )  # fmt: skip
        return kept

    def __call__(self, entry: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """One training sample.

        Args:
            entry: a dataset dict.
            rng: the source of every random choice.

        Returns:
            The entry with "image" (3, h, w) uint8, "instances" with ``gt_classes`` (N,) int64 and
            ``gt_masks`` (N, h, w) bool, and, but for instances, "sem_seg" (h, w) int64. N is 0
            where nothing that counts is in the crop.

        Raises:
            ValueError: an image or an annotation that cannot be read, or sizes that differ.
        """
        image = read_image(entry["file_name"], self.image_format)
        height, width = image.shape[:2]
        check_image_size(entry, (height, width))
        crop = self._draw_crop(height, width, rng)
        if self.task == "semantic":
            whole_map = read_classes(entry, (height, width))
            labels = crop.labels(whole_map, self.ignore)
            for _ in range(9):
                if self._varied(labels):
                    break
                crop = self._draw_crop(height, width, rng)
                labels = crop.labels(whole_map, self.ignore)
            classes = np.setdiff1d(labels, [self.ignore]).astype(np.int64)
            masks = labels[None] == classes[:, None, None]
        elif self.task == "panoptic":
            labels, masks, classes = self._panoptic(entry, (height, width), crop)
        else:
            masks, classes = _instance_masks(entry, (height, width), crop)

        if self.input.COLOR_AUG_SSD:
            image = jitter_colours(image, rng)
        image = crop.image(image)
        visible = masks.any(axis=(1, 2))
        instances = Instances(image.shape[:2])
        instances.gt_classes = torch.from_numpy(classes[visible])
        instances.gt_masks = torch.from_numpy(np.ascontiguousarray(masks[visible]))
        dropped = ("annotations", "segments_info")
        sample = {field: value for field, value in entry.items() if field not in dropped}
        sample |= {"image": to_tensor(image), "instances": instances}
        if self.task != "instance":
            sample["sem_seg"] = torch.from_numpy(labels.astype(np.int64))
        return sample

    def _panoptic(
        self, entry: dict[str, Any], size: tuple[int, int], crop: _Crop
    ) -> tuple[NDArray[Any], NDArray[np.bool_], NDArray[np.int64]]:
        """Class labels (h, w); masks (N, h, w) and classes (N,) of the segments, without crowds."""
        segments = read_label_map(entry["pan_seg_file_name"], size, colours=True)
        colours = crop.labels(segments, 0).astype(np.int32)
        ids = colours[..., 0] + 256 * colours[..., 1] + 65536 * colours[..., 2]
        labels = np.full(ids.shape, self.ignore, np.int64)
        masks, classes = [np.zeros((0, *ids.shape), bool)], []
        for segment in entry["segments_info"]:
            mask = ids == segment["id"]
            labels[mask] = segment["category_id"]
            if not segment.get("iscrowd", 0):
                masks.append(mask[None])
                classes.append(segment["category_id"])
        return labels, np.concatenate(masks), np.array(classes, np.int64)

    def _varied(self, labels: NDArray[Any]) -> bool:
        """Whether no class fills more than ``SINGLE_CATEGORY_MAX_AREA`` of the labelled pixels."""
        crop = self.input.CROP
        if not crop.ENABLED or crop.SINGLE_CATEGORY_MAX_AREA >= 1.0:
            return True
        _, counts = np.unique(labels[labels != self.ignore], return_counts=True)
        return len(counts) > 1 and counts.max() < crop.SINGLE_CATEGORY_MAX_AREA * counts.sum()

    def _draw_crop(self, height: int, width: int, rng: np.random.Generator) -> _Crop:
        if self.large_scale_jitter:
            side = self.input.IMAGE_SIZE
            factor = rng.uniform(self.input.MIN_SCALE, self.input.MAX_SCALE)
            scale = min(side * factor / height, side * factor / width)
            scaled = (max(1, round(height * scale)), max(1, round(width * scale)))
            window = out = (side, side)
        else:
            sides = self.input.MIN_SIZE_TRAIN
            if self.input.MIN_SIZE_TRAIN_SAMPLING == "range":
                shortest = int(rng.integers(min(sides), max(sides) + 1))
            else:
                shortest = int(rng.choice(sides))
            scaled = shortest_edge_size(height, width, shortest, self.input.MAX_SIZE_TRAIN)
            window = crop_size(self.input.CROP, scaled, rng) if self.input.CROP.ENABLED else scaled
            least = max(self.input.SIZE_DIVISIBILITY, 1)
            out = (max(window[0], least), max(window[1], least))
        top = rng.integers(max(scaled[0] - window[0], 0) + 1)
        left = rng.integers(max(scaled[1] - window[1], 0) + 1)
        flip = self.input.RANDOM_FLIP == "horizontal" and rng.random() < 0.5
        return _Crop((height, width), scaled, (int(top), int(left)), window, out, flip)


def crop_size(crop: CfgNode, scaled: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
    """Detectron2's crop types: pixels or a share of the image, fixed or drawn from a range."""
    first, second = crop.SIZE
    if crop.TYPE == "absolute":
        size = (first, second)
    elif crop.TYPE == "absolute_range":
        drawn = [rng.integers(min(side, first), min(side, second) + 1) for side in scaled]
        size = (drawn[0], drawn[1])
    elif crop.TYPE == "relative":
        size = (scaled[0] * first + 0.5, scaled[1] * second + 0.5)
    elif crop.TYPE == "relative_range":
        shares = rng.uniform([first, second], 1.0)
        size = (scaled[0] * shares[0] + 0.5, scaled[1] * shares[1] + 0.5)
    else:
        raise ValueError(
            "INPUT.CROP.TYPE must be absolute, absolute_range, relative or relative_range, "
            f"got {crop.TYPE!r}"
        )
    return min(int(size[0]), scaled[0]), min(int(size[1]), scaled[1])


class _Crop:
    """A window of a scaled image, flipped or not, padded at the right and the bottom.

    Args:
        source: (H, W) of the original.
        scaled: (H, W) of the whole image after scaling.
        origin: (top, left) of the window in the scaled image.
        window: (h, w) of the window, which may reach beyond the scaled image.
        out: (h, w) of the result.
        flip: whether the window is mirrored; the padding stays at the right.
    """

    def __init__(
        self,
        source: tuple[int, int],
        scaled: tuple[int, int],
        origin: tuple[int, int],
        window: tuple[int, int],
        out: tuple[int, int],
        flip: bool,
    ) -> None:
        self.out = out
        self._flip = flip
        self._size = (min(window[0], scaled[0]), min(window[1], scaled[1]))
        y, x = source[0] / scaled[0], source[1] / scaled[1]
        bottom, right = origin[0] + self._size[0], origin[1] + self._size[1]
        # Only the window is resampled, from fractional coordinates of the original.
        self._box = (
            origin[1] * x,
            origin[0] * y,
            min(right * x, source[1]),
            min(bottom * y, source[0]),
        )

    def image(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(H, W, 3) -> (h, w, 3), bilinear."""
        return self._cut(pixels, Image.Resampling.BILINEAR, PAD_VALUE)

    def labels(self, labels: NDArray[Any], pad: int) -> NDArray[Any]:
        """(H, W) -> (h, w), or (H, W, 3) -> (h, w, 3), nearest."""
        return self._cut(labels, Image.Resampling.NEAREST, pad)

    def _cut(self, array: NDArray[Any], resampling: Image.Resampling, pad: int) -> NDArray[Any]:
        image = Image.fromarray(np.ascontiguousarray(array))
        cut = np.asarray(image.resize(self._size[::-1], resampling, box=self._box))
        if self._flip:
            cut = cut[:, ::-1]
        if self._size == self.out:
            return cut
        padded = np.full((*self.out, *cut.shape[2:]), pad, cut.dtype)
        padded[: self._size[0], : self._size[1]] = cut
        return padded


def _instance_masks(
    entry: dict[str, Any], size: tuple[int, int], crop: _Crop
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Masks (N, h, w), which may overlap, and classes (N,) of the objects, without crowds."""
    kept = [a for a in entry["annotations"] if not a.get("iscrowd", 0)]
    try:
        whole_masks = [decode_segmentation(a["segmentation"], *size) for a in kept]
    except ValueError as error:
        raise ValueError(f"annotations of {entry['file_name']}: {error}") from error
    masks = np.zeros((len(kept), *crop.out), bool)
    for row, mask in enumerate(whole_masks):
        masks[row] = crop.labels(mask, 0)
    return masks, np.array([a["category_id"] for a in kept], np.int64)


def jitter_colours(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Brightness, contrast, saturation and hue, each with probability 1/2, as SSD's augmentation.

    Contrast comes before or after saturation and hue, again with probability 1/2.
    """
    pixels = image.astype(np.float32)
    contrast = np.float32(rng.uniform(0.5, 1.5)) if rng.random() < 0.5 else np.float32(1.0)
    early = rng.random() < 0.5
    if rng.random() < 0.5:
        pixels += np.float32(rng.uniform(-32, 32))
    if early:
        pixels *= contrast
    if rng.random() < 0.5:
        grey = pixels.mean(axis=2, keepdims=True)
        pixels = grey + (pixels - grey) * np.float32(rng.uniform(0.5, 1.5))
    if rng.random() < 0.5:
        # A turn about the grey axis by up to a tenth of the circle.
        turn = rng.uniform(-np.pi / 10, np.pi / 10)
        pixels = pixels @ _hue_rotation(turn)
    if not early:
        pixels *= contrast
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _hue_rotation(turn: float) -> NDArray[np.float32]:
    """Matrix (3, 3) that rotates colours by `turn` radians about the grey axis (Rodrigues)."""
    axis = np.full((3, 3), 1 / 3)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    rotation = np.cos(turn) * (np.eye(3) - axis) + axis + np.sin(turn) * cross
    return rotation.astype(np.float32)

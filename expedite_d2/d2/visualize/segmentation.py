"""Drawing of panoptic, instance and semantic segmentations."""

from __future__ import annotations

import colorsys
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from expedite_d2.d2.visualize.common import boundaries, to_numpy

# A successive hue this far round the circle is never close to any of the hues before it.
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Segment:
    """One region of a segmentation.

    Attributes:
        id: Value of its pixels in the id map, 1 or more.
        category_id: Contiguous class index, as the model predicts it.
        isthing: Countable object (one segment per object) or stuff (one per class).
        score: Confidence in [0, 1], where the prediction has one.
    """

    id: int
    category_id: int
    isthing: bool
    score: float | None = None


@dataclass(frozen=True)
class Segmentation:
    """A prediction as one label map: what is drawn and compared, whatever the task.

    Attributes:
        ids: (H, W) int32, the segment of every pixel; 0 where there is none.
        segments: The segments that `ids` names.
    """

    ids: np.ndarray
    segments: tuple[Segment, ...]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.ids.shape[0], self.ids.shape[1]

    def resized(self, height: int, width: int) -> Segmentation:
        """The same at another size; labels are not blended."""
        ids = Image.fromarray(self.ids).resize((width, height), Image.Resampling.NEAREST)
        return Segmentation(np.asarray(ids, dtype=np.int32), self.segments)


def segmentation_of(output: dict[str, Any], min_score: float = 0.5) -> Segmentation:
    """Turn one output of a meta-architecture into the label map that is drawn.

    Panoptic predictions are preferred, then instances, then the semantic map.

    Args:
        output: One element of what a model returns in evaluation: a dict with "panoptic_seg",
            "instances" or "sem_seg".
        min_score: Instances below this confidence are left out.

    Returns:
        The label map with its segments.

    Raises:
        ValueError: when the output holds none of the three.
    """
    if "panoptic_seg" in output:
        ids, infos = output["panoptic_seg"]
        return Segmentation(
            to_numpy(ids).astype(np.int32),
            tuple(Segment(i["id"], i["category_id"], bool(i["isthing"])) for i in infos),
        )
    if "instances" in output:
        return _from_instances(output["instances"], min_score)
    if "sem_seg" in output:
        classes = to_numpy(output["sem_seg"].argmax(dim=0))
        present = np.unique(classes)
        return Segmentation(
            (classes + 1).astype(np.int32),
            tuple(Segment(int(c) + 1, int(c), False) for c in present),
        )
    raise ValueError(
        "segmentation_of: expected a prediction with 'panoptic_seg', 'instances' or 'sem_seg', "
        f"got the keys {sorted(output)}"
    )


def _from_instances(instances: Any, min_score: float) -> Segmentation:
    """Paint instances from the largest to the smallest, so that a small one is never hidden."""
    masks = to_numpy(instances.pred_masks > 0.5)  # (n, H, W)
    scores = to_numpy(instances.scores)
    classes = to_numpy(instances.pred_classes)
    areas = masks.reshape(len(masks), int(np.prod(masks.shape[1:]))).sum(axis=1)
    kept = [i for i in np.argsort(-areas, kind="stable") if scores[i] >= min_score and areas[i]]
    ids = np.zeros(masks.shape[1:], dtype=np.int32)
    for number, i in enumerate(kept, start=1):
        ids[masks[i]] = number
    return Segmentation(
        ids,
        tuple(
            Segment(number, int(classes[i]), True, float(scores[i]))
            for number, i in enumerate(kept, start=1)
        ),
    )


def draw_segmentation(
    image: np.ndarray,
    segmentation: Segmentation,
    metadata: Any = None,
    *,
    opacity: float = 0.6,
    labels: bool = True,
) -> np.ndarray:
    """Overlay a segmentation on its image: colour, outline and class name of every segment.

    Args:
        image: (H, W, 3) uint8, RGB.
        segmentation: What to draw, of the same height and width.
        metadata: Detectron2's metadata of the data set (thing_classes, thing_colors,
            stuff_classes, stuff_colors), or None: then classes are numbered and coloured by index.
        opacity: Share of the segment's colour in a covered pixel, 0 to 1.
        labels: Whether to write class names (and scores, where there are any).

    Returns:
        (H, W, 3) uint8, a new array. The same input gives the same picture.

    Raises:
        ValueError: when the two sizes differ.
    """
    ids = segmentation.ids
    if image.ndim != 3 or image.shape[2] != 3 or image.shape[:2] != ids.shape:
        raise ValueError(
            f"draw_segmentation: expected an image of shape {(*ids.shape, 3)} as the "
            f"segmentation has, got {image.shape}"
        )
    if not segmentation.segments:
        return image.copy()
    colours = _segment_colours(segmentation.segments, metadata)
    palette = np.zeros((max(int(ids.max()), max(colours)) + 1, 3), dtype=np.float32)
    covered = np.zeros(len(palette), dtype=np.float32)
    for number, colour in colours.items():
        palette[number] = colour
        covered[number] = 1.0
    share = (covered * opacity)[ids][..., None]
    canvas = image * (1.0 - share) + palette[ids] * share
    outline = boundaries(ids, max(1, round(min(ids.shape) / 500))) & (covered[ids] > 0)
    # An outline in a darker tone of the fill separates neighbours of the same class.
    canvas[outline] = 0.35 * palette[ids[outline]]
    drawn = canvas.clip(0, 255).astype(np.uint8)
    return _write_labels(drawn, segmentation, metadata, colours) if labels else drawn


def segmentation_disagreement(first: Segmentation, second: Segmentation) -> np.ndarray:
    """Find the pixels on which two predictions for one image differ.

    A pixel agrees when both give it the same class and, for things, the same object: two objects
    are the same when their intersection over union exceeds one half, as in panoptic quality.

    Args:
        first: One prediction, (H, W).
        second: The other one, of the same size.

    Returns:
        (H, W) bool, True where they differ.
    """
    base = int(second.ids.max(initial=0)) + 1
    joint = first.ids.astype(np.int64) * base + second.ids
    pairs, inverse, counts = np.unique(joint, return_inverse=True, return_counts=True)
    areas = [np.bincount(s.ids.ravel(), minlength=1) for s in (first, second)]
    by_id = [{segment.id: segment for segment in s.segments} for s in (first, second)]
    differs = np.empty(len(pairs), dtype=bool)
    for index, (pair, shared) in enumerate(zip(pairs.tolist(), counts.tolist(), strict=True)):
        i, j = divmod(pair, base)
        a, b = by_id[0].get(i), by_id[1].get(j)
        if a is None or b is None:
            differs[index] = a is not b
        elif a.category_id != b.category_id or a.isthing != b.isthing:
            differs[index] = True
        else:
            union = int(areas[0][i]) + int(areas[1][j]) - shared
            differs[index] = a.isthing and 2 * shared <= union
    return differs[inverse].reshape(first.ids.shape)


def _known(metadata: Any, segment: Segment, suffix: str) -> Any:
    """What the metadata's lists say of a segment's class ("classes" or "colors"); None if nothing.

    As in Detectron2, ``stuff_*`` may list every class, and then in the order of the class indices,
    while ``thing_*`` may leave out the stuff that stands between the things.
    """
    things, stuff = (
        getattr(metadata, f"{kind}_{suffix}", None) or () for kind in ("thing", "stuff")
    )
    values = things if segment.isthing and len(things) > len(stuff) else stuff or things
    return values[segment.category_id] if segment.category_id < len(values) else None


def _segment_colours(segments: Sequence[Segment], metadata: Any) -> dict[int, np.ndarray]:
    """RGB of every segment: its class's colour, in another tone for each object of the class."""
    colours: dict[int, np.ndarray] = {}
    seen: dict[tuple[int, bool], int] = {}
    for segment in segments:
        colour = _known(metadata, segment, "colors")
        if colour is None:
            hue = (0.13 + segment.category_id * _GOLDEN_RATIO) % 1.0
            colour = [255 * v for v in colorsys.hsv_to_rgb(hue, 0.65, 0.9)]
        kind = (segment.category_id, segment.isthing)
        count = seen[kind] = seen.get(kind, -1) + 1
        if segment.isthing and count:
            colour = _another_tone(colour, count)
        colours[segment.id] = np.asarray(colour, dtype=np.float32)
    return colours


def _another_tone(colour: Sequence[float], count: int) -> list[float]:
    hue, lightness, saturation = colorsys.rgb_to_hls(*(float(v) / 255 for v in colour))
    # Steps of the golden ratio in [-0.5, 0.5): neighbours in the order differ most.
    offset = (count * _GOLDEN_RATIO) % 1.0 - 0.5
    lightness = min(max(lightness + 0.36 * offset, 0.22), 0.82)
    hue = (hue + 0.10 * offset) % 1.0
    return [255 * v for v in colorsys.hls_to_rgb(hue, lightness, saturation)]


@functools.lru_cache(maxsize=32)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)


def _write_labels(
    drawn: np.ndarray, segmentation: Segmentation, metadata: Any, colours: dict[int, np.ndarray]
) -> np.ndarray:
    """Write every segment's name at its thickest place, the largest segments first."""
    ids = segmentation.ids
    height, width = ids.shape
    font = _font(min(max(round(math.sqrt(height * width) / 52), 12), 36))
    pad = max(2, round(font.size / 4))
    boxes = ndimage.find_objects(ids)
    areas = np.bincount(ids.ravel())
    picture = Image.fromarray(drawn)
    pen = ImageDraw.Draw(picture, "RGBA")
    placed: list[tuple[float, float, float, float]] = []
    shown = [s for s in segmentation.segments if s.id < len(areas) and areas[s.id]]
    for segment in sorted(shown, key=lambda s: (-areas[s.id], s.id)):
        name = _known(metadata, segment, "classes")
        text = f"class {segment.category_id}" if name is None else str(name)
        if segment.score is not None:
            text += f" {segment.score:.0%}"
        left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
        size = (right - left + 2 * pad, bottom - top + 2 * pad)
        # A name much larger than its segment hides what it names.
        if size[0] > width or size[1] > height or areas[segment.id] < 0.5 * size[0] * size[1]:
            continue
        y, x = _thickest_point(ids, segment.id, boxes[segment.id - 1])
        for shift in (0.0, 1.2, -1.2, 2.4, -2.4):
            x0 = min(max(x - size[0] / 2, 0), width - size[0])
            y0 = min(max(y + (shift - 0.5) * size[1], 0), height - size[1])
            box = (x0, y0, x0 + size[0], y0 + size[1])
            if not any(_overlap(box, other) for other in placed):
                placed.append(box)
                tone = tuple(int(0.3 * v) for v in colours[segment.id])
                pen.rounded_rectangle(box, radius=pad, fill=(*tone, 190))
                pen.text((x0 + pad - left, y0 + pad - top), text, font=font, fill="white")
                break
    return np.asarray(picture)


def _thickest_point(ids: np.ndarray, number: int, box: tuple[slice, slice]) -> tuple[float, float]:
    """The pixel of a segment that is farthest from its border, searched on at most 256 rows."""
    mask = ids[box] == number
    step = max(1, math.ceil(max(mask.shape) / 256))
    coarse = mask[::step, ::step]
    if not coarse.any():
        step, coarse = 1, mask
    depth = ndimage.distance_transform_edt(np.pad(coarse, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    return box[0].start + float(y) * step, box[1].start + float(x) * step


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]

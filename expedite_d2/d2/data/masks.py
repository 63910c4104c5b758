"""COCO's masks, polygons and run lengths, checked before pycocotools sees them.

pycocotools takes all memory or ends the process where a coordinate is NaN or huge, and reads beyond
the end of run lengths that are cut off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

#: Pixels an image may have: pycocotools reads compressed numbers beyond 30 bits and sign wrongly.
MOST_PIXELS = 2**29 - 1
# pycocotools keeps five points of 16 bytes for each pixel that an outline passes: 320 MB.
_LONGEST_OUTLINE = 4_000_000


class OtherSize(ValueError):
    """A mask of another size than its image."""


def decode_segmentation(segmentation: Any, height: int, width: int) -> NDArray[np.uint8]:
    """COCO polygons or run lengths -> (H, W), 0 or 1.

    Raises:
        ValueError: see ``check_segmentation``.
    """
    return coco_mask.decode(encode_segmentation(segmentation, height, width))


def encode_segmentation(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """COCO polygons or run lengths -> compressed run lengths.

    Raises:
        ValueError: see ``check_segmentation``.
    """
    checked = check_segmentation(segmentation, height, width)
    if isinstance(checked, list):
        return coco_mask.merge(coco_mask.frPyObjects(checked, height, width))
    if isinstance(checked["counts"], list):
        return coco_mask.frPyObjects(checked, height, width)
    return checked


def mask_box(segmentation: Any, height: int, width: int) -> list[float]:
    """[x, y, width, height] in pixels of what a segmentation encloses.

    Raises:
        ValueError: see ``check_segmentation``.
    """
    return coco_mask.toBbox(encode_segmentation(segmentation, height, width)).tolist()


def check_segmentation(segmentation: Any, height: int, width: int) -> Any:
    """Returns a segmentation if it is a mask of an image, without parts that enclose nothing.

    Args:
        segmentation: Polygons [[x, y, x, y, …], …] in pixels, of which parts may lie outside of the
            image but no farther than it is large; or {"size": [H, W], "counts": …} with the lengths
            of the runs as a list or compressed, which together are as many as the image's pixels.
        height: Height of the image.
        width: Width of the image.

    Raises:
        OtherSize: of another size.
        ValueError: neither, or nothing that pycocotools can take.
    """
    try:
        if isinstance(segmentation, dict):
            return _checked_runs(segmentation, height, width)
        if not isinstance(segmentation, (list, tuple)):
            raise ValueError("neither a list nor an object")
        polygons = [_checked_polygon(part, height, width) for part in segmentation]
        polygons = [part for part in polygons if len(part) >= 6]
        if not polygons:
            raise ValueError("no polygon of three or more points")
    except OtherSize:
        raise
    except (ValueError, OverflowError) as error:
        shown = " ".join(str(segmentation)[:60].split())
        raise ValueError(
            f"a segmentation must be polygons or run lengths, got {shown} ({error})"
        ) from None
    return polygons


def _checked_polygon(polygon: Any, height: int, width: int) -> list[float]:
    if isinstance(polygon, np.ndarray):
        polygon = polygon.tolist()
    if not isinstance(polygon, (list, tuple)):
        raise ValueError("a polygon is a list of numbers in a list of polygons")
    # One test for all: a training set has tens of millions of coordinates.
    if not set(map(type, polygon)) <= {int, float}:
        if not all(isinstance(v, Real) and not isinstance(v, (bool, np.bool_)) for v in polygon):
            raise ValueError("a coordinate is no number")
        polygon = [float(value) for value in polygon]
    if len(polygon) % 2:
        raise ValueError(f"{len(polygon)} coordinates are no pairs")
    if len(polygon) < 6:
        return []
    far = max(height, width)
    right, bottom = max(polygon[::2]), max(polygon[1::2])
    if min(polygon) < -far or right > width + far or bottom > height + far:
        raise ValueError("a coordinate is farther from the image than it is large")
    if not math.isfinite(sum(polygon)):  # comparisons do not see NaN
        raise ValueError("a coordinate is not finite")
    # No side is longer than three times the image.
    if len(polygon) * 3 * far > 2 * _LONGEST_OUTLINE and outline(polygon) > _LONGEST_OUTLINE:
        raise ValueError(f"an outline of more than {_LONGEST_OUTLINE} pixels")
    return polygon


def outline(polygon: Sequence[float]) -> float:
    """Pixels that the outline of a polygon passes."""
    points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
    return float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum())


def _checked_runs(rle: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    size, counts = rle.get("size"), rle.get("counts")
    sides = list(size) if isinstance(size, (list, tuple, np.ndarray)) else []
    if len(sides) != 2 or not all(_whole(side) for side in sides):
        raise ValueError("the size of run lengths is two whole numbers")
    if (height, width) != (sides[0], sides[1]):
        raise OtherSize(
            f"a segmentation must have its image's size {height}x{width}, got {sides[0]}x{sides[1]}"
        )
    if isinstance(counts, (str, bytes)):
        runs = decompressed(counts)
        least, total = (int(runs.min()), int(runs.sum())) if len(runs) else (0, 0)
    elif isinstance(counts, (list, tuple, np.ndarray)):
        counts = counts.tolist() if isinstance(counts, np.ndarray) else list(counts)
        if not all(_whole(run) for run in counts):
            raise ValueError("a run's length is no whole number")
        least, total = min(counts, default=0), sum(counts)
    else:
        raise ValueError("run lengths are a list or a string")
    if least < 0:
        raise ValueError("a run's length is negative")
    if total != height * width:
        raise ValueError(f"runs of {total} pixels, the image has {height * width}")
    return {"size": [height, width], "counts": counts}


def _whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def decompressed(counts: str | bytes) -> NDArray[np.int64]:
    """Run lengths (N,) from COCO's compressed form.

    Each number stands in groups of five bits, the least significant first, as characters from "0"
    on; 32 marks that more follow, 16 in the last group a negative number. From the fourth on,
    numbers are differences to the last but one.

    Raises:
        ValueError: not in this form, or a number beyond 30 bits.
    """
    # What is not ASCII is out of range, as it should be.
    text = counts.encode("utf-8", "surrogatepass") if isinstance(counts, str) else counts
    groups = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if not len(groups):
        return groups
    last = groups & 32 == 0
    if groups.min() < 0 or groups.max() > 63 or not last[-1]:
        raise ValueError("compressed run lengths are damaged")
    starts = np.flatnonzero(np.append(True, last[:-1]))
    lengths = np.diff(starts, append=len(groups))
    if lengths.max() > 6:
        raise ValueError("compressed run lengths are damaged")
    places = 5 * (np.arange(len(groups)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((groups & 31) << places, starts)
    # The sign bit of the last group stands for all bits above it.
    negative = groups[last] & 16 != 0
    runs -= np.where(negative, np.int64(1) << 5 * lengths, 0)
    runs[1::2], runs[2::2] = runs[1::2].cumsum(), runs[2::2].cumsum()
    return runs

"""Panoptic quality by COCO's rules, in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from expedite_d2.d2 import MetadataCatalog
from expedite_d2.evaluation.evaluator import ImageEvaluator, Metrics, Results, percent

VOID = 0


@dataclass
class ClassCounts:
    """Matches of one class in one image: each true positive's IoU, and the unmatched segments."""

    ious: list[float]
    false_positives: int = 0
    false_negatives: int = 0


ImageCounts = dict[int, ClassCounts]


class GroundTruth(NamedTuple):
    """A data set's panoptic annotation: category → is a thing, image → file name and segments."""

    isthing: dict[int, bool]
    annotations: dict[Hashable, Mapping[str, Any]]


class PanopticEvaluator(ImageEvaluator[ImageCounts]):
    """PQ, SQ and RQ over all classes, things and stuff, in percent.

    The ground truth is what the metadata's ``panoptic_json`` and ``panoptic_root`` name, in the
    data set's own category ids, to which predictions are mapped back.
    """

    @cached_property
    def ground_truth(self) -> GroundTruth:
        """The annotation file, by image."""
        path = Path(MetadataCatalog.get(self.dataset_name).panoptic_json)
        content = json.loads(path.read_text())
        return GroundTruth(
            {c["id"]: bool(c["isthing"]) for c in content["categories"]},
            {a["image_id"]: a for a in content["annotations"]},
        )

    @cached_property
    def dataset_ids(self) -> dict[tuple[bool, int], int]:
        """(is a thing, contiguous id) → the data set's category id."""
        metadata = MetadataCatalog.get(self.dataset_name)
        things = metadata.thing_dataset_id_to_contiguous_id
        stuff = metadata.stuff_dataset_id_to_contiguous_id
        # Where stuff's map repeats the things (Mask2Former's ADE20K), both give the same answer.
        return {(True, v): k for k, v in things.items()} | {(False, v): k for k, v in stuff.items()}

    def measure(self, item: Mapping, output: Mapping) -> ImageCounts:
        """Match one image's segments; see ``match_segments``."""
        ids, segments = self.needed(output, "panoptic_seg", "MODEL.MASK_FORMER.TEST.PANOPTIC_ON")
        image_id = item["image_id"]
        annotation = self.ground_truth.annotations.get(image_id)
        if annotation is None:
            raise KeyError(
                f"image {image_id!r} is not in the panoptic annotation of {self.dataset_name!r}"
            )
        root = Path(MetadataCatalog.get(self.dataset_name).panoptic_root)
        predicted = [{"id": s["id"], "category_id": self._dataset_id(s)} for s in segments]
        return match_segments(
            read_panoptic(root / annotation["file_name"]),
            annotation["segments_info"],
            ids.cpu().numpy(),
            predicted,
        )

    def _dataset_id(self, segment: Mapping) -> int:
        key = (bool(segment["isthing"]), int(segment["category_id"]))
        if key not in self.dataset_ids:
            kind = "thing" if key[0] else "stuff"
            raise ValueError(
                f"{self.dataset_name!r} has no {kind} class {key[1]}, which the model predicted"
            )
        return self.dataset_ids[key]

    def summarise(self, records: Mapping[Hashable, ImageCounts]) -> Results:
        """PQ, SQ, RQ of all classes, and of things (``_th``) and stuff (``_st``) alone."""
        isthing = self.ground_truth.isthing
        metrics: Metrics = {}
        groups = {
            "": set(isthing),
            "_th": {c for c, thing in isthing.items() if thing},
            "_st": {c for c, thing in isthing.items() if not thing},
        }
        for suffix, categories in groups.items():
            metrics |= {
                name + suffix: value
                for name, value in panoptic_quality(records.values(), categories).items()
            }
        return {"panoptic_seg": metrics}


def read_panoptic(path: Path) -> np.ndarray:
    """Read a panoptic PNG: (H, W) int64 segment ids, red + 256 green + 65536 blue; 0 is void."""
    with Image.open(path) as image:
        rgb = np.asarray(image)
    if rgb.ndim != 3:
        raise ValueError(f"{path} must be a colour PNG with segment ids, got shape {rgb.shape}")
    return rgb[..., :3].astype(np.int64) @ np.array([1, 256, 65536])


def match_segments(
    truth: np.ndarray,
    truth_segments: Sequence[Mapping],
    prediction: np.ndarray,
    predicted_segments: Sequence[Mapping],
) -> ImageCounts:
    """Match the segments of one image by COCO's rules.

    A pair of one class matches where its IoU exceeds 0.5, the union without the prediction's void
    pixels; crowd segments never match and are never missed. An unmatched prediction that lies to
    more than half in void or in a crowd of its class is no false positive.

    Args:
        truth: (H, W) segment ids of the annotation, 0 is void.
        truth_segments: its segments: id, category_id, area, iscrowd.
        prediction: (H, W) segment ids of the prediction, 0 is void.
        predicted_segments: its segments: id, category_id.

    Returns:
        The counts of each class that occurs; IoUs in no particular order.

    Raises:
        ValueError: the maps differ in size, or the predicted map and its segments in their ids.
    """
    if truth.shape != prediction.shape:
        raise ValueError(
            f"panoptic prediction must have the annotation's size {truth.shape}, "
            f"got {prediction.shape}"
        )
    # Rows: void, the annotated segments, ids that the annotation does not list.
    truth_rows = _indices(truth, [s["id"] for s in truth_segments])
    columns = _indices(prediction, [s["id"] for s in predicted_segments])
    shape = len(truth_segments) + 2, len(predicted_segments) + 2
    overlap = np.bincount(
        (truth_rows * shape[1] + columns).ravel(), minlength=shape[0] * shape[1]
    ).reshape(shape)
    areas = overlap.sum(0)[1:-1]
    if overlap[:, -1].any() or not areas.all():
        raise ValueError("the predicted panoptic map and its segments_info list different segments")

    in_void, inside = overlap[0, 1:-1], overlap[1:-1, 1:-1]
    truth_classes = _column(truth_segments, "category_id")
    classes = _column(predicted_segments, "category_id")
    crowd = _column(truth_segments, "iscrowd").astype(bool)
    truth_areas = _column(truth_segments, "area")
    union = areas + truth_areas[:, None] - inside - in_void
    same_class = truth_classes[:, None] == classes
    # Where nothing overlaps the union may be 0 (an annotated area of 0), and IoU is 0.
    iou = np.divide(inside, union, out=np.zeros(inside.shape), where=inside > 0)
    matches = same_class & ~crowd[:, None] & (iou > 0.5)

    # COCO has one crowd segment a class and image; of several, the last counts.
    crowd_row = {int(truth_classes[row]): row for row in np.flatnonzero(crowd)}
    ignored = in_void.copy()
    for column, category in enumerate(classes):
        if int(category) in crowd_row:
            ignored[column] += inside[crowd_row[int(category)], column]

    counts: ImageCounts = {}

    def of(category: int) -> ClassCounts:
        return counts.setdefault(int(category), ClassCounts([]))

    for row, column in zip(*np.nonzero(matches), strict=True):
        of(classes[column]).ious.append(float(iou[row, column]))
    for category in truth_classes[~matches.any(1) & ~crowd]:
        of(category).false_negatives += 1
    for category in classes[~matches.any(0) & (ignored / areas <= 0.5)]:
        of(category).false_positives += 1
    return counts


def panoptic_quality(images: Iterable[ImageCounts], categories: set[int]) -> Metrics:
    """PQ, SQ and RQ in percent, averaged over those ``categories`` that occur at all.

    Sums are exact (``fsum``), so the order of the images does not matter.
    """
    total: dict[int, ClassCounts] = {}
    for image in images:
        for category in categories & image.keys():
            sums = total.setdefault(category, ClassCounts([]))
            sums.ious += image[category].ious
            sums.false_positives += image[category].false_positives
            sums.false_negatives += image[category].false_negatives
    rows = []
    for category in sorted(total):
        counts = total[category]
        hits = len(counts.ious)
        denominator = hits + 0.5 * (counts.false_positives + counts.false_negatives)
        iou = math.fsum(counts.ious)
        rows.append((iou / denominator, iou / hits if hits else 0.0, hits / denominator))
    means = np.mean(rows, axis=0) if rows else np.full(3, math.nan)
    return {name: percent(mean) for name, mean in zip(("PQ", "SQ", "RQ"), means, strict=True)}


def _indices(ids: np.ndarray, known: Sequence[int]) -> np.ndarray:
    """Position of each pixel's id in [void, *known]; len(known) + 1 for an id that is not known."""
    values = np.array([VOID, *known], dtype=np.int64)
    order = np.argsort(values, kind="stable")
    position = np.searchsorted(values, ids, sorter=order).clip(max=len(values) - 1)
    index = order[position]
    return np.where(values[index] == ids, index, len(values))


def _column(segments: Sequence[Mapping], key: str) -> np.ndarray:
    return np.array([segment[key] for segment in segments], dtype=np.int64)

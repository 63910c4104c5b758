"""Panoptic quality by COCO's rules, in memory."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from expedite_d2.d2.data.coco_format import is_thing
from expedite_d2.d2.data.coco_json import PanopticFile, read_panoptic_json
from expedite_d2.d2.data.dataset_files import require, tell_once
from expedite_d2.d2.data.mappers import read_label_map
from expedite_d2.d2.evaluation.evaluator import (
    ImageEvaluator,
    Metrics,
    Results,
    image_key,
    percent,
    picture_size,
)

VOID = 0


@dataclass
class ClassCounts:
    """Matches of one class in one image: each true positive's IoU, and the unmatched segments."""

    ious: list[float]
    false_positives: int = 0
    false_negatives: int = 0


ImageCounts = dict[int, ClassCounts]


class Matches(NamedTuple):
    """One image's segments, matched.

    Attributes:
        counts: Of each class that occurs.
        areas: (N,) pixels of each annotated segment.
        unlisted: Pixels of the annotation that belong to no segment it lists.
    """

    counts: ImageCounts
    areas: np.ndarray
    unlisted: int


class ImageRecord(NamedTuple):
    """One image's matches, and how its annotation contradicts its pixels, if it does."""

    counts: ImageCounts
    contradiction: str | None


class PanopticEvaluator(ImageEvaluator[ImageRecord]):
    """PQ, SQ and RQ over all classes, things and stuff, in percent.

    The ground truth is what the metadata's ``panoptic_json`` and ``panoptic_root`` name, in the
    data set's own category ids, to which predictions are mapped back. What is in an image is told
    by its pixels: where the annotation file says otherwise, a warning tells so.
    """

    @cached_property
    def ground_truth(self) -> PanopticFile:
        """The annotation file, by image."""
        isthing = is_thing(
            self.metadata("thing_dataset_id_to_contiguous_id"),
            self.metadata("stuff_dataset_id_to_contiguous_id"),
        )
        return read_panoptic_json(self.dataset_name, self.annotation_file, isthing)

    @cached_property
    def annotation_file(self) -> Path:
        """The metadata's ``panoptic_json``."""
        return Path(self.metadata("panoptic_json"))

    @cached_property
    def root(self) -> Path:
        """Folder of the segment PNGs."""
        return require(Path(self.metadata("panoptic_root")), self.dataset_name)

    @cached_property
    def dataset_ids(self) -> dict[tuple[bool, int], int]:
        """(is a thing, contiguous id) → the data set's category id."""
        things = self.metadata("thing_dataset_id_to_contiguous_id")
        stuff = self.metadata("stuff_dataset_id_to_contiguous_id")
        # Where stuff's map repeats the things (Mask2Former's ADE20K), both give the same answer.
        return {(True, v): k for k, v in things.items()} | {(False, v): k for k, v in stuff.items()}

    def prepare(self) -> None:
        """Read the annotation file."""
        _ = self.ground_truth, self.root

    def measure(self, item: Mapping, output: Mapping) -> ImageRecord:
        """Match one image's segments; see ``match_segments``."""
        ids, segments = self.needed(output, "panoptic_seg", "MODEL.MASK_FORMER.TEST.PANOPTIC_ON")
        key = image_key(item)
        annotation = self.ground_truth.annotations.get(str(key))
        if annotation is None:
            raise ValueError(
                f"image {key!r} is not in the panoptic annotation of {self.dataset_name!r}, "
                f"{self.annotation_file}"
            )
        predicted = [{"id": s["id"], "category_id": self._dataset_id(s)} for s in segments]
        prediction = ids.cpu().numpy()
        truth = read_panoptic(
            self.root / annotation["file_name"], picture_size(item, prediction.shape)
        )
        matches = match_segments(truth, annotation["segments_info"], prediction, predicted)
        return ImageRecord(matches.counts, contradiction(annotation["segments_info"], matches))

    def _dataset_id(self, segment: Mapping) -> int:
        key = (bool(segment["isthing"]), int(segment["category_id"]))
        if key not in self.dataset_ids:
            kind = "thing" if key[0] else "stuff"
            raise ValueError(
                f"{self.dataset_name!r} has no {kind} class {key[1]}, which the model predicted"
            )
        return self.dataset_ids[key]

    def summarise(self, records: Mapping[Hashable, ImageRecord]) -> Results:
        """PQ, SQ, RQ of all classes, and of things (``_th``) and stuff (``_st``) alone."""
        wrong = [f"image {k}: {r.contradiction}" for k, r in records.items() if r.contradiction]
        if wrong:
            tell_once(
                f"data set {self.dataset_name!r}: {self.annotation_file} contradicts the pixels of "
                f"{len(wrong)} images, which count; the first, {wrong[0]}"
            )
        isthing = self.ground_truth.isthing
        metrics: Metrics = {}
        groups = {
            "": set(isthing),
            "_th": {c for c, thing in isthing.items() if thing},
            "_st": {c for c, thing in isthing.items() if not thing},
        }
        images = [record.counts for record in records.values()]
        for suffix, categories in groups.items():
            quality = panoptic_quality(images, categories)
            metrics |= {name + suffix: value for name, value in quality.items()}
        return {"panoptic_seg": metrics}


def read_panoptic(path: str | Path, size: tuple[int, int]) -> np.ndarray:
    """Read a panoptic PNG: (H, W) int64 segment ids, red + 256 green + 65536 blue; 0 is void.

    Args:
        path: the PNG.
        size: (H, W) of its image.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no image, not of colours, or of another size.
    """
    rgb = read_label_map(path, size, colours=True)
    return rgb[..., :3].astype(np.int64) @ np.array([1, 256, 65536])


def contradiction(segments: Sequence[Mapping], matches: Matches) -> str | None:
    """What an annotation says of its segments that their pixels do not, the first of it."""
    for segment, pixels in zip(segments, matches.areas.tolist(), strict=True):
        if not pixels:
            return f"segment {segment['id']} has no pixels"
        if segment.get("area") not in (None, pixels):
            return f"segment {segment['id']} has {pixels} pixels, not {segment['area']!r:.40}"
    return f"{matches.unlisted} pixels are of no listed segment" if matches.unlisted else None


def match_segments(
    truth: np.ndarray,
    truth_segments: Sequence[Mapping],
    prediction: np.ndarray,
    predicted_segments: Sequence[Mapping],
) -> Matches:
    """Match the segments of one image by COCO's rules.

    A pair of one class matches where its IoU exceeds 0.5, the union without the prediction's void
    pixels; crowd segments never match and are never missed, nor are segments without pixels. An
    unmatched prediction that lies to more than half in void or in a crowd of its class is no false
    positive.

    Args:
        truth: (H, W) segment ids of the annotation, 0 is void.
        truth_segments: its segments: id, category_id, iscrowd.
        prediction: (H, W) segment ids of the prediction, 0 is void.
        predicted_segments: its segments: id, category_id.

    Returns:
        The counts of each class that occurs, IoUs in no particular order, and what the annotated
        map holds.

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
    truth_areas = overlap[1:-1].sum(1)
    union = areas + truth_areas[:, None] - inside - in_void
    same_class = truth_classes[:, None] == classes
    # A segment without pixels and a prediction in void alone have no union; their IoU is 0.
    iou = np.divide(inside, union, out=np.zeros(inside.shape), where=inside > 0)
    matches = same_class & ~crowd[:, None] & (iou > 0.5)

    # COCO has one crowd segment per class and image; of several, the last counts.
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
    for category in truth_classes[~matches.any(1) & ~crowd & (truth_areas > 0)]:
        of(category).false_negatives += 1
    for category in classes[~matches.any(0) & (ignored / areas <= 0.5)]:
        of(category).false_positives += 1
    return Matches(counts, truth_areas, int(overlap[-1].sum()))


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

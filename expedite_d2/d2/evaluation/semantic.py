"""Semantic segmentation: mean intersection over union and pixel accuracy, as Detectron2 defines."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from expedite_d2.d2.data.images import read_classes
from expedite_d2.d2.evaluation.evaluator import (
    ImageEvaluator,
    Metrics,
    Results,
    image_key,
    percent,
    picture_size,
)
from expedite_d2.d2.evaluation.panoptic import read_panoptic
from expedite_d2.d2.provider import DatasetCatalog, MetadataCatalog


class Confusion(NamedTuple):
    """The non-zero cells of one image's confusion matrix.

    Sparse, because an image shows a dozen classes where the matrix of 150 has 22 500 cells.
    """

    cells: np.ndarray  # linear index: label * classes + predicted class
    pixels: np.ndarray  # how many pixels fall in the cell


class SemanticEvaluator(ImageEvaluator[Confusion]):
    """mIoU, fwIoU, mACC and pACC in percent; pixels labelled ``ignore_label`` do not count.

    The ground truth is the data set's ``sem_seg_file_name``; where a data set names none, or its
    file was never generated (COCO), the labels are painted from the panoptic annotation.
    """

    @cached_property
    def classes(self) -> int:
        """Number of classes of the data set."""
        return len(self.metadata("stuff_classes"))

    @cached_property
    def ignore_label(self) -> int:
        """Label of the pixels that do not count."""
        return MetadataCatalog.get(self.dataset_name).get("ignore_label", 255)

    @cached_property
    def catalog(self) -> dict[str, dict[str, Any]]:
        """The data set by image file: Detectron2's test mapper drops ``sem_seg_file_name``."""
        return {item["file_name"]: item for item in DatasetCatalog.get(self.dataset_name)}

    def prepare(self) -> None:
        """See that the number of classes is known."""
        _ = self.classes

    def measure(self, item: Mapping, output: Mapping) -> Confusion:
        """Confusion of one image: labels against the most probable class of each pixel."""
        scores = self.needed(output, "sem_seg", "MODEL.MASK_FORMER.TEST.SEMANTIC_ON")
        if scores.shape[0] != self.classes:
            raise ValueError(
                f"sem_seg must have the {self.classes} classes of {self.dataset_name!r}, "
                f"got {scores.shape[0]}"
            )
        prediction = scores.argmax(0).cpu().numpy().astype(np.int64)
        truth = self.labels(item, picture_size(item, prediction.shape))
        if truth.shape != prediction.shape:
            raise ValueError(
                f"sem_seg must have the annotation's size {truth.shape}, got {prediction.shape}"
            )
        valid = truth != self.ignore_label
        labels = truth[valid]
        if labels.size and not 0 <= labels.min() <= labels.max() < self.classes:
            wrong = labels[(labels < 0) | (labels >= self.classes)][0]
            raise ValueError(
                f"labels of {image_key(item)} must be below {self.classes} or "
                f"{self.ignore_label} (ignored), got {wrong}"
            )
        pixels = np.bincount(labels * self.classes + prediction[valid])
        cells = np.flatnonzero(pixels)
        return Confusion(cells, pixels[cells])

    def labels(self, item: Mapping, size: tuple[int, int]) -> np.ndarray:
        """(H, W) int64 labels of an image.

        Args:
            item: dataset dict.
            size: (H, W) of the image.

        Raises:
            FileNotFoundError: there are no labels.
            ValueError: a file that is no map of labels of this size.
        """
        source = item
        if "sem_seg_file_name" not in item and "pan_seg_file_name" not in item:
            source = self.catalog.get(item["file_name"], item)
        path = source.get("sem_seg_file_name")
        if path is not None and Path(path).is_file():
            return read_classes(source, size).astype(np.int64)
        if "pan_seg_file_name" not in source:
            raise FileNotFoundError(
                f"no semantic ground truth of {item['file_name']}: sem_seg_file_name is {path}"
            )
        ids = read_panoptic(source["pan_seg_file_name"], size)
        labels = np.full(ids.shape, self.ignore_label, dtype=np.int64)
        for segment in source["segments_info"]:
            labels[ids == segment["id"]] = segment["category_id"]
        return labels

    def summarise(self, records: Mapping[Hashable, Confusion]) -> Results:
        """Sum the images' matrices and reduce them; see ``semantic_metrics``."""
        matrix = np.zeros(self.classes**2, dtype=np.int64)
        for record in records.values():
            matrix[record.cells] += record.pixels
        return {"sem_seg": semantic_metrics(matrix.reshape(self.classes, self.classes))}


def semantic_metrics(matrix: np.ndarray) -> Metrics:
    """mIoU, fwIoU, mACC and pACC in percent from a confusion matrix.

    Args:
        matrix: (classes, classes) pixels, rows the labels, columns the predictions.

    Returns:
        The means over the classes that are in the ground truth; None where there is none.
    """
    hits = np.diag(matrix).astype(float)
    labelled = matrix.sum(1)
    present = labelled > 0
    if not present.any():
        return dict.fromkeys(("mIoU", "fwIoU", "mACC", "pACC"))
    union = labelled + matrix.sum(0) - hits
    iou = hits[present] / union[present]
    share = labelled[present] / labelled.sum()
    return {
        "mIoU": percent(iou.mean()),
        "fwIoU": percent(math.fsum(iou * share)),
        "mACC": percent((hits[present] / labelled[present]).mean()),
        "pACC": percent(hits.sum() / labelled.sum()),
    }

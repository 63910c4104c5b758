"""Instance segmentation: COCO's average precision."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Hashable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from expedite_d2.d2.data.coco_json import InstanceFile, read_instances_json
from expedite_d2.d2.data.dataset_files import tell_once
from expedite_d2.d2.evaluation.evaluator import ImageEvaluator, Metrics, Results, image_key
from expedite_d2.d2.evaluation.instance_truth import Truth, coco_truth, entries_as_file
from expedite_d2.d2.provider import DatasetCatalog, MetadataCatalog, comm

AREAS = {"AP": "all", "APs": "small", "APm": "medium", "APl": "large"}
IOUS = {"AP50": 0.5, "AP75": 0.75}


class Detections(NamedTuple):
    """One image's detections, masks run-length encoded so that a data set fits in memory."""

    masks: list[dict[str, Any]]
    boxes: np.ndarray  # (N, 4) XYXY
    scores: np.ndarray  # (N,)
    categories: list[int]  # the data set's ids


class InstanceEvaluator(ImageEvaluator[Detections]):
    """AP AP50 AP75 APs APm APl in percent: "segm" always, "bbox" where boxes are predicted.

    The ground truth is the metadata's ``json_file``, or what the data set itself lists where there
    is no such file, restricted to the evaluated images.

    Args:
        dataset_name: the data set's name in the catalogs.
        max_detections: how many detections of a class in an image count, best first.
    """

    def __init__(self, dataset_name: str, max_detections: int) -> None:
        super().__init__(dataset_name)
        self.max_detections = max_detections

    @cached_property
    def dataset_ids(self) -> dict[int, int]:
        """Contiguous id → the data set's category id."""
        ids = MetadataCatalog.get(self.dataset_name).get("thing_dataset_id_to_contiguous_id")
        if ids is None:  # a data set of one's own whose ids have no gaps
            ids = {number: number for number in range(len(self.metadata("thing_classes")))}
        return {contiguous: dataset for dataset, contiguous in ids.items()}

    @cached_property
    def annotation_file(self) -> Path | None:
        """The metadata's ``json_file``, if it has one."""
        path = MetadataCatalog.get(self.dataset_name).get("json_file")
        return Path(path) if path else None

    @cached_property
    def ground_truth(self) -> InstanceFile:
        """The annotation of the data set."""
        if self.annotation_file is not None:
            categories = dict.fromkeys(self.dataset_ids.values())
            return read_instances_json(
                self.dataset_name, self.annotation_file, categories, strict=True
            )
        return entries_as_file(
            self.dataset_name, DatasetCatalog.get(self.dataset_name), self.dataset_ids
        )

    def prepare(self) -> None:
        """Read the annotation; what is no mask ends the evaluation here."""
        truth = self.ground_truth
        if not comm.is_main_process():  # which alone computes the metrics
            self.ground_truth = truth._replace(annotations=[])

    def measure(self, item: Mapping, output: Mapping) -> Detections:
        """Encode one image's instances."""
        instances = self.needed(output, "instances", "MODEL.MASK_FORMER.TEST.INSTANCE_ON")
        self._check_size(image_key(item), instances.image_size)
        classes = instances.pred_classes.tolist()
        unknown = sorted(set(classes) - self.dataset_ids.keys())
        if unknown:
            raise ValueError(
                f"{self.dataset_name!r} has no thing class {unknown[0]}, which the model predicted"
            )
        boxes = (
            instances.pred_boxes.tensor.float().cpu().numpy()
            if instances.has("pred_boxes")
            else np.zeros((len(instances), 4))
        )
        return Detections(
            encode_masks(instances.pred_masks),
            boxes,
            instances.scores.float().cpu().numpy(),
            [self.dataset_ids[c] for c in classes],
        )

    def _check_size(self, key: Hashable, size: tuple[int, int]) -> None:
        """See that an image is annotated, and of the size that the annotation says.

        pycocotools would let masks of different sizes never match.
        """
        source = self.annotation_file or "its entries"
        image = self.ground_truth.images.get(str(key))
        if image is None:
            raise ValueError(
                f"image {key!r} is not in the instance annotation of {self.dataset_name!r}, "
                f"{source}"
            )
        if (image["height"], image["width"]) != tuple(size):
            raise ValueError(
                f"image {key!r} of {self.dataset_name!r} must have the size of its annotation in "
                f"{source}, {image['height']}x{image['width']}, got {size[0]}x{size[1]}"
            )

    def summarise(self, records: Mapping[Hashable, Detections]) -> Results:
        """Average precision of all images' detections."""
        found = {str(key): record for key, record in records.items()}
        truth = coco_truth(self.ground_truth, found, self.dataset_ids.values())
        if truth.contradictions:
            tell_once(
                f"data set {self.dataset_name!r}: {self.annotation_file} gives areas or boxes to "
                f"{len(truth.contradictions)} masks that are not theirs, which count; the first, "
                f"{truth.contradictions[0]}"
            )
        with _silence():
            results = {"segm": self._average_precision(truth, found, "segm")}
            # Mask2Former predicts masks and fills its boxes with zeros.
            if any(record.boxes.any() for record in found.values()):
                results["bbox"] = self._average_precision(truth, found, "bbox")
        return results

    def _average_precision(
        self, truth: Truth, records: Mapping[str, Detections], kind: str
    ) -> Metrics:
        evaluation = COCOeval(
            _index(truth.dataset), _detections(truth, records, kind), iouType=kind
        )
        # One entry: the precision at fewer detections would be computed and not read.
        evaluation.params.maxDets = [self.max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
        # (IoU thresholds, recalls, classes, areas, max_detections); -1 where it is undefined
        precision = evaluation.eval["precision"][..., 0]
        areas = evaluation.params.areaRngLbl
        metrics = {
            name: _mean_defined(precision[..., areas.index(area)]) for name, area in AREAS.items()
        }
        for name, threshold in IOUS.items():
            row = int(np.argmin(np.abs(evaluation.params.iouThrs - threshold)))
            metrics[name] = _mean_defined(precision[row, ..., areas.index("all")])
        return {name: metrics[name] for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")}


def encode_masks(masks: Any) -> list[dict[str, Any]]:
    """Run-length encode masks.

    Args:
        masks: (N, H, W) tensor, non-zero inside; or an object that holds it as ``.tensor``.
    """
    tensor: torch.Tensor = getattr(masks, "tensor", masks)
    if tensor.shape[0] == 0:
        return []
    # The encoder reads columns first and masks last: (N, W, H) in C order is that, transposed.
    columns = (tensor != 0).to(torch.uint8).transpose(1, 2).contiguous().cpu().numpy()
    return coco_mask.encode(columns.transpose(2, 1, 0))


def _detections(truth: Truth, records: Mapping[str, Detections], kind: str) -> COCO:
    """The detections as COCO wants them: an area decides which of APs, APm, APl they count in."""
    annotations: list[dict[str, Any]] = []
    for key, record in records.items():
        areas = coco_mask.area(record.masks) if record.masks else []
        for mask, area, box, score, category in zip(
            record.masks, areas, record.boxes, record.scores, record.categories, strict=True
        ):
            x, y, width, height = (float(v) for v in (*box[:2], *(box[2:] - box[:2])))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": truth.numbers[key],
                    "category_id": category,
                    "score": float(score),
                    "iscrowd": 0,
                    "segmentation": mask,
                    "bbox": [x, y, width, height],
                    "area": float(area) if kind == "segm" else width * height,
                }
            )
    return _index({**truth.dataset, "annotations": annotations})


def _index(dataset: dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _mean_defined(precision: np.ndarray) -> float | None:
    defined = precision[precision > -1]
    return 100.0 * float(defined.mean()) if defined.size else None


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """pycocotools reports its progress with print."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield

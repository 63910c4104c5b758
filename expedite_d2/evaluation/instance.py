"""Instance segmentation: COCO's average precision."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Hashable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from expedite_d2.d2 import DatasetCatalog, MetadataCatalog
from expedite_d2.evaluation.evaluator import ImageEvaluator, Metrics, Results, image_key

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
        ids = MetadataCatalog.get(self.dataset_name).thing_dataset_id_to_contiguous_id
        return {contiguous: dataset for dataset, contiguous in ids.items()}

    def measure(self, item: Mapping, output: Mapping) -> Detections:
        """Encode one image's instances."""
        instances = self.needed(output, "instances", "MODEL.MASK_FORMER.TEST.INSTANCE_ON")
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

    def summarise(self, records: Mapping[Hashable, Detections]) -> Results:
        """Average precision of all images' detections."""
        with _silence():
            truth = _restricted(self._annotation(), records)
            results = {"segm": self._average_precision(truth, records, "segm")}
            # Mask2Former predicts masks and fills its boxes with zeros.
            if any(record.boxes.any() for record in records.values()):
                results["bbox"] = self._average_precision(truth, records, "bbox")
        return results

    def _annotation(self) -> dict[str, Any]:
        """The data set's annotation in COCO's format."""
        path = MetadataCatalog.get(self.dataset_name).get("json_file")
        if path:
            return json.loads(Path(path).read_text())
        return coco_annotation(DatasetCatalog.get(self.dataset_name), self.dataset_ids)

    def _average_precision(
        self, truth: COCO, records: Mapping[Hashable, Detections], kind: str
    ) -> Metrics:
        evaluation = COCOeval(truth, _detections(truth, records, kind), iouType=kind)
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


def coco_annotation(
    entries: Iterable[Mapping[str, Any]], dataset_ids: Mapping[int, int]
) -> dict[str, Any]:
    """COCO's instance format of dataset dicts whose masks are run-length encoded or polygons.

    Args:
        entries: dataset dicts with ``annotations``.
        dataset_ids: contiguous id → the data set's category id.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for entry in entries:
        image = {"id": image_key(entry), "height": entry["height"], "width": entry["width"]}
        images.append(image)
        for annotation in entry["annotations"]:
            mask = annotation["segmentation"]
            if isinstance(mask, list):
                parts = coco_mask.frPyObjects(mask, entry["height"], entry["width"])
                mask = coco_mask.merge(parts)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": dataset_ids[annotation["category_id"]],
                    "iscrowd": int(annotation.get("iscrowd", 0)),
                    "segmentation": mask,
                    "area": float(coco_mask.area(mask)),
                    "bbox": coco_mask.toBbox(mask).tolist(),
                }
            )
    categories = [{"id": number, "name": str(number)} for number in dataset_ids.values()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _restricted(annotation: dict[str, Any], records: Mapping[Hashable, Detections]) -> COCO:
    images = [image for image in annotation["images"] if image["id"] in records]
    if len(images) != len(records):
        missing = sorted(map(str, records.keys() - {image["id"] for image in images}))
        raise KeyError(f"image {missing[0]} is not in the instance annotation")
    return _index(
        {
            "images": images,
            "categories": annotation["categories"],
            "annotations": [a for a in annotation["annotations"] if a["image_id"] in records],
        }
    )


def _detections(truth: COCO, records: Mapping[Hashable, Detections], kind: str) -> COCO:
    """The detections as COCO wants them: an area decides which of APs, APm, APl they count in."""
    annotations: list[dict[str, Any]] = []
    for image_id, record in records.items():
        areas = coco_mask.area(record.masks) if record.masks else []
        for mask, area, box, score, category in zip(
            record.masks, areas, record.boxes, record.scores, record.categories, strict=True
        ):
            x, y, width, height = (float(v) for v in (*box[:2], *(box[2:] - box[:2])))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
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

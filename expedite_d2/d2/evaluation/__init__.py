"""Accuracy (PQ, mIoU, AP, depth), latency and memory; multiply-adds are counted in ``cost``."""

from __future__ import annotations

from typing import Any

from expedite_d2.d2.evaluation.depth import DepthEvaluator
from expedite_d2.d2.evaluation.evaluator import (
    DatasetEvaluator,
    ImageEvaluator,
    inference_on_dataset,
)
from expedite_d2.d2.evaluation.instance import InstanceEvaluator
from expedite_d2.d2.evaluation.panoptic import PanopticEvaluator
from expedite_d2.d2.evaluation.semantic import SemanticEvaluator
from expedite_d2.d2.provider import MetadataCatalog
from expedite_d2.tools.latency import (
    Latency,
    PeakMemory,
    measure_interleaved,
    measure_latency,
    time_call,
)

__all__ = [
    "DatasetEvaluator",
    "DepthEvaluator",
    "ImageEvaluator",
    "InstanceEvaluator",
    "Latency",
    "PanopticEvaluator",
    "PeakMemory",
    "SemanticEvaluator",
    "build_evaluators",
    "inference_on_dataset",
    "measure_interleaved",
    "measure_latency",
    "time_call",
]


def build_evaluators(cfg: Any, dataset_name: str) -> list[ImageEvaluator[Any]]:
    """The evaluators of a data set, as Mask2Former chooses them.

    A panoptic data set is evaluated in each task that ``MODEL.MASK_FORMER.TEST.*_ON`` switches on
    and that it has ground truth for; a semantic, instance or depth data set in its one task.

    Args:
        cfg: the config (a CfgNode).
        dataset_name: the data set's name; its metadata's ``evaluator_type`` decides.

    Returns:
        At least one evaluator.

    Raises:
        ValueError: an unknown evaluator type, or every task of the data set is switched off.
    """
    metadata = MetadataCatalog.get(dataset_name)
    kind = metadata.get("evaluator_type")
    max_detections = cfg.TEST.DETECTIONS_PER_IMAGE
    if kind in ("sem_seg", "cityscapes_sem_seg"):
        return [SemanticEvaluator(dataset_name)]
    if kind in ("coco", "cityscapes_instance"):
        return [InstanceEvaluator(dataset_name, max_detections)]
    if kind == "depth":
        return [DepthEvaluator(dataset_name)]
    if not str(kind).endswith("_panoptic_seg"):
        raise ValueError(
            f"data set {dataset_name!r} must have evaluator_type 'sem_seg', 'coco', 'depth' "
            f"or '…_panoptic_seg', got {kind!r}"
        )
    switches = cfg.MODEL.MASK_FORMER.TEST
    evaluators: list[ImageEvaluator[Any]] = []
    if switches.PANOPTIC_ON:
        evaluators.append(PanopticEvaluator(dataset_name))
    if switches.SEMANTIC_ON:
        evaluators.append(SemanticEvaluator(dataset_name))
    if switches.INSTANCE_ON and metadata.get("json_file"):
        evaluators.append(InstanceEvaluator(dataset_name, max_detections))
    if not evaluators:
        raise ValueError(
            f"nothing to evaluate on {dataset_name!r}: set at least one of "
            "MODEL.MASK_FORMER.TEST.PANOPTIC_ON, SEMANTIC_ON, INSTANCE_ON True"
        )
    return evaluators

"""Panoptic FPN as a Detectron2 meta-architecture.

"Panoptic Feature Pyramid Networks", arXiv 1901.02446: Mask R-CNN and a semantic head on one
feature pyramid, combined without learning.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from expedite_d2.d2.config.rules import DETECTOR_KEYS, check
from expedite_d2.d2.modeling.meta_arch.cascade import Stage
from expedite_d2.d2.modeling.meta_arch.detection_inference import Suppression
from expedite_d2.d2.modeling.meta_arch.detector import PyramidDetector
from expedite_d2.d2.modeling.meta_arch.resize import crop_and_resize, resize
from expedite_d2.d2.modeling.meta_arch.semantic_heads import SemanticFPN
from expedite_d2.d2.modeling.upcast import upcast_layers
from expedite_d2.d2.provider import META_ARCH_REGISTRY, CfgNode, Instances


@META_ARCH_REGISTRY.register()
class ExpeditedPanopticFPN(PyramidDetector):
    """Panoptic, semantic and instance segmentation on one feature pyramid.

    The semantic head predicts all classes of the data set. Pixels that it assigns to a thing class,
    but that belong to no instance, are void.

    Args:
        cfg: Detectron2's keys of its ``PanopticFPN``.

    Raises:
        ValueError: a key that asks for something unsupported.
    """

    def __init__(self, cfg: CfgNode) -> None:
        check(cfg, DETECTOR_KEYS)
        heads, box = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD
        if len(heads.IOU_THRESHOLDS) != 1:
            raise ValueError(
                f"MODEL.ROI_HEADS.IOU_THRESHOLDS must have one entry, got {heads.IOU_THRESHOLDS}"
            )
        stage = Stage(
            heads.IOU_THRESHOLDS[0],
            tuple(box.BBOX_REG_WEIGHTS),
            cfg.MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT,
        )
        super().__init__(cfg, [stage], Suppression.from_config(cfg, soft=False))
        self.sem_seg_head = SemanticFPN(cfg, self.shapes)
        combine = cfg.MODEL.PANOPTIC_FPN.COMBINE
        self.combine = combine.ENABLED
        self.combine_overlap_threshold = combine.OVERLAP_THRESH
        self.combine_stuff_area_limit = combine.STUFF_AREA_LIMIT
        self.combine_score_threshold = combine.INSTANCES_CONFIDENCE_THRESH
        upcast_layers(self)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Losses in training, results at evaluation, in Detectron2's formats.

        Args:
            batched_inputs: for each image ``"image"`` (3, h, w), and ``"height"``, ``"width"`` of
                its result if that is not (h, w); in training ``"instances"`` (``gt_classes`` (N,),
                ``gt_masks`` (N, h, w)) and ``"sem_seg"`` (h, w) int64.

        Returns:
            Training: a dict of scalar losses. Evaluation: for each image a dict with ``"sem_seg"``
            (K, H, W), ``"instances"`` and, with ``MODEL.PANOPTIC_FPN.COMBINE.ENABLED``,
            ``"panoptic_seg"`` (ids (H, W) int32, segments).
        """
        images = self.preprocess([inputs["image"] for inputs in batched_inputs])
        size = (images.tensor.shape[-2], images.tensor.shape[-1])
        with self.eval_autocast():
            maps = self.pyramid(images.tensor)
            regions = self.regions(maps)
            semantic = self.sem_seg_head(maps).float()
        if self.training:
            sizes = images.image_sizes
            losses = self.detection_losses(maps, regions, batched_inputs, sizes)
            losses["loss_sem_seg"] = self.sem_seg_head.loss(semantic, batched_inputs, size)
            return losses
        with self.eval_autocast():
            views = self.views(maps, regions, images.image_sizes)
        results = []
        for view, scores, inputs in zip(views, semantic, batched_inputs, strict=True):
            instances = self.instances([view], inputs, view.size)
            sem_seg = crop_and_resize(resize(scores, size), view.size, instances.image_size)
            result: dict[str, Any] = {"sem_seg": sem_seg, "instances": instances}
            if self.combine:
                result["panoptic_seg"] = combine_semantic_and_instance_outputs(
                    instances,
                    sem_seg.argmax(0),
                    set(self.thing_ids()),
                    self.combine_overlap_threshold,
                    self.combine_stuff_area_limit,
                    self.combine_score_threshold,
                )
            results.append(result)
        return results

    def dense_logits(self, maps: Mapping[str, Tensor]) -> list[Tensor]:
        """Returns the semantic logits."""
        return [self.sem_seg_head(maps)]


def combine_semantic_and_instance_outputs(
    instances: Instances,
    semantic: Tensor,
    thing_ids: Collection[int],
    overlap_threshold: float,
    stuff_area_limit: int,
    score_threshold: float,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Combines results by the rule of Panoptic FPN: instances first, those of higher score on top.

    Args:
        instances: with ``scores``, ``pred_classes`` and ``pred_masks`` (N, H, W).
        semantic: (H, W) int64, the class of each pixel.
        thing_ids: classes that only instances may have.
        overlap_threshold: an instance is dropped if more than this share of it is covered already.
        stuff_area_limit: least number of pixels of a stuff segment.
        score_threshold: least score of an instance.

    Returns:
        ids: (H, W) int32, 0 where nothing was found; segments: ``{"id", "isthing", "category_id"}``
        of each id, with ``"score"`` and ``"instance_id"`` of instances and ``"area"`` of stuff.
    """
    ids = torch.zeros_like(semantic, dtype=torch.int32)
    segments: list[dict[str, Any]] = []
    scores, classes = instances.scores.tolist(), instances.pred_classes.tolist()
    masks = instances.pred_masks.to(device=ids.device, dtype=torch.bool)
    for index in instances.scores.argsort(descending=True, stable=True).tolist():
        if scores[index] < score_threshold:
            break
        free = masks[index] & (ids == 0)
        area, left = torch.stack([masks[index].sum(), free.sum()]).tolist()
        if not left or (area - left) / area > overlap_threshold:
            continue
        segments.append(
            {
                "id": len(segments) + 1,
                "isthing": True,
                "score": scores[index],
                "category_id": classes[index],
                "instance_id": index,
            }
        )
        ids[free] = len(segments)
    for category in semantic.unique().tolist():
        if category in thing_ids:
            continue
        free = (semantic == category) & (ids == 0)
        area = int(free.sum())
        if area < max(stuff_area_limit, 1):
            continue
        segments.append(
            {"id": len(segments) + 1, "isthing": False, "category_id": category, "area": area}
        )
        ids[free] = len(segments)
    return ids, segments

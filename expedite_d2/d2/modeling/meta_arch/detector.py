"""Base of the detectors: backbone, feature pyramid, region proposals, inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from expedite_d2.d2.modeling.backbone.fpn import FeaturePyramid
from expedite_d2.d2.modeling.backbone.settings import check_features
from expedite_d2.d2.modeling.meta_arch.cascade import CascadeHeads, Stage
from expedite_d2.d2.modeling.meta_arch.detection_inference import Suppression, View, detect
from expedite_d2.d2.modeling.meta_arch.image_model import ImageModel
from expedite_d2.d2.modeling.meta_arch.regions import (
    RegionFeatures,
    RegionProposals,
    ground_truth,
    thing_ids,
)
from expedite_d2.d2.modeling.meta_arch.resize import result_size
from expedite_d2.d2.modeling.meta_arch.sliding_window import refuse_sliding_window
from expedite_d2.d2.provider import CfgNode, Instances
from expedite_d2.profiling import profiler_range


class PyramidDetector(ImageModel):
    """Two-stage detector on a feature pyramid over the backbone ``MODEL.BACKBONE.NAME``.

    Args:
        cfg: Detectron2's keys, and ``TEST.DTYPE``.
        stages: settings of the box and mask heads.
        suppression: which boxes are detections.

    Raises:
        ValueError: a key that asks for something unsupported.
    """

    def __init__(self, cfg: CfgNode, stages: Sequence[Stage], suppression: Suppression) -> None:
        refuse_sliding_window(cfg)
        super().__init__(cfg)
        heads = cfg.MODEL.ROI_HEADS
        self.fpn = FeaturePyramid.from_config(cfg, self.backbone.output_shape())
        self.shapes = self.fpn.output_shape()
        check_features("MODEL.ROI_HEADS.IN_FEATURES", heads.IN_FEATURES, self.shapes)
        self.region_levels = list(heads.IN_FEATURES)
        strides = [self.shapes[name].stride or 0 for name in self.region_levels]
        if strides != [strides[0] * 2**i for i in range(len(strides))]:
            raise ValueError(
                "MODEL.ROI_HEADS.IN_FEATURES must have strides that double from one to the next, "
                f"got {self.region_levels}"
            )
        self.proposal_generator = RegionProposals(cfg, self.shapes)
        self.roi_heads = CascadeHeads(cfg, cfg.MODEL.FPN.OUT_CHANNELS, stages)
        self.num_classes = heads.NUM_CLASSES
        self.suppression = suppression
        self.proposals_per_image = cfg.MODEL.RPN.POST_NMS_TOPK_TEST
        self.size_divisibility = max(self.backbone.size_divisibility, self.fpn.size_divisibility)

    def pyramid(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W), normalised -> maps "p2" … "p6", float32."""
        with profiler_range("expedite_d2.backbone", images):
            features = self.backbone(images)
        with profiler_range("expedite_d2.pyramid", images):
            return {name: level.float() for name, level in self.fpn(features).items()}

    def regions(self, maps: Mapping[str, Tensor]) -> RegionFeatures:
        """Returns the maps from which the box and mask heads pool regions."""
        return RegionFeatures(
            [maps[name] for name in self.region_levels],
            [self.shapes[name].stride or 0 for name in self.region_levels],
        )

    def views(
        self,
        maps: Mapping[str, Tensor],
        regions: RegionFeatures,
        image_sizes: Sequence[tuple[int, int]],
        flipped: bool = False,
    ) -> list[View]:
        """Returns refined boxes and class scores of each image of a batch."""
        sizes = list(image_sizes)
        with profiler_range("expedite_d2.proposals", self.pixel_mean):
            proposals, _ = self.proposal_generator.propose(maps, sizes)
        with profiler_range("expedite_d2.box_heads", self.pixel_mean):
            boxes, scores = self.roi_heads.boxes(regions, proposals, sizes)
        return [
            View(regions.image(i), boxes[i], scores[i], size, flipped)
            for i, size in enumerate(sizes)
        ]

    def instances(
        self, views: Sequence[View], inputs: Mapping[str, Any], size: tuple[int, int]
    ) -> Instances:
        """Returns the detections of one image from its views, in the size that ``inputs`` gives."""
        height, width = result_size(inputs, size)
        result = detect(views, self._masks, self.suppression, height, width)
        things = torch.tensor(self.thing_ids(), device=result.pred_classes.device)
        result.pred_classes = things[result.pred_classes]
        return result

    def detection_losses(
        self,
        maps: Mapping[str, Tensor],
        regions: RegionFeatures,
        batched_inputs: Sequence[Mapping[str, Any]],
        image_sizes: Sequence[tuple[int, int]],
    ) -> dict[str, Tensor]:
        """Returns the losses of the proposals and of the box and mask heads."""
        sizes = list(image_sizes)
        truths = ground_truth(batched_inputs, self.thing_ids(), self.device)
        proposals, losses = self.proposal_generator.propose(maps, sizes, truths)
        return losses | self.roi_heads.losses(regions, proposals, truths, sizes)

    def logits(self, images: Tensor) -> tuple[list[Tensor], ...]:
        """Computes everything for the maximum number of regions, to count its cost.

        Every region is the whole image: the cost depends on their number, not on their position.

        Args:
            images: (B, 3, H, W), normalised, H and W multiples of ``size_divisibility``.

        Returns:
            objectness and box deltas of each level; boxes and class scores of
            ``MODEL.RPN.POST_NMS_TOPK_TEST`` regions of each image; masks of each stage for
            ``TEST.DETECTIONS_PER_IMAGE`` regions of each image; ``dense_logits``.
        """
        batch, _, height, width = images.shape
        with self.eval_autocast():
            maps = self.pyramid(images)
            regions = self.regions(maps)
            objectness, deltas = self.proposal_generator.scores(maps)
            whole = torch.tensor([[0.0, 0.0, width, height]], device=images.device)
            proposals = [whole.repeat(self.proposals_per_image, 1)] * batch
            boxes, scores = self.roi_heads.boxes(regions, proposals, [(height, width)] * batch)
            detections = [whole.repeat(self.suppression.max_detections, 1)] * batch
            masks = self.roi_heads.mask_logits(regions, detections)
            dense = self.dense_logits(maps)
        return objectness, deltas, boxes, scores, masks, dense

    def dense_logits(self, maps: Mapping[str, Tensor]) -> list[Tensor]:
        """Returns what a subclass predicts at evaluation beside detections."""
        return []

    def thing_ids(self) -> list[int]:
        """Returns contiguous ids of the detector's classes in the data set."""
        return thing_ids(self.dataset_name, self.num_classes)

    def _masks(self, features: RegionFeatures, boxes: list[Tensor], classes: Tensor) -> Tensor:
        with self.eval_autocast(), profiler_range("expedite_d2.mask_heads", self.pixel_mean):
            return self.roi_heads.masks(features, boxes, classes)

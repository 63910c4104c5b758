"""Regions of an image in detectors: proposals, pooling, matching, and ground truth.

Region proposals, matching, sampling, box coding and RoIAlign are torchvision's. Boxes are XYXY in
continuous pixel coordinates, as in Detectron2, so that all pooling is aligned to half pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import box_iou, masks_to_boxes, roi_align

from expedite_d2.d2.modeling.backbone.settings import check_features
from expedite_d2.d2.modeling.meta_arch.losses import instance_targets
from expedite_d2.d2.provider import CfgNode, MetadataCatalog, ShapeSpec

# A box of this side belongs to the level of stride 16 (FPN paper, section 4.2).
CANONICAL_SIDE, CANONICAL_STRIDE = 224, 16


class PyramidAnchors(AnchorGenerator):
    """torchvision's anchors at the true strides of the levels.

    torchvision divides the image by the map, which is wrong if the size of the map was rounded up.

    Args:
        sizes: of each level, side lengths in pixels.
        aspect_ratios: of each level, height / width.
        strides: of each level, in pixels.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[float]],
        aspect_ratios: Sequence[Sequence[float]],
        strides: Sequence[int],
    ) -> None:
        super().__init__(tuple(map(tuple, sizes)), tuple(map(tuple, aspect_ratios)))
        self.strides = list(strides)

    def forward(self, image_list: Any, feature_maps: list[Tensor]) -> list[Tensor]:
        """Returns the anchors of every image: the same (A, 4) for all of them."""
        reference = feature_maps[0]
        self.set_cell_anchors(reference.dtype, reference.device)
        sizes = [list(level.shape[-2:]) for level in feature_maps]
        steps = [[torch.tensor(s, device=reference.device)] * 2 for s in self.strides]
        anchors = torch.cat(self.grid_anchors(sizes, steps))
        return [anchors] * len(reference)


class RegionProposals(RegionProposalNetwork):
    """torchvision's region proposal network with Detectron2's keys, losses and loss names.

    Args:
        cfg: ``MODEL.RPN`` and ``MODEL.ANCHOR_GENERATOR``.
        shapes: channels and stride of the pyramid's maps.

    Raises:
        ValueError: a key that asks for something unsupported.
    """

    def __init__(self, cfg: CfgNode, shapes: Mapping[str, ShapeSpec]) -> None:
        rpn, anchor = cfg.MODEL.RPN, cfg.MODEL.ANCHOR_GENERATOR
        names = list(rpn.IN_FEATURES)
        check_features("MODEL.RPN.IN_FEATURES", names, shapes)
        if rpn.BBOX_REG_LOSS_TYPE != "smooth_l1":
            raise ValueError(
                f"MODEL.RPN.BBOX_REG_LOSS_TYPE must be 'smooth_l1', got {rpn.BBOX_REG_LOSS_TYPE!r}"
            )
        sizes = _per_level("SIZES", anchor.SIZES, len(names))
        ratios = _per_level("ASPECT_RATIOS", anchor.ASPECT_RATIOS, len(names))
        strides = [shapes[name].stride or 0 for name in names]
        anchors = PyramidAnchors(sizes, ratios, strides)
        counts = set(anchors.num_anchors_per_location())
        if len(counts) != 1:
            raise ValueError(
                "MODEL.ANCHOR_GENERATOR must give every level the same number of anchors, "
                f"got {anchors.num_anchors_per_location()}"
            )
        super().__init__(
            anchors,
            RPNHead(shapes[names[0]].channels or 0, counts.pop()),
            fg_iou_thresh=rpn.IOU_THRESHOLDS[1],
            bg_iou_thresh=rpn.IOU_THRESHOLDS[0],
            batch_size_per_image=rpn.BATCH_SIZE_PER_IMAGE,
            positive_fraction=rpn.POSITIVE_FRACTION,
            pre_nms_top_n={"training": rpn.PRE_NMS_TOPK_TRAIN, "testing": rpn.PRE_NMS_TOPK_TEST},
            post_nms_top_n={"training": rpn.POST_NMS_TOPK_TRAIN, "testing": rpn.POST_NMS_TOPK_TEST},
            nms_thresh=rpn.NMS_THRESH,
        )
        # torchvision's 0.01 is for pre-trained features; from scratch it learns slowly.
        for module in self.head.conv.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.in_features = names
        self.beta = rpn.SMOOTH_L1_BETA
        self.weight, self.box_weight = rpn.LOSS_WEIGHT, rpn.BBOX_REG_LOSS_WEIGHT
        self.box_coder.weights = tuple(rpn.BBOX_REG_WEIGHTS)

    def scores(self, features: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Returns objectness (B, A, h, w) and box deltas (B, 4A, h, w) of each level, float32."""
        objectness, deltas = self.head([features[name] for name in self.in_features])
        return [level.float() for level in objectness], [level.float() for level in deltas]

    def propose(
        self,
        features: Mapping[str, Tensor],
        image_sizes: list[tuple[int, int]],
        truths: Sequence[GroundTruth] | None = None,
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Returns proposals of each image, and in training the losses.

        Args:
            features: the pyramid's maps.
            image_sizes: (h, w) of each image without padding; boxes are clipped to it.
            truths: of each image, for the losses.

        Returns:
            of each image (R, 4) by falling objectness; ``loss_rpn_cls`` and ``loss_rpn_loc``.
        """
        objectness, deltas = self.scores(features)
        anchors = self.anchor_generator(None, objectness)
        flat_scores = torch.cat([_flatten(level, 1) for level in objectness], 1)  # (B, A)
        flat_deltas = torch.cat([_flatten(level, 4) for level in deltas], 1)  # (B, A, 4)
        boxes = self.box_coder.decode(flat_deltas.detach().flatten(0, 1), anchors)
        boxes = boxes.view(len(anchors), -1, 4)
        counts = [level[0].numel() for level in objectness]
        proposals, _ = self.filter_proposals(
            boxes, flat_scores.squeeze(-1).detach(), image_sizes, counts
        )
        if truths is None:
            return proposals, {}
        labels, matched = self.assign_targets_to_anchors(
            anchors, [{"boxes": truth.boxes} for truth in truths]
        )
        targets = self.box_coder.encode(matched, anchors)
        objectness_loss, box_loss = self.compute_loss(
            flat_scores.flatten(), flat_deltas.flatten(0, 1), labels, list(targets)
        )
        losses = {
            "loss_rpn_cls": self.weight * objectness_loss,
            "loss_rpn_loc": self.weight * self.box_weight * box_loss,
        }
        return proposals, losses

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """torchvision's losses, with ``MODEL.RPN.SMOOTH_L1_BETA`` instead of 1/9."""
        positive, negative = self.fg_bg_sampler(labels)
        chosen_positive = torch.cat(positive).nonzero()[:, 0]
        chosen = torch.cat([chosen_positive, torch.cat(negative).nonzero()[:, 0]])
        box_loss = F.smooth_l1_loss(
            pred_bbox_deltas[chosen_positive],
            torch.cat(regression_targets)[chosen_positive],
            beta=self.beta,
            reduction="sum",
        ) / max(len(chosen), 1)
        objectness_loss = F.binary_cross_entropy_with_logits(
            objectness[chosen], torch.cat(labels)[chosen], reduction="sum"
        ) / max(len(chosen), 1)
        return objectness_loss, box_loss


def _flatten(level: Tensor, values: int) -> Tensor:
    """(B, A·values, h, w) -> (B, h·w·A, values), the order of the anchors."""
    batch, _, height, width = level.shape
    level = level.view(batch, -1, values, height, width)
    return level.permute(0, 3, 4, 1, 2).reshape(batch, -1, values)


def _per_level(name: str, values: Sequence[Sequence[float]], levels: int) -> list[Sequence[float]]:
    if len(values) not in (1, levels):
        raise ValueError(
            f"MODEL.ANCHOR_GENERATOR.{name} must have one entry, or one for each of the {levels} "
            f"features of MODEL.RPN.IN_FEATURES, got {len(values)}"
        )
    return list(values) * (levels // len(values))


class GroundTruth(NamedTuple):
    """Objects of thing classes in one image."""

    boxes: Tensor  # (N, 4) float32
    classes: Tensor  # (N,) int64, 0 to K - 1
    masks: Tensor  # (N, h, w) float32, 0 or 1


def thing_ids(dataset_name: str, count: int) -> list[int]:
    """Returns contiguous ids of a data set's thing classes, in the order of a detector's classes.

    Raises:
        ValueError: the data set has another number of thing classes.
    """
    ids = MetadataCatalog.get(dataset_name).get("thing_dataset_id_to_contiguous_id")
    if ids is None:
        return list(range(count))
    if len(ids) != count:
        raise ValueError(
            f"MODEL.ROI_HEADS.NUM_CLASSES must be the number of thing classes of "
            f"{dataset_name!r}, {len(ids)}, got {count}"
        )
    return sorted(ids.values())


def ground_truth(
    batched_inputs: Sequence[Mapping[str, Any]], things: Sequence[int], device: torch.device
) -> list[GroundTruth]:
    """Returns the things of each image, with the tight boxes of their masks.

    Args:
        batched_inputs: see ``instance_targets``; objects of other classes are left out.
        things: contiguous ids of the thing classes.
        device: where the result goes.

    Raises:
        ValueError: an image without ``"instances"``, or masks that are polygons.
    """
    table = torch.tensor(things, dtype=torch.int64, device=device)
    truths = []
    for inputs in batched_inputs:
        masks, classes = instance_targets(inputs, device)
        keep = torch.isin(classes, table) & masks.flatten(1).any(1)
        masks, classes = masks[keep], classes[keep]
        # torchvision returns the last pixel inside, but a box ends with the first one outside.
        boxes = masks_to_boxes(masks) + masks.new_tensor([0, 0, 1, 1], dtype=torch.float32)
        index = (classes[:, None] == table).long().argmax(1) if len(classes) else classes
        truths.append(GroundTruth(boxes, index, masks.float()))
    return truths


def match_boxes(boxes: Tensor, truth: GroundTruth, iou: float) -> Tensor:
    """Returns the object that each box overlaps most, (R,) int64; -1 if by less than ``iou``."""
    if not len(boxes) or not len(truth.boxes):
        return torch.full((len(boxes),), -1, dtype=torch.int64, device=boxes.device)
    return Matcher(iou, iou)(box_iou(truth.boxes, boxes))


class Sample(NamedTuple):
    """Regions of one image for training."""

    boxes: Tensor  # (R, 4)
    matched: Tensor  # (R,) int64, an object of the ground truth, -1 for background
    is_truth: Tensor  # (R,) bool: boxes of the ground truth itself

    def classes(self, truth: GroundTruth, background: int) -> Tensor:
        """Returns (R,) int64: the class of the object, or ``background``."""
        if not len(truth.classes):
            return torch.full_like(self.matched, background)
        return torch.where(self.matched >= 0, truth.classes[self.matched.clamp(min=0)], background)

    def positive(self) -> Sample:
        """Returns the regions on objects."""
        keep = self.matched >= 0
        return Sample(self.boxes[keep], self.matched[keep], self.is_truth[keep])


@dataclass(frozen=True)
class Sampling:
    """Number of regions per image for training (``MODEL.ROI_HEADS``)."""

    regions: int
    positive_fraction: float
    add_truth: bool

    def draw(self, proposals: Tensor, truth: GroundTruth, iou: float) -> Sample:
        """Samples from proposals (R, 4) and, if these are to be added, the objects' own boxes."""
        boxes = torch.cat([proposals, truth.boxes]) if self.add_truth else proposals
        matched = match_boxes(boxes, truth, iou)
        sampler = BalancedPositiveNegativeSampler(self.regions, self.positive_fraction)
        (positive,), (negative,) = sampler([matched + 1])
        chosen = torch.cat([positive.nonzero()[:, 0], negative.nonzero()[:, 0]])
        return Sample(boxes[chosen], matched[chosen], chosen >= len(proposals))


class RegionFeatures(NamedTuple):
    """Maps of a batch from which regions are pooled."""

    levels: list[Tensor]  # each (B, C, h, w) float32
    strides: list[int]
    semantic: Tensor | None = None  # (B, C, h, w): added to what is pooled from the levels
    semantic_stride: int = 8

    def image(self, index: int) -> RegionFeatures:
        """Returns the maps of one image."""
        one = slice(index, index + 1)
        semantic = None if self.semantic is None else self.semantic[one]
        return self._replace(levels=[level[one] for level in self.levels], semantic=semantic)

    def pool(self, boxes: Sequence[Tensor], size: int, sampling_ratio: int) -> Tensor:
        """Pools each box from the level that fits its size, by RoIAlign.

        Args:
            boxes: of each image (R_i, 4).
            size: side of the result.
            sampling_ratio: number of points per side of a cell, 0 for as many as it has pixels.

        Returns:
            (R, C, size, size), image by image.
        """
        rois = _with_index(boxes)
        out = pool_levels(self.levels, self.strides, rois, size, sampling_ratio)
        if self.semantic is not None:
            scale = 1 / self.semantic_stride
            out = out + roi_align(self.semantic, rois, size, scale, sampling_ratio, aligned=True)
        return out


def _with_index(boxes: Sequence[Tensor]) -> Tensor:
    """Joins boxes of each image (R_i, 4) to (R, 5), with the number of the image first."""
    return torch.cat(
        [torch.cat([box.new_full((len(box), 1), i), box], 1) for i, box in enumerate(boxes)]
    )


def pool_levels(
    levels: Sequence[Tensor], strides: Sequence[int], rois: Tensor, size: int, sampling_ratio: int
) -> Tensor:
    """Pools rois (R, 5) from maps (B, C, h, w) by RoIAlign -> (R, C, size, size).

    On the meta device, where boxes have no values, all use the first map, at the same cost.
    """
    if rois.is_meta or len(levels) == 1:
        return roi_align(levels[0], rois, size, 1 / strides[0], sampling_ratio, aligned=True)
    sides = (rois[:, 3:] - rois[:, 1:3]).clamp(min=0).prod(1).sqrt()
    # 1e-8 as in Detectron2: log2 of an empty box, and a side of exactly a power of two.
    octave = torch.floor(torch.log2(sides / CANONICAL_SIDE + 1e-8))
    level = (octave + (CANONICAL_STRIDE.bit_length() - strides[0].bit_length())).long()
    level = level.clamp(0, len(levels) - 1)
    out = levels[0].new_zeros((len(rois), levels[0].shape[1], size, size))
    for number, (features, stride) in enumerate(zip(levels, strides, strict=True)):
        here = (level == number).nonzero()[:, 0]
        pooled = roi_align(features, rois[here], size, 1 / stride, sampling_ratio, aligned=True)
        out = out.index_put((here,), pooled.to(out.dtype))
    return out


def mask_targets(samples: Sequence[Sample], truths: Sequence[GroundTruth], size: int) -> Tensor:
    """Returns the objects' masks inside their regions.

    Args:
        samples: of each image, regions on objects.
        truths: of each image.
        size: side of the result.

    Returns:
        (R, size, size) float32, 0 or 1.
    """
    targets = []
    for sample, truth in zip(samples, truths, strict=True):
        rois = torch.cat([sample.matched[:, None].to(sample.boxes.dtype), sample.boxes], 1)
        inside = roi_align(truth.masks[:, None], rois, size, 1.0, 0, aligned=True)
        targets.append((inside[:, 0] >= 0.5).float())
    return torch.cat(targets)

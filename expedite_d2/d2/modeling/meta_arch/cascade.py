"""Cascade of box and mask heads on regions, one stage or several.

"Cascade R-CNN", arXiv 1712.00726; interleaved box and mask branches and mask information flow of
"Hybrid Task Cascade for Instance Segmentation", arXiv 1901.07518. One stage is Mask R-CNN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import (
    Conv2dNormActivation,
    clip_boxes_to_image,
    generalized_box_iou_loss,
    remove_small_boxes,
)

from expedite_d2.d2.modeling.backbone.fpn import GROUPS, normalisation
from expedite_d2.d2.modeling.meta_arch.regions import (
    GroundTruth,
    RegionFeatures,
    Sample,
    Sampling,
    mask_targets,
)
from expedite_d2.d2.provider import CfgNode

# Narrower boxes cannot be encoded: their logarithm goes to minus infinity.
MIN_SIDE = 1e-2


@dataclass(frozen=True)
class Stage:
    """Settings of one stage: overlap of positives, scales of the box deltas, weight of losses."""

    iou: float
    box_weights: tuple[float, float, float, float]
    loss_weight: float


def cascade_stages(cfg: CfgNode) -> list[Stage]:
    """Returns the stages of ``MODEL.ROI_BOX_CASCADE_HEAD`` with ``MODEL.HTC.STAGE_LOSS_WEIGHTS``.

    Raises:
        ValueError: lists of different lengths, or empty ones.
    """
    head, weights = cfg.MODEL.ROI_BOX_CASCADE_HEAD, cfg.MODEL.HTC.STAGE_LOSS_WEIGHTS
    counts = (len(head.IOUS), len(head.BBOX_REG_WEIGHTS), len(weights))
    if len(set(counts)) != 1 or not counts[0]:
        raise ValueError(
            "MODEL.ROI_BOX_CASCADE_HEAD.IOUS, its BBOX_REG_WEIGHTS and "
            f"MODEL.HTC.STAGE_LOSS_WEIGHTS must have one entry per stage, got {counts} entries"
        )
    return [
        Stage(iou, tuple(scales), weight)
        for iou, scales, weight in zip(head.IOUS, head.BBOX_REG_WEIGHTS, weights, strict=True)
    ]


class BoxHead(nn.Module):
    """Class scores and box deltas of regions, by ``MODEL.ROI_BOX_HEAD``.

    Args:
        cfg: the config.
        channels: of the pooled regions.
        classes: number of classes without the background, which comes last.
    """

    def __init__(self, cfg: CfgNode, channels: int, classes: int) -> None:
        super().__init__()
        box = cfg.MODEL.ROI_BOX_HEAD
        norm = _norm(box.NORM, "MODEL.ROI_BOX_HEAD", box.CONV_DIM, box.NUM_CONV)
        size = box.POOLER_RESOLUTION
        self.layers = FastRCNNConvFCHead(
            (channels, size, size), [box.CONV_DIM] * box.NUM_CONV, [box.FC_DIM] * box.NUM_FC, norm
        )
        self.cls_score = nn.Linear(box.FC_DIM, classes + 1)
        self.bbox_pred = nn.Linear(box.FC_DIM, 4)
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_uniform_(layer.weight, a=1)
                nn.init.zeros_(layer.bias)
        # As in Fast R-CNN, all classes begin with equal scores, and boxes with small deltas.
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        nn.init.zeros_(self.cls_score.bias)
        nn.init.zeros_(self.bbox_pred.bias)

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        """(R, C, s, s) -> class logits (R, K + 1), deltas (R, 4), float32."""
        hidden = self.layers(regions)
        return self.cls_score(hidden).float(), self.bbox_pred(hidden).float()


class MaskHead(nn.Module):
    """Masks of regions, by ``MODEL.ROI_MASK_HEAD``.

    Args:
        cfg: the config.
        channels: of the pooled regions.
        classes: number of masks per region; 1 for a mask that does not depend on the class.
        flow: whether the features of the stage before are added (mask information flow).
    """

    def __init__(self, cfg: CfgNode, channels: int, classes: int, flow: bool) -> None:
        super().__init__()
        mask = cfg.MODEL.ROI_MASK_HEAD
        width = mask.CONV_DIM
        norm = _norm(mask.NORM, "MODEL.ROI_MASK_HEAD", width, mask.NUM_CONV)
        if flow:
            self.flow = Conv2dNormActivation(width, channels, 1, norm_layer=None)
        self.convs = MaskRCNNHeads(channels, [width] * mask.NUM_CONV, 1, norm)
        self.predictor = MaskRCNNPredictor(width, width, classes)

    def features(self, regions: Tensor, previous: Tensor | None) -> Tensor:
        """Regions (R, C, s, s), and the features of the stage before, -> (R, D, s, s)."""
        if previous is not None:
            regions = regions + self.flow(previous)
        return self.convs(regions)


def _norm(name: str, key: str, width: int, convolutions: int) -> Callable[[int], nn.Module] | None:
    norm = normalisation(name, f"{key}.NORM")
    if norm is not None and convolutions and width % GROUPS:
        raise ValueError(
            f"{key}.CONV_DIM must be a multiple of {GROUPS} (the groups of GroupNorm), got {width}"
        )
    return norm


class CascadeHeads(nn.Module):
    """Refines proposals stage by stage; each stage's masks are learnt on its refined boxes.

    Args:
        cfg: ``MODEL.ROI_HEADS``, ``ROI_BOX_HEAD``, ``ROI_MASK_HEAD``.
        channels: of the maps that regions are pooled from.
        stages: settings of each stage.

    Raises:
        ValueError: a key that asks for something unsupported.
    """

    def __init__(self, cfg: CfgNode, channels: int, stages: Sequence[Stage]) -> None:
        super().__init__()
        heads, box, mask = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD
        if not box.CLS_AGNOSTIC_BBOX_REG:
            raise ValueError(
                "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG must be True: a box that goes on to the "
                "next stage and to the masks belongs to no class yet"
            )
        if box.BBOX_REG_LOSS_TYPE not in ("smooth_l1", "giou"):
            raise ValueError(
                "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE must be 'smooth_l1' or 'giou', "
                f"got {box.BBOX_REG_LOSS_TYPE!r}"
            )
        self.stages = list(stages)
        self.num_classes = heads.NUM_CLASSES
        self.sampling = Sampling(
            heads.BATCH_SIZE_PER_IMAGE, heads.POSITIVE_FRACTION, heads.PROPOSAL_APPEND_GT
        )
        self.box_size, self.box_points = box.POOLER_RESOLUTION, box.POOLER_SAMPLING_RATIO
        self.mask_size, self.mask_points = mask.POOLER_RESOLUTION, mask.POOLER_SAMPLING_RATIO
        self.box_loss_type, self.beta = box.BBOX_REG_LOSS_TYPE, box.SMOOTH_L1_BETA
        self.box_loss_weight = box.BBOX_REG_LOSS_WEIGHT
        self.coders = [BoxCoder(stage.box_weights) for stage in stages]
        self.box_heads = nn.ModuleList(BoxHead(cfg, channels, self.num_classes) for _ in stages)
        masks = 1 if mask.CLS_AGNOSTIC_MASK else self.num_classes
        self.mask_heads = nn.ModuleList(
            MaskHead(cfg, channels, masks, flow=number > 0) for number in range(len(stages))
        )

    def losses(
        self,
        features: RegionFeatures,
        proposals: Sequence[Tensor],
        truths: Sequence[GroundTruth],
        image_sizes: Sequence[tuple[int, int]],
    ) -> dict[str, Tensor]:
        """Returns the losses of every stage.

        Args:
            features: maps of the batch.
            proposals: of each image (R_i, 4).
            truths: of each image.
            image_sizes: (h, w) of each image, to which boxes are clipped.

        Returns:
            ``loss_cls``, ``loss_box_reg`` and ``loss_mask``, with the suffix ``_stage0`` … where
            there are several stages: differentiable scalars.
        """
        losses = {}
        boxes = list(proposals)
        for number, stage in enumerate(self.stages):
            samples = [
                self.sampling.draw(box, truth, stage.iou)
                for box, truth in zip(boxes, truths, strict=True)
            ]
            rois = [sample.boxes for sample in samples]
            logits, deltas = self._box_head(number, features, rois)
            cls_loss, box_loss = self._box_losses(number, logits, deltas, samples, truths)
            refined = self._refine(number, deltas.detach(), rois, image_sizes)
            # The objects' own boxes would give the next stage the answer.
            boxes = [
                box[~sample.is_truth & _wide(box)]
                for box, sample in zip(refined, samples, strict=True)
            ]
            positives = [
                self.sampling.draw(box, truth, stage.iou).positive()
                for box, truth in zip(boxes, truths, strict=True)
            ]
            mask_loss = self._mask_loss(number, features, positives, truths)
            suffix = f"_stage{number}" if len(self.stages) > 1 else ""
            losses[f"loss_cls{suffix}"] = stage.loss_weight * cls_loss
            losses[f"loss_box_reg{suffix}"] = stage.loss_weight * box_loss
            losses[f"loss_mask{suffix}"] = stage.loss_weight * mask_loss
        return losses

    def boxes(
        self,
        features: RegionFeatures,
        proposals: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Returns refined boxes of the last stage and the mean class scores of all.

        Args:
            features: maps of the batch.
            proposals: of each image (R_i, 4).
            image_sizes: (h, w) of each image, to which boxes are clipped.

        Returns:
            boxes (R_i, 4) and scores (R_i, K) of each image, float32.
        """
        boxes = list(proposals)
        scores: list[Tensor] = []
        for number in range(len(self.stages)):
            logits, deltas = self._box_head(number, features, boxes)
            scores.append(logits.softmax(-1)[:, :-1])
            boxes = self._refine(number, deltas, boxes, image_sizes)
        mean = torch.stack(scores).mean(0)
        return boxes, list(mean.split([len(box) for box in boxes]))

    def masks(self, features: RegionFeatures, boxes: Sequence[Tensor], classes: Tensor) -> Tensor:
        """Returns the mean mask probabilities of all stages.

        Args:
            features: maps of the batch.
            boxes: of each image (R_i, 4).
            classes: (R,) int64 of all boxes.

        Returns:
            (R, 2s, 2s) float32.
        """
        logits = self.mask_logits(features, boxes)
        return torch.stack([_of_class(stage, classes).sigmoid() for stage in logits]).mean(0)

    def mask_logits(self, features: RegionFeatures, boxes: Sequence[Tensor]) -> list[Tensor]:
        """Mask logits (R, K or 1, 2s, 2s) of each stage, float32."""
        hidden = self._mask_features(features, boxes, len(self.stages))
        return [
            head.predictor(one).float()
            for head, one in zip(self._mask_heads(), hidden, strict=True)
        ]

    def _mask_heads(self) -> list[MaskHead]:
        return cast(list[MaskHead], list(self.mask_heads))

    def _mask_features(
        self, features: RegionFeatures, boxes: Sequence[Tensor], stages: int
    ) -> list[Tensor]:
        """Mask features (R, D, s, s) of the first stages, each with those of the one before."""
        regions = features.pool(boxes, self.mask_size, self.mask_points)
        hidden: list[Tensor] = []
        for head in self._mask_heads()[:stages]:
            hidden.append(head.features(regions, hidden[-1] if hidden else None))
        return hidden

    def _box_head(
        self, number: int, features: RegionFeatures, boxes: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        regions = features.pool(boxes, self.box_size, self.box_points)
        return self.box_heads[number](regions)

    def _refine(
        self,
        number: int,
        deltas: Tensor,
        boxes: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[Tensor]:
        moved = self.coders[number].decode_single(deltas, torch.cat(list(boxes)))
        split = moved.split([len(box) for box in boxes])
        return [
            clip_boxes_to_image(box, size) for box, size in zip(split, image_sizes, strict=True)
        ]

    def _box_losses(
        self,
        number: int,
        logits: Tensor,
        deltas: Tensor,
        samples: Sequence[Sample],
        truths: Sequence[GroundTruth],
    ) -> tuple[Tensor, Tensor]:
        """Returns cross-entropy of all regions, and box loss of those on objects, per region."""
        pairs = list(zip(samples, truths, strict=True))
        labels = torch.cat([sample.classes(truth, self.num_classes) for sample, truth in pairs])
        count = max(len(labels), 1)
        cls_loss = F.cross_entropy(logits, labels, reduction="sum") / count
        positive = labels < self.num_classes
        boxes = torch.cat([sample.boxes for sample in samples])[positive]
        wanted = torch.cat([truth.boxes[sample.positive().matched] for sample, truth in pairs])
        coder = self.coders[number]
        if self.box_loss_type == "giou":
            decoded = coder.decode_single(deltas[positive], boxes)
            box_loss = generalized_box_iou_loss(decoded, wanted, reduction="sum")
        else:
            targets = coder.encode_single(wanted, boxes)
            box_loss = F.smooth_l1_loss(deltas[positive], targets, beta=self.beta, reduction="sum")
        return cls_loss, self.box_loss_weight * box_loss / count

    def _mask_loss(
        self,
        number: int,
        features: RegionFeatures,
        positives: Sequence[Sample],
        truths: Sequence[GroundTruth],
    ) -> Tensor:
        """Returns the mean binary cross-entropy of a stage's masks, computed by heads up to it."""
        boxes = [sample.boxes for sample in positives]
        hidden = self._mask_features(features, boxes, number + 1)[-1]
        logits = self._mask_heads()[number].predictor(hidden).float()
        classes = torch.cat(
            [s.classes(t, self.num_classes) for s, t in zip(positives, truths, strict=True)]
        )
        chosen = _of_class(logits, classes)
        targets = mask_targets(positives, truths, chosen.shape[-1])
        total = F.binary_cross_entropy_with_logits(chosen, targets, reduction="sum")
        return total / max(targets.numel(), 1)


def _wide(boxes: Tensor) -> Tensor:
    """(R,) bool: boxes that have an extent in both directions."""
    keep = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    keep[remove_small_boxes(boxes, MIN_SIDE)] = True
    return keep


def _of_class(logits: Tensor, classes: Tensor) -> Tensor:
    """Selects from (R, K or 1, s, s) the mask of each region's class, (R, s, s)."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    return logits[torch.arange(len(classes), device=classes.device), classes]

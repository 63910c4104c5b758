"""Detections from boxes, class scores and masks of regions, in one or several views of an image.

A view is an input of the network: the image resized, and possibly mirrored. Boxes of all views are
transformed to the frame of the result, where overlapping ones are suppressed; masks are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image
from torchvision.transforms.v2 import functional as tv

from expedite_d2.d2.modeling.meta_arch.regions import RegionFeatures
from expedite_d2.d2.modeling.meta_arch.soft_nms import soft_nms
from expedite_d2.d2.provider import Boxes, CfgNode, Instances

# Number of masks that are pasted at a time: 16 of 800x1333 take 70 MB.
PASTE_CHUNK = 16


@dataclass(frozen=True)
class Suppression:
    """Selection of detections among many overlapping boxes."""

    score_threshold: float
    iou_threshold: float
    max_detections: int
    soft: Literal["", "linear", "gaussian"] = ""  # "": boxes that overlap are dropped
    sigma: float = 0.5
    min_score: float = 0.001

    @classmethod
    def from_config(cls, cfg: CfgNode, soft: bool) -> Suppression:
        """Reads ``MODEL.ROI_HEADS`` and, with ``soft``, ``MODEL.HTC``."""
        heads = cfg.MODEL.ROI_HEADS
        hard = cls(heads.SCORE_THRESH_TEST, heads.NMS_THRESH_TEST, cfg.TEST.DETECTIONS_PER_IMAGE)
        if not soft:
            return hard
        htc = cfg.MODEL.HTC
        return cls(
            hard.score_threshold,
            hard.iou_threshold,
            hard.max_detections,
            htc.SOFT_NMS,
            htc.SOFT_NMS_SIGMA,
            htc.SOFT_NMS_MIN_SCORE,
        )

    def select(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Selects detections among regions.

        Args:
            boxes: (R, 4).
            scores: (R, K); each pair of a region and a class is a candidate.

        Returns:
            boxes (N, 4), scores (N,), classes (N,) int64, by falling score.
        """
        finite = torch.isfinite(boxes).all(1) & torch.isfinite(scores).all(1)
        scores = torch.where(finite[:, None], scores, 0.0)
        regions, classes = (scores > self.score_threshold).nonzero(as_tuple=True)
        boxes, scores = boxes[regions], scores[regions, classes]
        if self.soft:
            keep, scores = soft_nms(
                boxes,
                scores,
                classes,
                method=self.soft,
                iou_threshold=self.iou_threshold,
                sigma=self.sigma,
                min_score=self.min_score,
                max_detections=self.max_detections,
            )
        else:
            keep = batched_nms(boxes, scores, classes, self.iou_threshold)[: self.max_detections]
            scores = scores[keep]
        return boxes[keep], scores, classes[keep]


class View(NamedTuple):
    """One view of an image, with its boxes and scores."""

    features: RegionFeatures  # of this image alone
    boxes: Tensor  # (R, 4) in the view
    scores: Tensor  # (R, K)
    size: tuple[int, int]  # (h, w) without padding
    flipped: bool = False

    def to_frame(self, boxes: Tensor, height: int, width: int) -> Tensor:
        """Transforms boxes of the view to the frame of a result of (height, width)."""
        return _mirrored(boxes, self.size[1], self.flipped) * self._scale(boxes, height, width)

    def from_frame(self, boxes: Tensor, height: int, width: int) -> Tensor:
        """Transforms boxes of the result to the view."""
        return _mirrored(boxes / self._scale(boxes, height, width), self.size[1], self.flipped)

    def _scale(self, boxes: Tensor, height: int, width: int) -> Tensor:
        return boxes.new_tensor([width / self.size[1], height / self.size[0]]).repeat(2)


def _mirrored(boxes: Tensor, width: int, flipped: bool) -> Tensor:
    if not flipped:
        return boxes
    left, top, right, bottom = boxes.unbind(1)
    return torch.stack([width - right, top, width - left, bottom], 1)


def detect(
    views: Sequence[View],
    masks: Callable[[RegionFeatures, list[Tensor], Tensor], Tensor],
    suppression: Suppression,
    height: int,
    width: int,
) -> Instances:
    """Returns the detections of one image.

    Args:
        views: of this image.
        masks: probabilities (R, m, m) from features, boxes of each image and classes (R,).
        suppression: which boxes are detections.
        height, width: of the result.

    Returns:
        Instances with ``pred_boxes``, ``scores`` (N,), ``pred_classes`` (N,) int64 from 0 to K - 1
        and ``pred_masks`` (N, height, width) bool, by falling score.
    """
    frame = [view.to_frame(view.boxes, height, width) for view in views]
    boxes = clip_boxes_to_image(torch.cat(frame), (height, width))
    scores = torch.cat([view.scores for view in views])
    wide = (boxes[:, 2:] > boxes[:, :2]).all(1)
    boxes, scores, classes = suppression.select(boxes[wide], scores[wide])
    parts = []
    for view in views:
        inside = masks(view.features, [view.from_frame(boxes, height, width)], classes)
        parts.append(inside.flip(-1) if view.flipped else inside)
    result = Instances((height, width))
    result.pred_boxes = Boxes(boxes)
    result.scores = scores
    result.pred_classes = classes
    result.pred_masks = paste_masks(torch.stack(parts).mean(0), boxes, height, width)
    return result


def paste_masks(probabilities: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Pastes masks of boxes into the image: bilinear at pixel centres, thresholded at one half.

    Resampling is separable, so a mask is two products with matrices of tent functions; beyond the
    outermost cells' centres probabilities fall to 0.

    Args:
        probabilities: (N, m, m).
        boxes: (N, 4).
        height, width: of the image.

    Returns:
        (N, height, width) bool.
    """
    pasted = [probabilities.new_zeros((0, height, width), dtype=torch.bool)]
    for part, box in zip(probabilities.split(PASTE_CHUNK), boxes.split(PASTE_CHUNK), strict=True):
        rows = _tents(box[:, 1], box[:, 3], part.shape[1], height)  # (N, height, m)
        columns = _tents(box[:, 0], box[:, 2], part.shape[2], width)  # (N, width, m)
        pasted.append(rows @ part @ columns.transpose(1, 2) >= 0.5)
    return torch.cat(pasted)


def _tents(start: Tensor, end: Tensor, cells: int, length: int) -> Tensor:
    """Returns the weight of each cell of a box at each pixel: (N,), (N,) -> (N, length, cells)."""
    pixels = torch.arange(length, device=start.device) + 0.5
    extent = (end - start).clamp(min=1e-6)
    place = (pixels - start[:, None]) / extent[:, None] * cells - 0.5  # in cells, (N, length)
    return (1 - (place[..., None] - torch.arange(cells, device=start.device)).abs()).clamp(min=0)


def augmented(
    image: Tensor, shortest: Sequence[int], longest: int, flip: bool
) -> Iterator[tuple[Tensor, bool]]:
    """Yields the views of test-time augmentation.

    Args:
        image: (3, h, w).
        shortest: lengths of the shorter side.
        longest: upper bound of the longer side.
        flip: whether to add a mirrored image of each size.

    Yields:
        image (3, h', w') and whether it is mirrored; at the original size it is not resampled.
    """
    for side in shortest:
        resized = tv.resize(image, [side], max_size=max(longest, side + 1), antialias=True)
        yield resized, False
        if flip:
            yield resized.flip(-1), True

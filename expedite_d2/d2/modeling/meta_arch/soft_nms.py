"""Soft non-maximum suppression: neighbours of a better box lose score, but are not dropped.

"Soft-NMS: Improving Object Detection With One Line of Code", arXiv 1704.04503.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torchvision.ops import box_iou


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    *,
    method: Literal["linear", "gaussian"],
    iou_threshold: float = 0.5,
    sigma: float = 0.5,
    min_score: float = 0.001,
    max_detections: int = 100,
) -> tuple[Tensor, Tensor]:
    """Chooses boxes by falling score, and after each choice lowers the scores of its class.

    The score of a box of the chosen class that overlaps the chosen box by IoU u is multiplied by
    1 - u if u exceeds the threshold ("linear"), or always by exp(-u² / σ) ("gaussian").

    Args:
        boxes: (N, 4) XYXY.
        scores: (N,), not negative.
        classes: (N,) int64; boxes of different classes do not affect each other.
        method: how scores are lowered.
        iou_threshold: overlap that "linear" tolerates.
        sigma: width of "gaussian", above 0.
        min_score: lowered scores below it are dropped.
        max_detections: maximum number of boxes to choose.

    Returns:
        indices: (M,) int64 of the chosen boxes, by falling score; scores: (M,), the lowered ones.

    Raises:
        ValueError: another ``method``.

    Note:
        Scores only fall, so that the best M need M rounds of O(N) each, without an N x N matrix. Of
        equal scores, the first is chosen.
    """
    if method not in ("linear", "gaussian"):
        raise ValueError(f"soft_nms: method must be 'linear' or 'gaussian', got {method!r}")
    rounds = min(max_detections, len(boxes))
    if rounds == 0:
        return classes.new_zeros(0), scores.new_zeros(0)
    left = scores.clone()
    chosen, values = [], []
    for _ in range(rounds):
        best = left.argmax(0, keepdim=True)  # (1,): a Python number would synchronise
        chosen.append(best)
        values.append(left[best])
        overlap = box_iou(boxes[best], boxes)[0]  # (N,)
        if method == "linear":
            share = torch.where(overlap > iou_threshold, 1 - overlap, 1.0)
        else:
            share = torch.exp(-overlap.square() / sigma)
        # Boxes that were chosen before stay at -1, below every score.
        left = torch.where((classes == classes[best]) & (left > 0), left * share, left)
        left[best] = -1.0
    indices, lowered = torch.cat(chosen), torch.cat(values)
    keep = lowered >= min_score
    return indices[keep], lowered[keep]

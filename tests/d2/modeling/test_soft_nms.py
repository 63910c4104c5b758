"""Soft-NMS: values computed by hand, and the loop of the paper."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.ops import box_iou, nms

from expedite_d2.d2.modeling.meta_arch.soft_nms import soft_nms

# The second overlaps the first by 1/2 (50 of 100), the third none.
BOXES = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 5.0], [50.0, 50.0, 60.0, 60.0]])
SCORES = torch.tensor([0.9, 0.8, 0.6])
ONE_CLASS = torch.zeros(3, dtype=torch.int64)


def paper(boxes, scores, method, iou_threshold, sigma):
    """Pick the best, move it to the result, lower the rest; one class."""
    left, order, values = scores.clone().double(), [], []
    remaining = list(range(len(boxes)))
    while remaining:
        best = max(remaining, key=lambda i: left[i].item())
        remaining.remove(best)
        order.append(best)
        values.append(left[best].item())
        for i in remaining:
            overlap = box_iou(boxes[best][None], boxes[i][None]).item()
            if method == "gaussian":
                left[i] *= math.exp(-(overlap**2) / sigma)
            elif overlap > iou_threshold:
                left[i] *= 1 - overlap
    return order, values


def test_soft_nms_linear_by_hand():
    keep, scores = soft_nms(BOXES, SCORES, ONE_CLASS, method="linear", iou_threshold=0.3)
    assert keep.tolist() == [0, 2, 1]
    torch.testing.assert_close(scores, torch.tensor([0.9, 0.6, 0.8 * (1 - 0.5)]))


def test_soft_nms_linear_tolerates_the_threshold_itself():
    keep, scores = soft_nms(BOXES, SCORES, ONE_CLASS, method="linear", iou_threshold=0.5)
    assert keep.tolist() == [0, 1, 2]
    torch.testing.assert_close(scores, SCORES)


def test_soft_nms_gaussian_by_hand():
    keep, scores = soft_nms(BOXES, SCORES, ONE_CLASS, method="gaussian", sigma=0.5)
    assert keep.tolist() == [0, 2, 1]
    torch.testing.assert_close(scores, torch.tensor([0.9, 0.6, 0.8 * math.exp(-0.25 / 0.5)]))


def test_soft_nms_leaves_other_classes_alone():
    classes = torch.tensor([0, 1, 0])
    keep, scores = soft_nms(BOXES, SCORES, classes, method="gaussian")
    assert keep.tolist() == [0, 1, 2]
    torch.testing.assert_close(scores, SCORES)


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_soft_nms_equals_the_loop_of_the_paper(method):
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(60, 2, generator=generator) * 20
    boxes = torch.cat([corner, corner + 4 + torch.rand(60, 2, generator=generator) * 12], 1)
    scores = torch.rand(60, generator=generator)
    order, values = paper(boxes, scores, method, 0.3, 0.5)
    keep, lowered = soft_nms(
        boxes,
        scores,
        torch.zeros(60, dtype=torch.int64),
        method=method,
        iou_threshold=0.3,
        sigma=0.5,
        min_score=0.0,
    )
    assert keep.tolist() == order
    torch.testing.assert_close(lowered.double(), torch.tensor(values).double())
    few, _ = soft_nms(
        boxes, scores, torch.zeros(60, dtype=torch.int64), method=method, iou_threshold=0.3,
        min_score=0.0, max_detections=7,
    )  # fmt: skip
    assert few.tolist() == order[:7]


def test_soft_nms_of_equal_boxes_is_hard_nms():
    boxes = BOXES[[0, 0, 0, 2, 2]]
    scores = torch.tensor([0.5, 0.9, 0.7, 0.2, 0.8])
    keep, _ = soft_nms(boxes, scores, torch.zeros(5, dtype=torch.int64), method="linear")
    assert keep.tolist() == nms(boxes, scores, 0.5).tolist() == [1, 4]


def test_soft_nms_chooses_each_box_once_also_at_score_zero():
    keep, scores = soft_nms(
        BOXES[[0, 0, 0]], SCORES, ONE_CLASS, method="linear", min_score=0.0, max_detections=9
    )
    assert sorted(keep.tolist()) == [0, 1, 2]
    torch.testing.assert_close(scores, torch.tensor([0.9, 0.0, 0.0]))


def test_soft_nms_drops_low_scores():
    keep, _ = soft_nms(BOXES, SCORES, ONE_CLASS, method="gaussian", sigma=0.05, min_score=0.1)
    assert keep.tolist() == [0, 2]


def test_soft_nms_of_nothing():
    keep, scores = soft_nms(BOXES[:0], SCORES[:0], ONE_CLASS[:0], method="linear")
    assert keep.shape == scores.shape == (0,) and keep.dtype == torch.int64


def test_soft_nms_refuses_other_methods():
    with pytest.raises(ValueError, match="'linear' or 'gaussian', got 'hard'"):
        soft_nms(BOXES, SCORES, ONE_CLASS, method="hard")

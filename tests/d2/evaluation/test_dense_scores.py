"""Results as maps of scores: by hand, pixel by pixel."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from expedite_d2.d2 import Boxes, Instances
from expedite_d2.d2.evaluation.dense_scores import STRIDE, dense_scores

SIZE = (9, 14)  # no multiples of the stride
CELLS = (3, 4)


def instances(scores: list[float], classes: list[int], masks: Tensor) -> Instances:
    found = Instances(SIZE)
    found.pred_masks = masks
    found.pred_boxes = Boxes(torch.zeros(len(masks), 4))
    found.scores = torch.tensor(scores)
    found.pred_classes = torch.tensor(classes, dtype=torch.int64)
    return found


def averaged(values: Any) -> Tensor:
    """Means over squares of 4, those at the border over what there is."""
    cells = torch.zeros(CELLS)
    for row in range(CELLS[0]):
        for column in range(CELLS[1]):
            inside = [
                float(values[y][x])
                for y in range(STRIDE * row, min(STRIDE * (row + 1), SIZE[0]))
                for x in range(STRIDE * column, min(STRIDE * (column + 1), SIZE[1]))
            ]
            cells[row, column] = sum(inside) / len(inside)
    return cells


MASKS = torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(0)) > 0.4


def test_of_each_class_the_greatest_score_counts() -> None:
    (maps,) = dense_scores([{"instances": instances([0.9, 0.5, 0.7], [1, 1, 3], MASKS)}], 5)
    first, second, third = (averaged(mask) for mask in MASKS)
    assert maps.shape == (5, *CELLS)
    torch.testing.assert_close(maps[1], torch.maximum(0.9 * first, 0.5 * second))
    torch.testing.assert_close(maps[3], 0.7 * third)
    assert not maps[[0, 2, 4]].any()


def test_order_and_number_of_instances_do_not_matter() -> None:
    (maps,) = dense_scores([{"instances": instances([0.9, 0.5, 0.7], [1, 1, 3], MASKS)}], 5)
    other = MASKS[[2, 1, 0, 0]].float()  # as Mask2Former has them; the last is found twice
    (same,) = dense_scores([{"instances": instances([0.7, 0.5, 0.9, 0.1], [3, 1, 1, 1], other)}], 5)
    assert torch.equal(maps, same)


def test_nothing_found_is_a_map_of_zeros() -> None:
    (maps,) = dense_scores([{"instances": instances([], [], MASKS[:0])}], 5)
    assert maps.shape == (5, *CELLS) and not maps.any()


def test_logits_are_compared_as_probabilities() -> None:
    logits = torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(0))
    (maps,) = dense_scores([{"sem_seg": logits}], 5)
    first = [
        [1 / (1 + math.exp(float(logits[1, y, x] - logits[0, y, x]))) for x in range(SIZE[1])]
        for y in range(SIZE[0])
    ]
    torch.testing.assert_close(maps[0], averaged(first))
    (same,) = dense_scores([{"sem_seg": logits.softmax(0)}], 5)
    torch.testing.assert_close(maps, same)


def test_every_kind_of_result_of_every_image_counts() -> None:
    depth = torch.rand(SIZE)
    results = [
        {"sem_seg": torch.rand(2, *SIZE), "panoptic_seg": (torch.zeros(SIZE), [])},
        {"depth": depth, "instances": instances([1.0], [0], MASKS[:1])},
    ]
    semantic, objects, metres = dense_scores(results, 1)
    assert semantic.shape == (2, *CELLS)
    torch.testing.assert_close(objects[0], averaged(MASKS[0]))
    torch.testing.assert_close(metres[0], averaged(depth))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"panoptic_seg": ()}, "must have sem_seg, instances or depth to be compared, got panop"),
        ({}, "to be compared, got nothing"),
        ({"instances": instances([1.0], [5], MASKS[:1])}, "must be less than 5, .* got 5"),
    ],
)
def test_what_cannot_be_compared_is_refused(result: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dense_scores([result], 5)

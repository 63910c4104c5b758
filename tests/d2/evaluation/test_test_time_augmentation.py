"""SemanticSegmentorWithTTA: sizes, mirror images and the mean of the scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expedite_d2.d2 import CfgNode, get_cfg
from expedite_d2.d2.evaluation.test_time_augmentation import SemanticSegmentorWithTTA


class Columns(nn.Module):
    """Scores: class 0 the width of the input, class 1 its left pixel, over the whole result."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, int]] = []

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        (inputs,) = batched_inputs
        image = inputs["image"]
        self.sizes.append(tuple(image.shape[-2:]))
        scores = torch.zeros(2, inputs["height"], inputs["width"])
        scores[0] = image.shape[-1]
        scores[1, :, 0] = image[0, 0, 0].float()
        return [{"sem_seg": scores}]


@pytest.fixture
def cfg() -> CfgNode:
    cfg = get_cfg()
    cfg.TEST.AUG.MIN_SIZES = (8, 16)
    cfg.TEST.AUG.MAX_SIZE = 20
    return cfg


def picture() -> Tensor:
    image = torch.zeros(3, 8, 12, dtype=torch.uint8)
    image[..., 0], image[..., -1] = 100, 40
    return image


def test_scores_are_the_mean_over_sizes_and_mirror_images(cfg: CfgNode) -> None:
    model = Columns()
    result = SemanticSegmentorWithTTA(cfg, model)([{"image": picture(), "height": 5, "width": 6}])
    # 16 would make the longer side 24: it is held at 20, and the shorter one at 13.
    assert model.sizes == [(8, 12), (8, 12), (13, 20), (13, 20)]
    scores = result[0]["sem_seg"]
    assert scores.shape == (2, 5, 6)
    assert torch.equal(scores[0], torch.full((5, 6), 16.0))
    # What the mirror image shows at its left belongs to the right.
    assert torch.equal(scores[1, :, 0], torch.full((5,), 50.0))
    assert torch.equal(scores[1, :, -1], torch.full((5,), 20.0))
    assert not scores[1, :, 1:-1].any()


def test_without_mirror_images_and_without_a_given_size(cfg: CfgNode) -> None:
    cfg.TEST.AUG.FLIP = False
    cfg.TEST.AUG.MIN_SIZES = (8,)
    model = Columns()
    image = picture()
    (result,) = SemanticSegmentorWithTTA(cfg, model)([{"image": image}])
    assert model.sizes == [(8, 12)]
    plain = model([{"image": image, "height": 8, "width": 12}])[0]
    assert torch.equal(result["sem_seg"], plain["sem_seg"])


def test_no_sizes_are_refused(cfg: CfgNode) -> None:
    cfg.TEST.AUG.MIN_SIZES = ()
    with pytest.raises(ValueError, match="TEST.AUG needs at least one size"):
        SemanticSegmentorWithTTA(cfg, Columns())


def test_a_model_without_semantic_scores_is_refused(cfg: CfgNode) -> None:
    class Panoptic(nn.Module):
        def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return [{"panoptic_seg": None}]

    with pytest.raises(ValueError, match="expected a model that gives 'sem_seg'"):
        SemanticSegmentorWithTTA(cfg, Panoptic())([{"image": picture()}])

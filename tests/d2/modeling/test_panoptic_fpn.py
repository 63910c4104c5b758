"""ExpeditedPanopticFPN: losses, results and the rule that combines them, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detector_cases import BACKGROUND, THINGS, build, config, image, register, train

from expedite_d2.d2 import Instances
from expedite_d2.d2.comparison.cost import count_gflops
from expedite_d2.d2.config import load_config
from expedite_d2.d2.modeling.meta_arch.panoptic_fpn import combine_semantic_and_instance_outputs

CONFIGS = Path(__file__).parents[3] / "configs"
FPN = "ExpeditedPanopticFPN"
LOSSES = {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask", "loss_sem_seg"}


@pytest.fixture(autouse=True)
def metadata():
    register()


@pytest.fixture(scope="module")
def learnt():
    register()
    model = build(FPN)
    return model, train(model, [image()], 12)


def run(model, *inputs):
    with torch.no_grad():
        return model.eval()(list(inputs))


def test_training_reaches_every_parameter():
    model = build(FPN).train()
    losses = model([image(seed=1), image(50, 70, seed=2)])
    assert set(losses) == LOSSES
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_training_learns_one_image(learnt):
    assert learnt[1][-1] < 0.6 * learnt[1][0]


def test_training_without_things_keeps_gradients():
    model = build(FPN).train()
    losses = model([image(things=0)])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["loss_box_reg"] == losses["loss_mask"] == 0
    assert all(p.grad is not None for p in model.parameters())


def test_results_have_detectron2s_form(learnt):
    first, second = run(learnt[0], image() | {"height": 100, "width": 90}, image(50, 70))
    for output, (height, width) in ((first, (100, 90)), (second, (50, 70))):
        assert output["sem_seg"].shape == (5, height, width)
        assert output["instances"].pred_masks.shape[1:] == (height, width)
        ids, segments = output["panoptic_seg"]
        assert ids.shape == (height, width) and ids.dtype == torch.int32
        assert set(ids.unique().tolist()) - {0} == {segment["id"] for segment in segments}
        for segment in segments:
            assert segment["isthing"] == (segment["category_id"] in THINGS)
    assert (first["sem_seg"].argmax(0) == BACKGROUND).float().mean() > 0.5


def test_cost_includes_the_semantic_head():
    plain = count_gflops(config(FPN), 64, 64)
    narrow = count_gflops(config(FPN, "MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p2"]), 64, 64)
    assert narrow["backbone"] == plain["backbone"]
    assert narrow["model"] < plain["model"]


@pytest.mark.parametrize("name", ["scenes/panoptic/panoptic_fpn_swin_mini"])
def test_configs_differ_only_in_the_settings(name):
    plain = load_config(CONFIGS / f"{name}.yaml")
    expedited = load_config(CONFIGS / f"{name}_expedited.yaml")
    assert not plain.MODEL.EXPEDITE.ENABLED and expedited.MODEL.EXPEDITE.ENABLED
    plain.MODEL.EXPEDITE = expedited.MODEL.EXPEDITE
    assert plain == expedited


def test_settings_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="MODEL.SEM_SEG_HEAD.COMMON_STRIDE"):
        build(FPN, "MODEL.SEM_SEG_HEAD.COMMON_STRIDE", 8)
    with pytest.raises(ValueError, match="MODEL.ROI_HEADS.IOU_THRESHOLDS"):
        build(FPN, "MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.3, 0.5])


# --- combination ------------------------------------------------------------------------------

# Things 0 and 2; stuff 1 on the left half, 3 on the right, a column that the semantic head calls 2.
SEMANTIC = torch.tensor([[1, 1, 1, 3, 3, 2]]).repeat(4, 1)


def instances(*found):
    """(score, class, rows, columns) of each."""
    result = Instances((4, 6))
    masks = torch.zeros(len(found), 4, 6, dtype=torch.bool)
    for mask, (_, _, rows, columns) in zip(masks, found, strict=True):
        mask[rows, columns] = True
    result.scores = torch.tensor([score for score, *_ in found])
    result.pred_classes = torch.tensor([label for _, label, *_ in found], dtype=torch.int64)
    result.pred_masks = masks
    return result


def combine(found, semantic=SEMANTIC, overlap=0.5, area=4, score=0.5):
    return combine_semantic_and_instance_outputs(found, semantic, {0, 2}, overlap, area, score)


def test_combination_by_hand():
    ids, segments = combine(
        instances(
            (0.6, 2, slice(0, 2), slice(0, 3)),  # 6 pixels, 2 of them under the next: keeps 4
            (0.9, 0, slice(0, 2), slice(2, 3)),
            (0.8, 0, slice(0, 3), slice(2, 3)),  # 3 pixels, 2 of them taken: dropped
            (0.4, 0, slice(2, 4), slice(0, 1)),  # not sure enough
        )
    )
    expected = [[2, 2, 1, 4, 4, 0], [2, 2, 1, 4, 4, 0], [3, 3, 3, 4, 4, 0], [3, 3, 3, 4, 4, 0]]
    assert ids.tolist() == expected
    assert [(s["id"], s["isthing"], s["category_id"]) for s in segments] == [
        (1, True, 0), (2, True, 2), (3, False, 1), (4, False, 3),
    ]  # fmt: skip
    assert [segment.get("area") for segment in segments] == [None, None, 6, 8]
    assert [segment.get("instance_id") for segment in segments] == [1, 0, None, None]


def test_combination_drops_small_stuff():
    _, segments = combine(instances(), area=9)
    assert [segment["category_id"] for segment in segments] == [1]


def test_combination_of_nothing():
    ids, segments = combine(instances(), semantic=torch.full((4, 6), 2))
    assert segments == [] and not ids.any()


def test_combination_leaves_no_segment_without_pixels():
    found = instances((0.9, 0, slice(0, 4), slice(0, 6)), (0.8, 2, slice(0, 1), slice(0, 1)))
    ids, segments = combine(found, overlap=1.0, area=0)
    assert [segment["id"] for segment in segments] == [1] and (ids == 1).all()


@pytest.mark.detectron2
def test_combination_equals_detectron2s():
    pytest.importorskip("detectron2", reason="needs the real Detectron2")
    from detectron2.modeling.meta_arch.panoptic_fpn import (
        combine_semantic_and_instance_outputs as theirs,
    )

    generator = torch.Generator().manual_seed(0)
    semantic = torch.randint(0, 4, (5, 5), generator=generator).repeat_interleave(8, 0)
    semantic = semantic.repeat_interleave(8, 1)
    found = Instances((40, 40))
    corner = torch.randint(0, 30, (12, 2), generator=generator)
    found.pred_masks = torch.zeros(12, 40, 40, dtype=torch.bool)
    for mask, (y, x) in zip(found.pred_masks, corner.tolist(), strict=True):
        mask[y : y + 12, x : x + 10] = True
    found.scores = torch.rand(12, generator=generator)
    found.pred_classes = torch.randint(0, 3, (12,), generator=generator)
    # Theirs takes label 0 for all things.
    ids, segments = combine_semantic_and_instance_outputs(found, semantic, {0}, 0.5, 60, 0.3)
    expected_ids, expected = theirs(found, semantic, 0.5, 60, 0.3)
    assert torch.equal(ids, expected_ids) and segments == expected

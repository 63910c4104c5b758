"""ExpeditedHTC: losses, results, suppression and test-time augmentation, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detector_cases import THINGS, build, config, image, register, train

from expedite_d2.d2.comparison.cost import count_gflops
from expedite_d2.d2.config import load_config

CONFIGS = Path(__file__).parents[3] / "configs"
HTC = "ExpeditedHTC"


@pytest.fixture(autouse=True)
def metadata():
    register()


@pytest.fixture(scope="module")
def learnt():
    """A model that has seen one image often enough to find something in it."""
    register()
    model = build(HTC, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.001)
    totals = train(model, [image()], 12)
    return model.eval(), totals


def results(model, *inputs):
    with torch.no_grad():
        return [output["instances"] for output in model.eval()(list(inputs))]


# --- training ---------------------------------------------------------------------------------


def test_training_reaches_every_parameter():
    model = build(HTC).train()
    losses = model([image(seed=1), image(50, 70, seed=2)])
    stages = {f"loss_{k}_stage{i}" for k in ("cls", "box_reg", "mask") for i in range(3)}
    assert set(losses) == stages | {"loss_rpn_cls", "loss_rpn_loc", "loss_sem_seg"}
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_training_learns_one_image(learnt):
    assert learnt[1][-1] < 0.6 * learnt[1][0]


@pytest.mark.parametrize("kind", ["smooth_l1", "giou"])
def test_training_without_things_keeps_gradients(kind):
    """A crop may show nothing: DistributedDataParallel still needs every gradient."""
    model = build(HTC, "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", kind).train()
    losses = model([image(things=0), image(40, 64, things=0)])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(losses[f"loss_{k}_stage{i}"] == 0 for k in ("box_reg", "mask") for i in range(3))
    assert all(p.grad is not None for p in model.parameters())


def test_training_without_semantic_branch_needs_no_labels():
    model = build(HTC, "MODEL.HTC.SEMANTIC_ON", False).train()
    inputs = image()
    del inputs["sem_seg"]
    losses = model([inputs])
    assert "loss_sem_seg" not in losses and all(loss.isfinite() for loss in losses.values())


def test_training_without_semantic_labels_is_refused():
    inputs = image()
    del inputs["sem_seg"]
    with pytest.raises(ValueError, match="'sem_seg'"):
        build(HTC).train()([inputs])


def test_stage_weights_scale_the_losses():
    def losses(*opts):
        model = build(HTC, *opts).train()
        torch.manual_seed(3)
        return model([image()])

    plain = losses("MODEL.HTC.STAGE_LOSS_WEIGHTS", [1.0, 1.0, 1.0])
    weighted = losses("MODEL.HTC.STAGE_LOSS_WEIGHTS", [1.0, 0.5, 0.25])
    for stage, weight in enumerate((1.0, 0.5, 0.25)):
        for kind in ("cls", "box_reg", "mask"):
            name = f"loss_{kind}_stage{stage}"
            torch.testing.assert_close(weighted[name], weight * plain[name])


# --- evaluation -------------------------------------------------------------------------------


def test_results_have_detectron2s_form(learnt):
    first, second = results(
        learnt[0], image() | {"height": 100, "width": 90}, image(50, 70, seed=5)
    )
    assert first.image_size == (100, 90) and second.image_size == (50, 70)
    for found in (first, second):
        count = len(found)
        height, width = found.image_size
        assert 0 < count <= 6
        assert found.pred_masks.shape == (count, height, width)
        assert found.pred_masks.dtype == torch.bool
        boxes = found.pred_boxes.tensor
        assert boxes.shape == (count, 4) and (boxes >= 0).all()
        assert (boxes[:, 2::4] <= width).all() and (boxes[:, 3::4] <= height).all()
        assert set(found.pred_classes.tolist()) <= set(THINGS)
        assert (found.scores.diff() <= 0).all()


def test_masks_lie_inside_their_boxes(learnt):
    (found,) = results(learnt[0], image())
    for mask, box in zip(found.pred_masks, found.pred_boxes, strict=True):
        rows, columns = mask.nonzero(as_tuple=True)
        x0, y0, x1, y1 = box.tolist()
        assert not len(rows) or (rows.min() >= y0 - 1 and rows.max() <= y1 + 1)
        assert not len(rows) or (columns.min() >= x0 - 1 and columns.max() <= x1 + 1)


def test_no_detection_gives_empty_fields():
    model = build(HTC, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.999)
    (found,) = results(model, image(50, 70))
    assert len(found) == 0
    assert found.pred_masks.shape == (0, 50, 70) and found.pred_boxes.tensor.shape == (0, 4)


def test_suppression_may_be_hard(learnt):
    model = build(HTC, "MODEL.HTC.SOFT_NMS", "", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.001)
    model.load_state_dict(learnt[0].state_dict())
    soft, hard = results(learnt[0], image())[0], results(model, image())[0]
    assert soft.scores[0] == hard.scores[0]
    torch.testing.assert_close(soft.pred_boxes.tensor[0], hard.pred_boxes.tensor[0])


def test_one_scale_without_flip_equals_the_plain_result(learnt):
    model = build(
        HTC,
        *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.001),
        *("TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (50,), "TEST.AUG.FLIP", False),
    )
    model.load_state_dict(learnt[0].state_dict())
    inputs = image(50, 70, seed=5) | {"height": 80, "width": 120}
    plain, augmented = results(learnt[0], inputs)[0], results(model, inputs)[0]
    assert len(plain) == len(augmented) > 0
    assert torch.equal(plain.pred_boxes.tensor, augmented.pred_boxes.tensor)
    assert torch.equal(plain.scores, augmented.scores)
    assert torch.equal(plain.pred_classes, augmented.pred_classes)
    assert torch.equal(plain.pred_masks, augmented.pred_masks)


def test_augmentation_of_a_mirrored_image_is_the_mirrored_result(learnt):
    """With both views of one size, the pair of views is the same for an image and its mirror."""
    model = build(
        HTC,
        *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.001),
        *("TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (64,), "TEST.AUG.FLIP", True),
    )
    model.load_state_dict(learnt[0].state_dict())
    inputs = image()
    mirrored = inputs | {"image": inputs["image"].flip(-1)}
    found, other = results(model, inputs)[0], results(model, mirrored)[0]
    boxes = other.pred_boxes.tensor
    flipped = torch.stack([64 - boxes[:, 2], boxes[:, 1], 64 - boxes[:, 0], boxes[:, 3]], 1)
    torch.testing.assert_close(found.pred_boxes.tensor, flipped, atol=1e-3, rtol=0)
    torch.testing.assert_close(found.scores, other.scores)
    differ = (found.pred_masks != other.pred_masks.flip(-1)).float().mean()
    assert differ < 1e-3


def test_several_scales_give_a_result_of_the_input_size(learnt):
    model = build(HTC, "TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", (48, 64))
    model.load_state_dict(learnt[0].state_dict())
    (found,) = results(model, image(50, 70))
    assert found.pred_masks.shape[1:] == (50, 70)


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_half_precision_is_close(learnt, dtype):
    model = build(HTC, "TEST.DTYPE", dtype, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.001)
    model.load_state_dict(learnt[0].state_dict())
    full, half = results(learnt[0], image())[0], results(model, image())[0]
    assert half.pred_boxes.tensor.dtype == half.scores.dtype == torch.float32
    torch.testing.assert_close(full.scores[:1], half.scores[:1], atol=0.05, rtol=0.1)


def test_expedited_shares_the_weights(learnt):
    model = build(HTC, "MODEL.EXPEDITE.ENABLED", True)
    model.load_state_dict(learnt[0].state_dict())
    assert len(results(model, image())) == 1


# --- config and cost --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.HTC.SOFT_NMS", "hard"], "MODEL.HTC.SOFT_NMS"),
        (["MODEL.HTC.STAGE_LOSS_WEIGHTS", [1.0]], "MODEL.HTC.STAGE_LOSS_WEIGHTS"),
        (["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", False], "CLS_AGNOSTIC_BBOX_REG"),
        (["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "ciou"], "BBOX_REG_LOSS_TYPE"),
        (["MODEL.ROI_BOX_HEAD.NORM", "BN"], "MODEL.ROI_BOX_HEAD.NORM"),
        (["MODEL.ROI_MASK_HEAD.CONV_DIM", 40], "MODEL.ROI_MASK_HEAD.CONV_DIM"),
        (["MODEL.RPN.IN_FEATURES", ["p2", "p9"]], "MODEL.RPN.IN_FEATURES"),
        (["MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16]]], "MODEL.ANCHOR_GENERATOR.SIZES"),
        (["MODEL.FPN.IN_FEATURES", ["res2", "res4"]], "MODEL.FPN.IN_FEATURES"),
        (["MODEL.FPN.IN_FEATURES", ["p2"]], "MODEL.FPN.IN_FEATURES"),
        (["MODEL.SEM_SEG_HEAD.COMMON_STRIDE", 2], "MODEL.SEM_SEG_HEAD.COMMON_STRIDE"),
    ],
)
def test_settings_that_do_not_fit_are_named(opts, message):
    with pytest.raises(ValueError, match=message):
        build(HTC, *opts)


def test_number_of_classes_must_be_the_data_sets():
    with pytest.raises(ValueError, match="NUM_CLASSES must be the number of thing classes"):
        build(HTC, "MODEL.ROI_HEADS.NUM_CLASSES", 4).train()([image()])


def test_cost_counts_the_backbone_apart_and_needs_no_weights():
    plain = count_gflops(config(HTC), 64, 96)
    expedited = count_gflops(config(HTC, "MODEL.EXPEDITE.ENABLED", True), 64, 96)
    assert 0 < expedited["backbone"] < plain["backbone"] < plain["model"]
    assert plain["model"] - plain["backbone"] == pytest.approx(
        expedited["model"] - expedited["backbone"]
    )


@pytest.mark.parametrize(
    "name",
    ["scenes/instance/htc_swin_mini", "coco/instance/htc_swinv2_large"],
)
def test_configs_differ_only_in_the_settings(name):
    plain = load_config(CONFIGS / f"{name}.yaml")
    expedited = load_config(CONFIGS / f"{name}_expedited.yaml")
    assert not plain.MODEL.EXPEDITE.ENABLED and expedited.MODEL.EXPEDITE.ENABLED
    plain.MODEL.EXPEDITE = expedited.MODEL.EXPEDITE
    assert plain == expedited

"""ExpeditedMask2Former: losses, results and their rules, on a model of a few thousand weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import Mask2FormerForUniversalSegmentation, SwinConfig

import expedite_d2.d2.modeling  # noqa: F401 (registers the architectures)
from expedite_d2.d2 import Instances, MetadataCatalog, build_model, comm
from expedite_d2.d2.config import load_config
from expedite_d2.d2.modeling.meta_arch.mask2former_heads import mask2former_config
from expedite_d2.d2.modeling.meta_arch.mask2former_inference import (
    instance_inference,
    panoptic_inference,
    select_instances,
    select_panoptic,
    semantic_inference,
)
from expedite_d2.d2.modeling.meta_arch.mask2former_loss import MaskClassificationLoss

TINY = Path(__file__).parent / "mask2former_tiny.yaml"
CONFIGS = Path(__file__).parents[3] / "configs"
CLASSES, QUERIES, DECODER_LAYERS = 5, 7, 5


@pytest.fixture(autouse=True)
def metadata():
    catalog = MetadataCatalog.get("mask2former_tiny")
    catalog.thing_dataset_id_to_contiguous_id = {10: 0, 20: 1, 30: 2}


def build(*opts):
    torch.manual_seed(0)
    return build_model(load_config(TINY, opts))


def image(height=50, width=70, seed=0, instances=3):
    generator = torch.Generator().manual_seed(seed)
    target = Instances((height, width))
    rows = torch.arange(height).expand(width, height).T * max(instances, 1) // height
    target.gt_masks = torch.stack([rows == i for i in range(instances)] or [rows < 0])[:instances]
    target.gt_classes = torch.arange(instances) % CLASSES
    return {
        "image": torch.randint(0, 256, (3, height, width), generator=generator).to(torch.uint8),
        "instances": target,
        "sem_seg": rows % CLASSES,
    }


# --- training ---------------------------------------------------------------------------------


def test_loss_equals_transformers():
    """The sum over all terms and layers, for the same logits, targets and sampled points."""
    cfg = load_config(TINY)
    model = build()
    backbone = SwinConfig(out_features=["stage1", "stage2", "stage3", "stage4"], depths=[1] * 4)
    shapes = [model.backbone.output_shape()[name] for name in model.in_features]
    config = mask2former_config(cfg, shapes)
    config.backbone_config = backbone
    theirs = Mask2FormerForUniversalSegmentation(config)
    masks = [torch.randn(2, QUERIES, 16, 24, requires_grad=True) for _ in range(DECODER_LAYERS)]
    classes = [torch.randn(2, QUERIES, CLASSES + 1) for _ in range(DECODER_LAYERS)]
    targets = [(torch.rand(n, 64, 96) > 0.5).float() for n in (3, 4)]
    labels = [torch.tensor([0, 1, 2]), torch.tensor([4, 4, 0, 1])]

    torch.manual_seed(1)
    ours = MaskClassificationLoss(config)(masks, classes, targets, labels)
    torch.manual_seed(1)
    expected = theirs.get_loss_dict(
        masks[-1], classes[-1], targets, labels, theirs.get_auxiliary_logits(classes, masks)
    )
    renamed = {key.replace("cross_entropy", "ce"): value for key, value in expected.items()}
    assert set(ours) == set(renamed)
    for name, value in renamed.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-6)


def test_training_reaches_every_parameter():
    model = build("MODEL.MASK_FORMER.SEM_AUX_WEIGHT", 0.5).train()
    losses = model([image(seed=1), image(64, 40, seed=2)])
    names = {f"loss_{term}" for term in ("ce", "mask", "dice")}
    layers = {f"{name}_{i}" for name in names for i in range(DECODER_LAYERS - 1)}
    assert set(losses) == names | layers | {"loss_sem_aux"}
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == []


def test_training_learns_one_image():
    model = build("MODEL.MASK_FORMER.SEM_AUX_WEIGHT", 1.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    totals = []
    for _ in range(15):
        loss = sum(model([image(64, 64)]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(loss.item())
    assert totals[-1] < 0.7 * totals[0]


def test_training_without_instances_keeps_gradients():
    """A crop may show nothing: DistributedDataParallel still needs every gradient."""
    model = build().train()
    losses = model([image(instances=0)])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is not None for p in model.parameters())


def test_no_deep_supervision_gives_one_prediction():
    losses = build("MODEL.MASK_FORMER.DEEP_SUPERVISION", False).train()([image()])
    assert set(losses) == {"loss_ce", "loss_mask", "loss_dice"}


def test_missing_targets_are_named():
    model = build("MODEL.MASK_FORMER.SEM_AUX_WEIGHT", 1.0).train()
    inputs = image()
    with pytest.raises(ValueError, match="'instances'"):
        model([{"image": inputs["image"]}])
    with pytest.raises(ValueError, match="'sem_seg'"):
        model([{"image": inputs["image"], "instances": inputs["instances"]}])


def test_auxiliary_loss_ignores_padding_and_void():
    model = build("MODEL.MASK_FORMER.SEM_AUX_WEIGHT", 1.0).train()
    inputs = image()
    inputs["sem_seg"] = torch.full_like(inputs["sem_seg"], 255)
    assert model([inputs])["loss_sem_aux"] == 0


def test_number_of_masks_is_the_mean_over_ranks(monkeypatch):
    criterion = build().criterion
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda count: count.add_(5))
    count = criterion.get_num_masks([torch.zeros(1), torch.zeros(0)], torch.device("cpu"))
    assert count == 3  # one here, five on the other rank


# --- evaluation -------------------------------------------------------------------------------


def test_results_have_the_asked_size_and_kind():
    model = build().eval()
    inputs = [image(50, 70) | {"height": 100, "width": 141}, image(33, 96)]
    with torch.no_grad():
        first, second = model(inputs)
    for result, size in [(first, (100, 141)), (second, (33, 96))]:
        assert result["sem_seg"].shape == (CLASSES, *size)
        ids, segments = result["panoptic_seg"]
        assert ids.shape == size and ids.dtype == torch.int32
        assert sorted({s["id"] for s in segments}) == ids.unique()[ids.unique() > 0].tolist()
        instances = result["instances"]
        assert instances.image_size == size
        assert instances.pred_masks.shape == (len(instances), *size)
        assert set(instances.pred_classes.tolist()) <= {0, 1, 2}  # things alone beside panoptic
        assert instances.pred_boxes.tensor.abs().sum() == 0


@pytest.mark.parametrize("expedited", [False, True])
@pytest.mark.parametrize("kind", ["SEMANTIC", "PANOPTIC", "INSTANCE"])
def test_one_kind_equals_the_same_of_all_kinds(kind, expedited):
    """Masks that no result needs are not resized; what is left must not change."""
    opts = ["MODEL.EXPEDITE.ENABLED", expedited, "MODEL.EXPEDITE.ALPHA", 3]
    opts += ["MODEL.EXPEDITE.CLUSTERS", [2, 2]]
    opts += ["MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD", 0.0]
    opts += ["MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD", 0.0]
    opts += ["MODEL.MASK_FORMER.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE", True]
    inputs = [image() | {"height": 61, "width": 80}]
    only = [v for k in ("SEMANTIC", "PANOPTIC", "INSTANCE")
            for v in (f"MODEL.MASK_FORMER.TEST.{k}_ON", k == kind)]  # fmt: skip
    results = []
    for model in (build(*opts).eval(), build(*opts, *only).eval()):
        with torch.no_grad():
            model.class_predictor.bias[CLASSES] -= 2  # or random weights find no object
            results.append(model(inputs)[0])
    everything, single = results
    if kind == "SEMANTIC":
        assert torch.equal(single["sem_seg"], everything["sem_seg"])
    elif kind == "PANOPTIC":
        assert len(everything["panoptic_seg"][1]) > 0
        assert torch.equal(single["panoptic_seg"][0], everything["panoptic_seg"][0])
        assert single["panoptic_seg"][1] == everything["panoptic_seg"][1]
    else:  # alone, instances keep stuff classes too
        keep = single["instances"].pred_classes <= 2
        assert torch.equal(single["instances"].scores[keep], everything["instances"].scores)
        assert torch.equal(single["instances"].pred_masks[keep], everything["instances"].pred_masks)


SEMANTIC = [v for k in ("PANOPTIC", "INSTANCE") for v in (f"MODEL.MASK_FORMER.TEST.{k}_ON", False)]


def test_semantic_alone_sums_classes_before_resizing():
    model = build(*SEMANTIC).eval()
    inputs = image(50, 70) | {"height": 100, "width": 140}
    with torch.no_grad():
        result = model([inputs])[0]
        padded = model.preprocess([inputs["image"]]).tensor
        classes, masks = model.logits(padded)
    assert padded.shape[-2:] == (64, 96)
    resize = torch.nn.functional.interpolate
    up = resize(masks, size=(64, 96), mode="bilinear", align_corners=False)
    scores = semantic_inference(classes[0], up[0])[:, :50, :70]
    expected = resize(scores[None], size=(100, 140), mode="bilinear", align_corners=False)[0]
    assert set(result) == {"sem_seg"}
    torch.testing.assert_close(result["sem_seg"], expected)


def sliding(crop, stride):
    key = "TEST.SLIDING_WINDOW."
    return [key + "ENABLED", True, key + "CROP", list(crop), key + "STRIDE", list(stride)]


def test_a_sliding_window_averages_the_scores_of_its_crops():
    model = build(*SEMANTIC, *sliding((50, 40), (50, 30))).eval()
    plain = build(*SEMANTIC).eval()
    inputs = image(50, 70) | {"height": 100, "width": 140}
    with torch.no_grad():
        result = model([inputs])[0]["sem_seg"]
        # Each crop is padded to the backbone's stride by itself, as an image of its size is.
        left, right = (
            plain([{"image": inputs["image"][..., part]}])[0]["sem_seg"]
            for part in (slice(40), slice(30, 70))
        )
    scores = torch.cat(
        [left[..., :30], (left[..., 30:] + right[..., :10]) / 2, right[..., 10:]], dim=-1
    )
    resize = torch.nn.functional.interpolate
    expected = resize(scores[None], size=(100, 140), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(result, expected)


def test_a_sliding_window_larger_than_the_image_changes_nothing():
    inputs = [image(50, 70, seed=1)]
    with torch.no_grad():
        results = [
            build(*SEMANTIC, *opts).eval()(inputs)[0]["sem_seg"]
            for opts in ((), sliding((80, 80), (60, 60)))
        ]
    assert torch.equal(*results)


def test_a_sliding_window_is_for_semantic_segmentation_alone():
    with pytest.raises(ValueError, match="TEST.SLIDING_WINDOW is for semantic"):
        build(*sliding((32, 32), (32, 32)))


def test_a_batch_equals_its_images_of_one_size():
    model = build().eval()
    inputs = [image(64, 64, seed=s) for s in range(3)]
    with torch.no_grad():
        together = model(inputs)
        alone = [model([i])[0] for i in inputs]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a["sem_seg"], b["sem_seg"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 0.15), ("float16", 0.02)])
def test_autocast_at_evaluation_stays_close(dtype, tolerance):
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        classes, masks = build().eval().logits(images)
        half_classes, half_masks = build("TEST.DTYPE", dtype).eval().logits(images)
    assert half_classes.dtype == half_masks.dtype == torch.float32
    for half, full in [(half_classes, classes), (half_masks, masks)]:
        assert (half - full).norm() / full.norm() < tolerance
        assert not torch.equal(half, full)


def test_autocast_leaves_training_alone():
    losses = build().train(), build("TEST.DTYPE", "bfloat16").train()
    values = []
    for model in losses:
        torch.manual_seed(3)
        values.append(sum(model([image()]).values()))
    assert torch.equal(*values)


def test_training_under_autocast_decodes_pixels_in_float32():
    model = build().train()
    kept = []
    model.pixel_decoder.register_forward_hook(lambda _, args, out: kept.append(out.mask_features))
    with torch.autocast("cpu", torch.bfloat16):
        model([image()])
    assert [features.dtype for features in kept] == [torch.float32]


def test_panoptic_without_metadata_is_an_error():
    opts = ["DATASETS.TRAIN", ("mask2former_nameless",), "DATASETS.TEST", ()]
    with pytest.raises(ValueError, match="mask2former_nameless"):
        build(*opts).eval()([image()])


# --- the rules of the results, on hand-made logits ---------------------------------------------


def logit(probability):
    return math.log(probability / (1 - probability))


def class_logits(*rows):
    """Rows of (class, probability) among 3 classes and "no object"."""
    out = torch.zeros(len(rows), 4)
    for row, (label, probability) in zip(out, rows, strict=True):
        row[:] = math.log((1 - probability) / 3)
        row[label] = math.log(probability)
    return out


def mask_logits(*rows):
    """One pixel row of probabilities per query -> (Q, 1, W)."""
    return torch.tensor([[[logit(p) for p in row]] for row in rows])


def test_panoptic_selects_sure_objects():
    classes = class_logits((0, 0.9), (3, 0.95), (1, 0.7), (2, 0.85))
    assert select_panoptic(classes, 0.8).tolist() == [0, 3]


def test_panoptic_gives_a_pixel_to_the_best_and_drops_eaten_masks():
    classes = class_logits((0, 0.95), (0, 0.85), (1, 0.85))
    masks = mask_logits(
        [0.9, 0.9, 0.9, 0.1, 0.1],  # wins columns 0-2
        [0.6, 0.6, 0.6, 0.6, 0.1],  # keeps 1 of its 4 pixels: dropped
        [0.1, 0.1, 0.1, 0.1, 0.9],
    )
    ids, segments = panoptic_inference(classes, masks, {0, 1}, overlap_threshold=0.8)
    assert ids.tolist() == [[1, 1, 1, 0, 2]]
    assert segments == [
        {"id": 1, "isthing": True, "category_id": 0},
        {"id": 2, "isthing": True, "category_id": 1},
    ]


def test_panoptic_merges_stuff_and_not_things():
    masks = mask_logits([0.9, 0.1, 0.1, 0.1], [0.1, 0.9, 0.1, 0.1], [0.1, 0.1, 0.9, 0.1])
    classes = class_logits((2, 0.9), (2, 0.9), (2, 0.9))
    ids, segments = panoptic_inference(classes, masks, {0, 1}, 0.8)
    assert ids.tolist() == [[1, 1, 1, 0]]
    assert segments == [{"id": 1, "isthing": False, "category_id": 2}]
    ids, segments = panoptic_inference(classes, masks, {2}, 0.8)
    assert ids.tolist() == [[1, 2, 3, 0]] and len(segments) == 3


def test_panoptic_of_nothing_is_empty():
    ids, segments = panoptic_inference(torch.zeros(0, 4), torch.zeros(0, 3, 5), {0}, 0.8)
    assert ids.shape == (3, 5) and ids.dtype == torch.int32 and not ids.any() and segments == []
    faint = mask_logits([0.2, 0.3])
    assert panoptic_inference(class_logits((0, 0.9)), faint, {0}, 0.8)[1] == []


def test_instances_pair_queries_with_classes():
    classes = class_logits((0, 0.9), (1, 0.6))
    queries, labels, scores = select_instances(classes, topk=2, thing_ids=None)
    pairs = sorted(zip(queries.tolist(), labels.tolist(), strict=True))
    assert pairs == [(0, 0), (1, 1)]
    torch.testing.assert_close(scores.sort().values, torch.tensor([0.6, 0.9]))
    assert select_instances(classes, topk=2, thing_ids={1})[1].tolist() == [1]
    assert len(select_instances(classes, topk=100, thing_ids=None)[0]) == 6  # 2 queries x 3


def test_instance_score_is_class_times_mean_mask_probability():
    masks = mask_logits([0.9, 0.7, 0.2], [0.1, 0.1, 0.1])
    result = instance_inference(torch.tensor([0, 1]), torch.tensor([0.5, 0.5]), masks)
    assert result.pred_masks.tolist() == [[[1, 1, 0]], [[0, 0, 0]]]
    torch.testing.assert_close(result.scores, torch.tensor([0.5 * 0.8, 0.0]))


def test_instances_of_nothing_are_empty():
    none = torch.zeros(0, dtype=torch.int64)
    result = instance_inference(none, torch.zeros(0), torch.zeros(0, 3, 5))
    assert len(result) == 0 and result.pred_masks.shape == (0, 3, 5)


def test_semantic_scores_leave_no_object_out():
    scores = semantic_inference(class_logits((0, 0.7), (3, 0.97)), mask_logits([0.5], [0.5]))
    torch.testing.assert_close(scores[:, 0, 0], torch.tensor([0.35 + 0.005, 0.055, 0.055]))


# --- configs ------------------------------------------------------------------------------------

SWIN_LARGE = sorted(
    p.relative_to(CONFIGS).as_posix() for p in CONFIGS.glob("*/*/mask2former_swin_large*.yaml")
)


def test_swin_large_configs_come_in_pairs():
    tasks = ["ade20k/panoptic", "ade20k/semantic"]
    tasks += [f"cityscapes/{task}" for task in ("instance", "panoptic", "semantic")]
    tasks += ["coco/instance", "coco/panoptic"]
    stems = ["mask2former_swin_large.yaml", "mask2former_swin_large_expedited.yaml"]
    pairs = [f"{task}/{stem}" for task in tasks for stem in stems]
    assert SWIN_LARGE == sorted([*pairs, "coco/panoptic/mask2former_swin_large_half.yaml"])


@pytest.mark.parametrize("config", SWIN_LARGE)
def test_swin_large_configs_build(config):
    cfg = load_config(CONFIGS / config, ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        model = build_model(cfg)
    assert (model.backbone.reduction is None) == config.endswith("_large.yaml")
    assert 215e6 < sum(p.numel() for p in model.parameters()) < 216e6
    with torch.no_grad():
        classes, masks = model.eval().logits(torch.empty(1, 3, 128, 160, device="meta"))
    queries = cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES
    assert classes.shape == (1, queries, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES + 1)
    assert masks.shape == (1, queries, 32, 40)


@pytest.mark.parametrize(
    "key, value",
    [
        ("MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "BasePixelDecoder"),
        ("MODEL.SEM_SEG_HEAD.CONVS_DIM", 48),
        ("MODEL.SEM_SEG_HEAD.NORM", "BN"),
        ("MODEL.MASK_FORMER.HIDDEN_DIM", 50),
        ("MODEL.MASK_FORMER.DEC_LAYERS", 0),
        ("MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES", ["res5"]),
    ],
)
def test_unsupported_keys_are_named(key, value):
    with pytest.raises(ValueError, match=key):
        build(key, value)

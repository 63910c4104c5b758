"""The feature pyramid, and real Detectron2's meta-architectures on it."""

from __future__ import annotations

import pickle

import pytest
import torch
from detector_cases import TINY, image, register

from expedite_d2.d2 import (
    BACKBONE_REGISTRY,
    PROVIDER,
    Instances,
    ShapeSpec,
    build_backbone,
    build_model,
)
from expedite_d2.d2.config import load_config
from expedite_d2.d2.modeling.backbone.fpn import FeaturePyramid
from expedite_d2.errors import sentence_of

FPN = [
    *("MODEL.BACKBONE.NAME", "build_expedited_fpn_backbone"),
    *("MODEL.EXPEDITE.BACKBONE", "ExpeditedSwinTransformer"),
]


def test_builder_makes_detectron2s_pyramid():
    backbone = build_backbone(load_config(TINY, FPN)).eval()
    shapes = backbone.output_shape()
    assert {name: (s.channels, s.stride) for name, s in shapes.items()} == {
        "p2": (32, 4), "p3": (32, 8), "p4": (32, 16), "p5": (32, 32), "p6": (32, 64),
    }  # fmt: skip
    assert backbone.size_divisibility == 32
    assert backbone.padding_constraints == {"size_divisibility": 32, "square_size": 0}
    with torch.no_grad():
        maps = backbone(torch.randn(2, 3, 64, 96))
    sizes = {name: tuple(level.shape) for name, level in maps.items()}
    assert sizes == {
        name: (2, 32, -(-64 // s.stride), -(-96 // s.stride)) for name, s in shapes.items()
    }


def test_pyramid_by_hand():
    """With laterals that copy and outputs that copy, a level is itself plus all above it."""
    shapes = {"res3": ShapeSpec(channels=1, stride=8), "res4": ShapeSpec(channels=1, stride=16)}
    pyramid = FeaturePyramid(shapes, ["res3", "res4"], 1)
    for name, parameter in pyramid.named_parameters():
        torch.nn.init.zeros_(parameter)
        if name.endswith("weight"):
            parameter.data[..., parameter.shape[2] // 2, parameter.shape[3] // 2] = 1.0
    maps = pyramid({"res3": torch.ones(1, 1, 3, 4), "res4": 10 * torch.ones(1, 1, 2, 2)})
    assert list(maps) == ["p3", "p4", "p5"]
    assert (maps["p3"] == 11).all() and maps["p3"].shape == (1, 1, 3, 4)
    assert (maps["p4"] == 10).all() and maps["p5"].shape == (1, 1, 1, 1)


def test_builder_expedites_with_the_same_weights():
    plain = build_backbone(load_config(TINY, FPN))
    expedited = build_backbone(load_config(TINY, [*FPN, "MODEL.EXPEDITE.ENABLED", True]))
    assert plain.state_dict().keys() == expedited.state_dict().keys()
    assert expedited.bottom_up.reduction is not None and plain.bottom_up.reduction is None


def test_builder_needs_a_backbone():
    cfg = load_config(TINY, FPN[:2])
    with pytest.raises(ValueError, match="MODEL.EXPEDITE.BACKBONE"):
        build_backbone(cfg)
    assert "build_expedited_fpn_backbone" in BACKBONE_REGISTRY


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.FPN.NORM", "BN"], "MODEL.FPN.NORM"),
        (["MODEL.FPN.OUT_CHANNELS", 40], "MODEL.FPN.OUT_CHANNELS"),
        (["MODEL.FPN.FUSE_TYPE", "avg"], "MODEL.FPN.FUSE_TYPE"),
    ],
)
def test_settings_that_do_not_fit_are_named(opts, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(load_config(TINY, [*FPN, *opts]))


@pytest.mark.detectron2
@pytest.mark.parametrize("architecture", ["GeneralizedRCNN", "PanopticFPN"])
def test_detectron2s_own_architectures_run_on_it(architecture):
    pytest.importorskip("detectron2", reason="needs the real Detectron2")
    if PROVIDER != "detectron2":
        pytest.skip("the stand-in is forced")
    from detectron2.structures import BitMasks

    register()
    cfg = load_config(
        TINY,
        [
            *FPN,
            *("MODEL.META_ARCHITECTURE", architecture, "MODEL.MASK_ON", True),
            *("MODEL.EXPEDITE.ENABLED", True, "INPUT.MASK_FORMAT", "bitmask"),
            *("MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
            *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"),
            *("MODEL.SEM_SEG_HEAD.COMMON_STRIDE", 4),
        ],
    )
    torch.manual_seed(0)
    model = build_model(cfg).train()
    inputs = image(50, 70)
    masks = BitMasks(inputs["instances"].gt_masks[:3])
    target = Instances((50, 70), gt_classes=torch.arange(3), gt_masks=masks)
    target.gt_boxes = masks.get_bounding_boxes()
    inputs["instances"] = target
    from detectron2.utils.events import EventStorage

    with EventStorage():
        losses = model([inputs])
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    with torch.no_grad():
        (output,) = model.eval()([inputs])
    assert output["instances"].image_size == (50, 70)
    assert ("panoptic_seg" in output) == (architecture == "PanopticFPN")


@pytest.mark.parametrize(
    ("opts", "missing", "offered"),
    [
        (FPN, "p7", "p2, p3, p4, p5, p6"),
        (FPN, "res5", "p2, p3, p4, p5, p6"),
        (["MODEL.BACKBONE.NAME", "ExpeditedSwinTransformer"], "res6", "res2, res3, res4, res5"),
        (
            [
                *("MODEL.BACKBONE.NAME", "ExpeditedBackbone"),
                *("MODEL.EXPEDITE.BACKBONE", "ExpeditedSwinTransformer"),
            ],
            "p2",
            "res2, res3, res4, res5",
        ),
        (
            [
                *("MODEL.BACKBONE.NAME", "ExpeditedViT", "MODEL.VIT.OUT_BLOCKS", "[1, 'last']"),
                *("MODEL.VIT.NAME", "vit_tiny_patch16_224"),
            ],
            "block99",
            "block1, last",
        ),
    ],
)
def test_output_that_is_not_there_is_answered_by_those_that_are(opts, missing, offered):
    shapes = build_backbone(load_config(TINY, opts)).output_shape()
    assert missing not in shapes and shapes.get(missing) is None
    with pytest.raises(KeyError, match=f"has no output '{missing}'.*: it has {offered}"):
        shapes[missing]
    copied = pickle.loads(pickle.dumps(shapes))
    assert copied == shapes == dict(shapes)
    with pytest.raises(KeyError, match=f"has no output '{missing}'"):
        copied[missing]


@pytest.mark.detectron2
@pytest.mark.parametrize("key", ["RETINANET", "RPN"])
def test_detectron2s_own_heads_say_what_the_pyramid_offers(key):
    pytest.importorskip("detectron2", reason="needs the real Detectron2")
    if PROVIDER != "detectron2":
        pytest.skip("the stand-in is forced")
    architecture = {"RETINANET": "RetinaNet", "RPN": "ProposalNetwork"}[key]
    opts = [*FPN, "MODEL.META_ARCHITECTURE", architecture]
    opts += [f"MODEL.{key}.IN_FEATURES", ["p3", "p4", "p5", "p6", "p7"]]
    with pytest.raises(KeyError, match="has no output 'p7'.*it has p2, p3") as caught:
        build_model(load_config(TINY, opts))
    assert sentence_of(caught.value) is not None

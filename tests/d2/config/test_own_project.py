"""The way into somebody's own Detectron2 project: get_cfg(), add_expedite_config(cfg), a name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from expedite_d2.d2 import CfgNode, build_backbone, build_model, get_cfg
from expedite_d2.d2.config import add_expedite_config, load_config

MODELS = Path(__file__).parents[1] / "modeling"
CONFIGS = {
    "ExpeditedMask2Former": "mask2former_tiny.yaml",
    "ExpeditedSegmenter": "segmenter_tiny.yaml",
    "ExpeditedDPT": "dpt_tiny.yaml",
    "ExpeditedHTC": "detector_tiny.yaml",
    "ExpeditedPanopticFPN": "detector_tiny.yaml",
}
BACKBONES: dict[str, tuple[dict[str, object], list[str]]] = {
    "ExpeditedSwinTransformer": ({}, ["res2", "res3", "res4", "res5"]),
    "ExpeditedViT": ({"MODEL.VIT.OUT_BLOCKS": [0, "last"]}, ["block0", "last"]),
    "ExpeditedBackbone": (
        {"MODEL.EXPEDITE.BACKBONE": "ExpeditedSwinTransformer"},
        ["res2", "res3", "res4", "res5"],
    ),
    "build_expedited_fpn_backbone": (
        {
            "MODEL.EXPEDITE.BACKBONE": "ExpeditedSwinTransformer",
            "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
        },
        ["p2", "p3", "p4", "p5", "p6"],
    ),
}


def add_mask2former_anew(cfg: CfgNode) -> None:
    """What matters here of a function that begins nodes anew, as Mask2Former's own does."""
    cfg.INPUT.DATASET_MAPPER_NAME = "theirs"
    cfg.MODEL.MASK_FORMER = CfgNode(
        {
            "DEEP_SUPERVISION": True, "NO_OBJECT_WEIGHT": 0.1, "CLASS_WEIGHT": 1.0,
            "DICE_WEIGHT": 1.0, "MASK_WEIGHT": 20.0, "NHEADS": 8, "DROPOUT": 0.1,
            "DIM_FEEDFORWARD": 2048, "ENC_LAYERS": 0, "DEC_LAYERS": 6, "PRE_NORM": False,
            "HIDDEN_DIM": 256, "NUM_OBJECT_QUERIES": 100, "TRANSFORMER_IN_FEATURE": "res5",
            "ENFORCE_INPUT_PROJ": False, "SIZE_DIVISIBILITY": 32,
            "TRANSFORMER_DECODER_NAME": "MultiScaleMaskedTransformerDecoder",
            "TRAIN_NUM_POINTS": 112 * 112, "OVERSAMPLE_RATIO": 3.0,
            "IMPORTANCE_SAMPLE_RATIO": 0.75,
            "TEST": {
                "SEMANTIC_ON": True, "INSTANCE_ON": False, "PANOPTIC_ON": False,
                "OBJECT_MASK_THRESHOLD": 0.0, "OVERLAP_THRESHOLD": 0.0,
                "SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE": False,
            },
        }
    )  # fmt: skip
    cfg.MODEL.SWIN = CfgNode(
        {
            "PRETRAIN_IMG_SIZE": 224, "PATCH_SIZE": 4, "EMBED_DIM": 96, "DEPTHS": [2, 2, 6, 2],
            "NUM_HEADS": [3, 6, 12, 24], "WINDOW_SIZE": 7, "MLP_RATIO": 4.0, "QKV_BIAS": True,
            "QK_SCALE": None, "DROP_RATE": 0.0, "ATTN_DROP_RATE": 0.0, "DROP_PATH_RATE": 0.3,
            "APE": False, "PATCH_NORM": True, "OUT_FEATURES": ["res2", "res3", "res4", "res5"],
            "USE_CHECKPOINT": False,
        }
    )  # fmt: skip


def leaves(node: CfgNode, prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in node.items():
        key = f"{prefix}{name}"
        found |= leaves(value, f"{key}.") if isinstance(value, CfgNode) else {key: value}
    return found


@pytest.mark.parametrize("expedited", [False, True])
@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_builds_from_a_bare_config(name: str, expedited: bool) -> None:
    cfg = get_cfg()
    add_expedite_config(cfg)
    changes, outputs = BACKBONES[name]
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.EXPEDITE.ENABLED, cfg.MODEL.EXPEDITE.ALPHA = expedited, 4
    cfg.MODEL.EXPEDITE.CLUSTERS = [5, 5]
    cfg.merge_from_list([word for change in changes.items() for word in change])
    with torch.device("meta"):
        backbone = build_backbone(cfg)
    assert list(backbone.output_shape()) == outputs


@pytest.mark.parametrize("name", CONFIGS)
def test_every_meta_architecture_builds_from_a_bare_config(name: str) -> None:
    cfg = get_cfg()
    add_expedite_config(cfg)
    cfg.merge_from_file(str(MODELS / CONFIGS[name]))
    cfg.MODEL.META_ARCHITECTURE = name
    cfg.MODEL.SEM_SEG_HEAD.COMMON_STRIDE = 4
    assert type(build_model(cfg)).__name__ == name


@pytest.mark.parametrize(
    "functions",
    [[add_mask2former_anew, add_expedite_config], [add_expedite_config, add_mask2former_anew]],
    ids=["after", "before"],
)
def test_mask2formers_own_function_may_come_before_or_after(
    functions: list[Callable[[CfgNode], None]],
) -> None:
    cfg = get_cfg()
    for function in functions:
        function(cfg)
    assert cfg.INPUT.DATASET_MAPPER_NAME == "theirs"
    cfg.merge_from_file(str(MODELS / CONFIGS["ExpeditedMask2Former"]))
    cfg.MODEL.META_ARCHITECTURE = "ExpeditedMask2Former"
    cfg.MODEL.EXPEDITE.ENABLED, cfg.MODEL.EXPEDITE.ALPHA = True, 3
    cfg.MODEL.EXPEDITE.CLUSTERS = [2, 2]
    model = build_model(cfg)
    assert model.backbone.reduction is not None and model.sem_aux_weight == 0


def test_values_that_are_there_are_kept_and_none_is_shared() -> None:
    cfg, other = get_cfg(), get_cfg()
    cfg.MODEL.EXPEDITE = CfgNode({"ALPHA": 5})
    cfg.MODEL.SWIN = CfgNode({"DEPTHS": [1, 1, 1, 1]})
    for node in (cfg, other):
        add_expedite_config(node)
    assert (cfg.MODEL.EXPEDITE.ALPHA, cfg.MODEL.EXPEDITE.CLUSTERS) == (5, [8, 8])
    assert (cfg.MODEL.SWIN.DEPTHS, cfg.MODEL.SWIN.EMBED_DIM) == ([1, 1, 1, 1], 96)
    cfg.MODEL.EXPEDITE.CLUSTERS.append(8)
    assert other.MODEL.EXPEDITE.CLUSTERS == [8, 8]
    before = other.clone()
    add_expedite_config(other)
    assert other == before


def test_a_config_file_sees_the_same_keys() -> None:
    cfg = get_cfg()
    add_expedite_config(cfg)
    loaded = load_config("scenes/panoptic/mask2former_swin_mini.yaml")
    assert leaves(cfg).keys() == leaves(loaded).keys()

"""The way into somebody's own Detectron2 project: get_cfg(), add_expedite_config(cfg), a name."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from expedite_d2.d2 import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    CfgNode,
    ShapeSpec,
    add_expedite_config,
    build_backbone,
    build_model,
    get_cfg,
)
from expedite_d2.d2.config import load_config
from expedite_d2.d2.config.keys import KEYS, UNREAD_KEYS
from expedite_d2.d2.config.keys_mask2former import KEYS_BELOW_ITS_NODES

MODELS = Path(__file__).parents[1] / "modeling"
CONFIGS = {
    "ExpeditedMask2Former": "mask2former_tiny.yaml",
    "ExpeditedSegmenter": "segmenter_tiny.yaml",
    "ExpeditedDPT": "dpt_tiny.yaml",
    "ExpeditedHTC": "detector_tiny.yaml",
    "ExpeditedPanopticFPN": "detector_tiny.yaml",
}
RESULTS = {
    "ExpeditedMask2Former": {"sem_seg", "instances"},
    "ExpeditedSegmenter": {"sem_seg"},
    "ExpeditedDPT": {"depth"},
    "ExpeditedHTC": {"instances"},
    "ExpeditedPanopticFPN": {"sem_seg", "instances", "panoptic_seg"},
}
SWIN: dict[str, object] = {
    "MODEL.SWIN.EMBED_DIM": 16,
    "MODEL.SWIN.DEPTHS": [1, 1, 3, 1],
    "MODEL.SWIN.NUM_HEADS": [1, 2, 4, 8],
    "MODEL.SWIN.WINDOW_SIZE": 4,
    "MODEL.EXPEDITE.ALPHA": 3,
    "MODEL.EXPEDITE.CLUSTERS": [2, 2],
}
VIT: dict[str, object] = {
    "MODEL.VIT.PATCH_SIZE": 8,
    "MODEL.VIT.EMBED_DIM": 24,
    "MODEL.VIT.DEPTH": 3,
    "MODEL.VIT.NUM_HEADS": 2,
    "MODEL.VIT.OUT_BLOCKS": [0, "last"],
    "MODEL.EXPEDITE.ALPHA": 1,
    "MODEL.EXPEDITE.CLUSTERS": [0.5, 0.5],
}
STAGES = ["res2", "res3", "res4", "res5"]
ON_SWIN = SWIN | {"MODEL.EXPEDITE.BACKBONE": "ExpeditedSwinTransformer"}
BACKBONES: dict[str, tuple[dict[str, object], list[str]]] = {
    "ExpeditedSwinTransformer": (SWIN, STAGES),
    "ExpeditedViT": (VIT, ["block0", "last"]),
    "ExpeditedBackbone": (ON_SWIN, STAGES),
    "build_expedited_fpn_backbone": (
        ON_SWIN | {"MODEL.FPN.IN_FEATURES": STAGES, "MODEL.FPN.OUT_CHANNELS": 32},
        ["p2", "p3", "p4", "p5", "p6"],
    ),
}
# What Mask2Former's own function assigns: two nodes anew, and keys of others.
FRESH_NODES: dict[str, dict[str, Any]] = {
    "MASK_FORMER": {
        "DEEP_SUPERVISION": True, "NO_OBJECT_WEIGHT": 0.1, "CLASS_WEIGHT": 1.0, "DICE_WEIGHT": 1.0,
        "MASK_WEIGHT": 20.0, "NHEADS": 8, "DROPOUT": 0.1, "DIM_FEEDFORWARD": 2048, "ENC_LAYERS": 0,
        "DEC_LAYERS": 6, "PRE_NORM": False, "HIDDEN_DIM": 256, "NUM_OBJECT_QUERIES": 100,
        "TRANSFORMER_IN_FEATURE": "res5", "ENFORCE_INPUT_PROJ": False, "SIZE_DIVISIBILITY": 32,
        "TRANSFORMER_DECODER_NAME": "MultiScaleMaskedTransformerDecoder",
        "TRAIN_NUM_POINTS": 12544, "OVERSAMPLE_RATIO": 3.0, "IMPORTANCE_SAMPLE_RATIO": 0.75,
        "TEST": {
            "SEMANTIC_ON": True, "INSTANCE_ON": False, "PANOPTIC_ON": False,
            "OBJECT_MASK_THRESHOLD": 0.0, "OVERLAP_THRESHOLD": 0.0,
            "SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE": False,
        },
    },
    "SWIN": {
        "PRETRAIN_IMG_SIZE": 224, "PATCH_SIZE": 4, "EMBED_DIM": 96, "DEPTHS": [2, 2, 6, 2],
        "NUM_HEADS": [3, 6, 12, 24], "WINDOW_SIZE": 7, "MLP_RATIO": 4.0, "QKV_BIAS": True,
        "QK_SCALE": None, "DROP_RATE": 0.0, "ATTN_DROP_RATE": 0.0, "DROP_PATH_RATE": 0.3,
        "APE": False, "PATCH_NORM": True, "OUT_FEATURES": STAGES, "USE_CHECKPOINT": False,
    },
}  # fmt: skip
ASSIGNED: dict[str, Any] = {
    "INPUT.DATASET_MAPPER_NAME": "mask_former_semantic",
    "INPUT.COLOR_AUG_SSD": False,
    "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA": 1.0,
    "INPUT.SIZE_DIVISIBILITY": -1,
    "INPUT.IMAGE_SIZE": 1024,
    "INPUT.MIN_SCALE": 0.1,
    "INPUT.MAX_SCALE": 2.0,
    "SOLVER.WEIGHT_DECAY_EMBED": 0.0,
    "SOLVER.OPTIMIZER": "ADAMW",
    "SOLVER.BACKBONE_MULTIPLIER": 0.1,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 256,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 0,
    "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "BasePixelDecoder",
    "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES": ["res3", "res4", "res5"],
    "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS": 4,
    "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS": 8,
}


def add_mask2former_anew(cfg: CfgNode) -> None:
    """What Mask2Former's own config function does."""
    for name, values in FRESH_NODES.items():
        cfg.MODEL[name] = CfgNode(values)
    for key, value in ASSIGNED.items():
        *parents, leaf = key.split(".")
        node = cfg
        for parent in parents:
            node = node[parent]
        node[leaf] = value


ORDERS = {
    "alone": [add_expedite_config],
    "after": [add_mask2former_anew, add_expedite_config],
    "before": [add_expedite_config, add_mask2former_anew],
}


@pytest.fixture(params=ORDERS)
def cfg(request: pytest.FixtureRequest) -> CfgNode:
    """Detectron2's config with our keys, alone or beside Mask2Former's function."""
    cfg = get_cfg()
    for function in ORDERS[request.param]:
        function(cfg)
    return cfg


def leaves(node: CfgNode, prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in node.items():
        key = f"{prefix}{name}"
        found |= leaves(value, f"{key}.") if isinstance(value, CfgNode) else {key: value}
    return found


# --- models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("expedited", [False, True])
@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_runs(name: str, expedited: bool, cfg: CfgNode) -> None:
    changes, outputs = BACKBONES[name]
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.EXPEDITE.ENABLED = expedited
    cfg.merge_from_list([word for change in changes.items() for word in change])
    backbone = build_backbone(cfg, ShapeSpec(channels=3)).eval()
    with torch.no_grad():
        features = backbone(torch.rand(1, 3, 64, 96))
    assert list(features) == list(backbone.output_shape()) == outputs
    assert all(feature.isfinite().all() for feature in features.values())
    network = getattr(backbone, "bottom_up", backbone)
    assert (network.reduction is not None) == expedited


@pytest.mark.parametrize("name", CONFIGS)
def test_every_meta_architecture_runs(name: str, cfg: CfgNode) -> None:
    cfg.merge_from_file(str(MODELS / CONFIGS[name]))
    cfg.MODEL.META_ARCHITECTURE = name
    cfg.MODEL.SEM_SEG_HEAD.COMMON_STRIDE = 4
    cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON = False  # needs the metadata of a data set
    cfg.MODEL.EXPEDITE.ENABLED = True
    cfg.MODEL.EXPEDITE.ALPHA, cfg.MODEL.EXPEDITE.CLUSTERS = 2, [2, 2]
    model = build_model(cfg).eval()
    assert type(model) is META_ARCH_REGISTRY.get(name)
    assert model.backbone.reduction.alpha == 2
    with torch.no_grad():
        (result,) = model([{"image": torch.randint(256, (3, 64, 96)), "height": 32, "width": 48}])
    assert set(result) == RESULTS[name]


@pytest.mark.parametrize("name", [*BACKBONES, *CONFIGS])
def test_config_without_our_keys_is_told_what_to_call(name: str) -> None:
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1  # 0 is refused first
    builder = build_model if name in CONFIGS else build_backbone
    node = cfg.MODEL.BACKBONE if name in BACKBONES else cfg.MODEL
    node["NAME" if name in BACKBONES else "META_ARCHITECTURE"] = name
    with pytest.raises(ValueError, match="is not in the config: call add_expedite_config last"):
        builder(cfg)


def test_every_registered_name_is_tested() -> None:
    registries = {**dict(BACKBONE_REGISTRY), **dict(META_ARCH_REGISTRY)}
    ours = {n for n, b in registries.items() if b.__module__.startswith("expedite_d2.")}
    assert ours - {"SwinTransformer", "ViT"} == {*BACKBONES, *CONFIGS}  # those are Detectron2's own


# --- keys -------------------------------------------------------------------------------------


def test_keys_that_mask2formers_function_drops_have_their_defaults() -> None:
    cfg = get_cfg()
    for function in ORDERS["before"]:
        function(cfg)
    every = {key.name for key in (*KEYS, *UNREAD_KEYS)}
    assert every - leaves(cfg).keys() == {key.name for key in KEYS_BELOW_ITS_NODES}
    cfg.merge_from_file(str(MODELS / CONFIGS["ExpeditedMask2Former"]))
    cfg.MODEL.META_ARCHITECTURE = "ExpeditedMask2Former"
    model = build_model(cfg)
    assert model.sem_aux_weight == 0 and not hasattr(model, "sem_aux")
    cfg.MODEL.MASK_FORMER.SEM_AUX_WEIGHT = 0.5
    assert build_model(cfg).sem_aux_weight == 0.5
    cfg.MODEL.MASK_FORMER.SEM_AUX_WEIGHT = -1.0
    with pytest.raises(ValueError, match="SEM_AUX_WEIGHT must be a number of at least 0, got -1.0"):
        build_model(cfg)


@pytest.mark.parametrize(
    "copied",
    [lambda cfg: cfg, CfgNode.clone, lambda cfg: pickle.loads(pickle.dumps(cfg))],
    ids=["itself", "clone", "pickle"],
)
def test_setting_a_dropped_key_is_told_what_to_call(
    copied: Callable[[CfgNode], CfgNode], tmp_path: Path
) -> None:
    cfg = get_cfg()
    for function in ORDERS["before"]:
        function(cfg)
    cfg = copied(cfg)
    path = tmp_path / "swin_v2.yaml"
    path.write_text("MODEL:\n  SWIN:\n    VERSION: 2\n")
    message = "MODEL.SWIN.VERSION is not in the config: call add_expedite_config last"
    with pytest.raises(KeyError, match=message):
        cfg.merge_from_file(str(path))
    with pytest.raises(KeyError, match=message):
        cfg.merge_from_list(["MODEL.SWIN.VERSION", 2])
    add_expedite_config(cfg)
    cfg.merge_from_file(str(path))
    cfg.merge_from_list(["MODEL.SWIN.PRETRAINED_WINDOW_SIZES", [6, 6, 6, 3]])
    assert (cfg.MODEL.SWIN.VERSION, cfg.MODEL.SWIN.PRETRAINED_WINDOW_SIZES) == (2, [6, 6, 6, 3])


def test_other_keys_merge_as_in_any_config(cfg: CfgNode, tmp_path: Path) -> None:
    path = tmp_path / "typing_error.yaml"
    path.write_text("MODEL:\n  SWIN:\n    VERSON: 2\n")
    with pytest.raises(KeyError, match="Non-existent config key: MODEL.SWIN.VERSON"):
        cfg.merge_from_file(str(path))
    cfg.register_renamed_key("MODEL.OLD", "MODEL.NEW")
    with pytest.raises(KeyError, match="MODEL.OLD was renamed to MODEL.NEW"):
        cfg.merge_from_list(["MODEL.OLD", 1])


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


def test_mask2formers_keys_have_its_defaults() -> None:
    cfg, theirs = get_cfg(), get_cfg()
    add_expedite_config(cfg)
    add_mask2former_anew(theirs)
    ours = leaves(cfg)
    assert {key: ours.get(key) for key in leaves(theirs)} == leaves(theirs)


@pytest.mark.skipif("MASK2FORMER_ROOT" not in os.environ, reason="needs a clone of Mask2Former")
def test_mask2formers_function_is_emulated_as_it_is() -> None:
    source = Path(os.environ["MASK2FORMER_ROOT"], "mask2former", "config.py").read_text()
    names: dict[str, Any] = {}
    exec(source.replace("from detectron2.config import", "from expedite_d2.d2 import"), names)
    emulated, real = get_cfg(), get_cfg()
    add_mask2former_anew(emulated)
    names["add_maskformer2_config"](real)
    assert emulated == real

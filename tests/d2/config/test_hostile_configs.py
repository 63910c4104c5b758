"""Settings that no model can have: one sentence with the key, what it should be and what it is."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import expedite_d2.d2.modeling  # noqa: F401 - registers the models that the configs name
import train_net
from expedite_d2.__main__ import main
from expedite_d2.d2 import build_model
from expedite_d2.d2.config import load_config
from expedite_d2.d2.config.rules import COMMON_KEYS, DETECTOR_KEYS, check
from expedite_d2.d2.data import build_train_loader

MODELS = Path(__file__).parents[1] / "modeling"
ON = ["MODEL.EXPEDITE.ENABLED", "True"]
PYRAMID = ["MODEL.META_ARCHITECTURE", "ExpeditedHTC"]
FPN = [
    "MODEL.META_ARCHITECTURE", "ExpeditedPanopticFPN", "MODEL.SEM_SEG_HEAD.COMMON_STRIDE", "4",
]  # fmt: skip
FAMILIES: dict[str, tuple[str, list[str]]] = {
    "segmenter": ("segmenter_tiny.yaml", []),
    "dpt": ("dpt_tiny.yaml", ["MODEL.EXPEDITE.ALPHA", "1", "MODEL.EXPEDITE.CLUSTERS", "[2, 2]"]),
    "mask2former": ("mask2former_tiny.yaml", []),
    "htc": ("detector_tiny.yaml", PYRAMID),
    "panoptic_fpn": ("detector_tiny.yaml", FPN),
}


def build(family: str, *opts: str) -> None:
    config, words = FAMILIES[family]
    build_model(load_config(MODELS / config, [*words, *opts]))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tiny_models_themselves_are_fine(family: str) -> None:
    build(family)


# A key below MODEL, a value, and what the message says after the key.
WRONG: dict[str, list[tuple[str, str, str]]] = {
    "segmenter": [
        ("VIT.NAME", "resnet50", "must be a VisionTransformer or Beit of timm.*got 'resnet50'"),
        ("VIT.NAME", "", "must be a VisionTransformer or Beit of timm.*got ''"),
        ("VIT.IMG_SIZE", "-1", "must be an integer of at least 0, got -1"),
        ("VIT.PATCH_SIZE", "100", "got 32 and 100"),
        ("VIT.DEPTH", "-1", "must be an integer of at least 0, got -1"),
        ("VIT.DROP_RATE", "2.0", "must be a number from 0 to below 1, got 2.0"),
        ("VIT.POS_INTERPOLATION", "nearest", "must be one of 'bicubic', 'bilinear', got 'nearest'"),
        ("VIT.OUT_BLOCKS", "last", r"must be of type list, such as \['last'\], got last of type s"),
        ("SEGMENTER.DECODER", "maks", "must be mask or linear, got 'maks'"),
        ("SEGMENTER.PLACEMENT", "middle", "must be one of features, paper, got 'middle'"),
        ("SEGMENTER.DIM", "-4", "must be an integer of at least 0, got -4"),
        ("SEGMENTER.NUM_HEADS", "0", "must be an integer of at least 1, got 0"),
        ("SEGMENTER.NUM_HEADS", "5", "must divide the decoder's width 24, got 5"),
        ("SEGMENTER.MLP_RATIO", "-1.0", "must be a number above 0, got -1.0"),
        ("SEM_SEG_HEAD.NUM_CLASSES", "0", "must be an integer of at least 1, got 0"),
        ("PIXEL_STD", "[1.0, 0.0, 1.0]", r"each a number above 0, got \[1.0, 0.0, 1.0\]"),
        ("PIXEL_MEAN", "[1.0]", r"must be a list of 3 values.*got \[1.0\]"),
    ],
    "dpt": [
        ("DPT.NECK_CHANNELS", "[8, 16]", r"must be a list of 4 values.*got \[8, 16\]"),
        ("DPT.NECK_CHANNELS", "[8, 16, 24, 'x']", r"each an integer.*got \[8, 16, 24, 'x'\]"),
        ("DPT.REASSEMBLE_FACTORS", "[1.5, 2, 1, 0.5]", r"each a whole number.*got \[1.5, 2"),
        ("DPT.REASSEMBLE_FACTORS", "[0, 2, 1, 0.5]", r"each a whole number.*got \[0, 2"),
        ("DPT.FUSION_CHANNELS", "1", "must be an integer of at least 2, got 1"),
        ("DPT.READOUT", "class", "must be one of 'project', 'add', 'ignore', got 'class'"),
        ("DPT.SCALE", "-0.1", "must be a number above 0, got -0.1"),
        ("DPT.SHIFT", "-1.0", "must be a number of at least 0, got -1.0"),
        ("DPT.MAX_DEPTH", "0.0", "must be a number above 0, got 0.0"),
        ("DPT.SILOG_WEIGHT", "2.0", "must be a number from 0 to 1, got 2.0"),
        ("DPT.TEST_SIZE", "[64]", r"must be a list of 2 values.*got \[64\]"),
        ("DPT.TEST_SIZE", "[0, 64]", r"each an integer of at least 1, got \[0, 64\]"),
    ],
    "mask2former": [
        (
            "SEM_SEG_HEAD.IN_FEATURES",
            "['res2', 'res6']",
            r"among \['res2', .*got \['res2', 'res6'\]",
        ),
        ("SEM_SEG_HEAD.IN_FEATURES", "[]", r"must be among \['res2'.*got \[\]"),
        ("SEM_SEG_HEAD.CONVS_DIM", "0", "must be an integer of at least 1, got 0"),
        ("SEM_SEG_HEAD.MASK_DIM", "-1", "must be an integer of at least 1, got -1"),
        ("SEM_SEG_HEAD.COMMON_STRIDE", "0", "must be an integer of at least 1, got 0"),
        ("SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", "-1", "must be an integer of at least 0, got -1"),
        ("MASK_FORMER.NHEADS", "0", "must be an integer of at least 1, got 0"),
        ("MASK_FORMER.DROPOUT", "2.0", "must be a number from 0 to 1, got 2.0"),
        ("MASK_FORMER.DIM_FEEDFORWARD", "-1", "must be an integer of at least 1, got -1"),
        ("MASK_FORMER.HIDDEN_DIM", "0", "must be an integer of at least 1, got 0"),
        ("MASK_FORMER.NUM_OBJECT_QUERIES", "-1", "must be an integer of at least 1, got -1"),
        ("MASK_FORMER.TRAIN_NUM_POINTS", "0", "must be an integer of at least 1, got 0"),
        ("MASK_FORMER.OVERSAMPLE_RATIO", "0.5", "must be a number of at least 1, got 0.5"),
        ("MASK_FORMER.IMPORTANCE_SAMPLE_RATIO", "1.5", "must be a number from 0 to 1, got 1.5"),
    ],
    "htc": [
        ("SWIN.VERSION", "3", "must be one of 1, 2, got 3"),
        ("SWIN.NUM_HEADS", "[3, 2, 4, 8]", r"of each of the stages' widths \[16, 32, 64, 128\]"),
        ("SWIN.NUM_HEADS", "[1, 2]", r"of each of the stages' widths.*got \[1, 2\]"),
        ("SWIN.DEPTHS", "[1, 1, -1, 1]", r"each an integer of at least 1, got \[1, 1, -1, 1\]"),
        ("SWIN.WINDOW_SIZE", "0", "must be an integer of at least 1, got 0"),
        ("SWIN.PRETRAINED_WINDOW_SIZES", "[1, 0, 0, 0]", r"0 or an integer of at least 2, got"),
        ("HTC.SOFT_NMS", "hard", "must be one of '', 'linear', 'gaussian', got 'hard'"),
        ("HTC.SOFT_NMS_SIGMA", "0.0", "must be a number above 0, got 0.0"),
        ("HTC.STAGE_LOSS_WEIGHTS", "[1.0]", "must have one entry per stage"),
        ("HTC.STAGE_LOSS_WEIGHTS", "[-1.0, 1.0, 1.0]", "each a number of at least 0, got"),
        ("HTC.SEMANTIC_CONVS", "-1", "must be an integer of at least 0, got -1"),
        ("FPN.IN_FEATURES", "['res2', 'res4']", r"double from one to the next, got \[4, 16\]"),
        ("FPN.OUT_CHANNELS", "0", "must be an integer of at least 1, got 0"),
        ("FPN.NORM", "BN", "must be '' or 'GN', got 'BN'"),
        ("RPN.IOU_THRESHOLDS", "[0.7, 0.3]", r"the second not below the first, got \[0.7, 0.3\]"),
        ("RPN.BBOX_REG_WEIGHTS", "(1.0, 1.0)", r"must be a list of 4 values.*got \(1.0, 1.0\)"),
        ("ANCHOR_GENERATOR.SIZES", "[[0]]", r"each a number above 0, got \[\[0\]\]"),
        ("ANCHOR_GENERATOR.SIZES", "[]", r"must be a list of one or more values.*got \[\]"),
        ("ROI_HEADS.IN_FEATURES", "['p9']", r"must be among \['p2'.*got \['p9'\]"),
        ("ROI_HEADS.IN_FEATURES", "['p5', 'p2']", r"double from one to the next, got \['p5', "),
        ("ROI_BOX_HEAD.POOLER_TYPE", "ROIPool", "must be one of 'ROIAlignV2', got 'ROIPool'"),
        ("ROI_BOX_HEAD.POOLER_RESOLUTION", "0", "must be an integer of at least 1, got 0"),
        ("ROI_BOX_HEAD.NUM_FC", "0", "must be an integer of at least 1, got 0"),
        ("ROI_MASK_HEAD.NUM_CONV", "0", "must be an integer of at least 1, got 0"),
        ("ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS", "(1.0, 2.0, 3.0)", "each a list of 4 values"),
        ("SEM_SEG_HEAD.COMMON_STRIDE", "0", "must be an integer of at least 1, got 0"),
    ],
    "panoptic_fpn": [
        ("ROI_HEADS.IOU_THRESHOLDS", "[0.5, 0.6]", r"must have one entry, got \[0.5, 0.6\]"),
        ("ROI_BOX_HEAD.BBOX_REG_WEIGHTS", "(0.0, 1.0, 1.0, 1.0)", "each a number above 0, got"),
        ("PANOPTIC_FPN.COMBINE.OVERLAP_THRESH", "2.0", "must be a number from 0 to 1, got 2.0"),
        ("SEM_SEG_HEAD.COMMON_STRIDE", "64", "must divide the strides.*, 4 and more, got 64"),
        ("SEM_SEG_HEAD.COMMON_STRIDE", "3", "must divide the strides.*, 4 and more, got 3"),
    ],
}


@pytest.mark.parametrize(
    ("family", "key", "value", "message"),
    [(family, *case) for family, cases in WRONG.items() for case in cases],
)
def test_wrong_values_are_named_with_their_key(
    family: str, key: str, value: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build(family, f"MODEL.{key}", value)
    assert key in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "opts", "message"),
    [
        ("dpt", ["MODEL.VIT.OUT_BLOCKS", "[]"], r"out_blocks must be .*0 to 3, got \[\]"),
        ("dpt", ["MODEL.VIT.OUT_BLOCKS", "[0, 1, 2, 9]"], r"0 to 3, got \[0, 1, 2, 9\]"),
        ("dpt", ["MODEL.VIT.OUT_BLOCKS", "[0, 1, 2, True]"], r"0 to 3, got \[0, 1, 2, True\]"),
        ("dpt", ["MODEL.VIT.OUT_BLOCKS", "[3, 2, 1, 0]"], r"must rise.*got \[3, 2, 1, 0\]"),
        ("dpt", ["MODEL.VIT.OUT_BLOCKS", "[0, 0, 1, 2]"], r"must rise.*got \[0, 0, 1, 2\]"),
        ("dpt", ["MODEL.VIT.OUT_BLOCKS", "['last', 0, 1, 2]"], "must rise.*'last' at the end"),
        ("segmenter", ["MODEL.VIT.NUM_HEADS", "5"], "MODEL.VIT.*num_heads 5.*divisible"),
        ("segmenter", ["MODEL.VIT.NAME", "vit_base_r50_s16_224"], "MODEL.VIT.*patch_size 4"),
        ("segmenter", [*ON, "MODEL.EXPEDITE.ALPHA", "4"], "alpha must be less than the 4 blocks"),
        ("dpt", [*ON, "MODEL.EXPEDITE.CLUSTERS", "[1.0, 1.0]"], "two ratios between 0 and 1"),
        (
            "dpt",
            [*ON, "MODEL.EXPEDITE.CLUSTERS", "[0.5, 2]"],
            r"clusters\) must be.*got \(0.5, 2\)",
        ),
        (
            "dpt",
            [*ON, "MODEL.EXPEDITE.ALPHA", "1", "MODEL.EXPEDITE.CLUSTERS", "[4, 4]"],
            r"CLUSTERS must be fewer than the 4x4 tokens of MODEL.DPT.TEST_SIZE \[64, 64\], got 4x",
        ),
        (
            "segmenter",
            [*ON, "MODEL.EXPEDITE.CLUSTERS", "[8, 8]", "TEST.SLIDING_WINDOW.ENABLED", "True"],
            r"CLUSTERS must be fewer than the 8x8 tokens of TEST.SLIDING_WINDOW.CROP \[32, 32\]",
        ),
        (
            "segmenter",
            [*ON, "MODEL.EXPEDITE.CLUSTERS", "[300, 300]"],
            "CLUSTERS must be fewer than the 200x334 tokens of INPUT.MIN_SIZE_TEST and MAX",
        ),
        ("htc", [*ON, "MODEL.EXPEDITE.CLUSTERS", "[4, 4]"], "clusters must be smaller than the"),
        ("dpt", ["TEST.SLIDING_WINDOW.ENABLED", "True"], "ENABLED True for ExpeditedDPT"),
        ("htc", ["TEST.SLIDING_WINDOW.ENABLED", "True"], "ENABLED True for ExpeditedHTC"),
        ("dpt", ["TEST.AUG.ENABLED", "True"], "TEST.AUG.*ENABLED must be False, got True"),
        (
            "htc",
            ["TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(64, 0)"],
            r"TEST.AUG.MIN_SIZES must be .*each an integer of at least 1, got \(64, 0\)",
        ),
        ("htc", ["TEST.DETECTIONS_PER_IMAGE", "0"], "TEST.DETECTIONS_PER_IMAGE must be an"),
        ("htc", ["MODEL.DEVICE", "gpu"], "MODEL.DEVICE must be a device of torch.*got 'gpu'"),
        ("htc", ["MODEL.DEVICE", ""], "MODEL.DEVICE must be a device of torch.*got ''"),
        ("dpt", ["DATALOADER.NUM_WORKERS", "-1"], "DATALOADER.NUM_WORKERS must be .*got -1"),
        ("htc", ["TEST.DTYPE", "half"], "TEST.DTYPE must be one of 'float32'.*got 'half'"),
        ("segmenter", ["INPUT.FORMAT", "GBR"], "INPUT.FORMAT must be .*got 'GBR'"),
        ("segmenter", ["INPUT.MAX_SIZE_TEST", "0"], "INPUT.MAX_SIZE_TEST must be .*got 0"),
        (
            "segmenter",
            [
                *("TEST.SLIDING_WINDOW.ENABLED", "True"),
                *("TEST.SLIDING_WINDOW.STRIDE", "[16.5, 16]"),
            ],
            r"two positive sides each.*STRIDE \[16.5, 16\]",
        ),
    ],
)
def test_settings_that_do_not_fit_each_other_are_named(
    family: str, opts: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build(family, *opts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["INPUT.RANDOM_FLIP", "vertical"], "INPUT.RANDOM_FLIP must be .*got 'vertical'"),
        (["INPUT.MIN_SIZE_TRAIN", "()"], r"INPUT.MIN_SIZE_TRAIN must be .*got \(\)"),
        (["INPUT.MIN_SIZE_TRAIN_SAMPLING", "all"], "SAMPLING must be one of 'choice', 'range'"),
        (["INPUT.IMAGE_SIZE", "0"], "INPUT.IMAGE_SIZE must be .*got 0"),
        (["INPUT.MIN_SCALE", "3.0"], "MIN_SCALE must not exceed INPUT.MAX_SCALE 2.0, got 3.0"),
        (["INPUT.CROP.TYPE", "square"], "INPUT.CROP.TYPE must be one of .*got 'square'"),
        (
            ["INPUT.CROP.TYPE", "absolute_range", "INPUT.CROP.SIZE", "[64, 32]"],
            r"INPUT.CROP.SIZE must be .*the second not below the first, got \[64, 32\]",
        ),
        (
            ["INPUT.CROP.TYPE", "relative", "INPUT.CROP.SIZE", "[1.5, 1.5]"],
            r"INPUT.CROP.SIZE must be .*at most 1, got \[1.5, 1.5\]",
        ),
        (["INPUT.DATASET_MAPPER_NAME", "any"], "INPUT.DATASET_MAPPER_NAME must be one of"),
    ],
)
def test_settings_of_the_training_data_are_named(opts: list[str], message: str) -> None:
    words = ["DATASETS.TRAIN", "('scenes_train',)", "INPUT.CROP.ENABLED", "True", *opts]
    with pytest.raises(ValueError, match=message):
        build_train_loader(load_config(MODELS / "segmenter_tiny.yaml", words))


def test_the_rules_hold_for_every_config_of_the_project() -> None:
    configs = sorted((Path(__file__).parents[3] / "configs").glob("*/*/*.yaml"))
    assert len(configs) > 20
    for path in configs:
        cfg = load_config(path)
        check(cfg, COMMON_KEYS)
        if cfg.MODEL.META_ARCHITECTURE in ("ExpeditedHTC", "ExpeditedPanopticFPN"):
            check(cfg, DETECTOR_KEYS)


# --- the command line -------------------------------------------------------------------------

COMMANDS = [
    ("segmenter", ["MODEL.VIT.NAME", "resnet50"], "MODEL.VIT.NAME must be"),
    ("dpt", ["MODEL.DPT.SCALE", "-1.0"], "MODEL.DPT.SCALE must be a number above 0, got -1.0"),
    ("dpt", ["DATASETS.TEST", "('kitti_eigen_test',)"], "set DETECTRON2_DATASETS to the folder"),
    ("htc", ["MODEL.HTC.SOFT_NMS", "hard"], "MODEL.HTC.SOFT_NMS must be"),
    ("htc", ["DATASETS.TEST", "('pascal_context_val',)"], "set DETECTRON2_DATASETS to the"),
    ("panoptic_fpn", ["MODEL.RPN.IN_FEATURES", "['p9']"], "MODEL.RPN.IN_FEATURES must be among"),
]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, in which no data set is found."""
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def one_sentence(capsys: pytest.CaptureFixture[str], message: str) -> None:
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0] and lines[-1] == errors[0]


@pytest.mark.parametrize(("family", "opts", "message"), COMMANDS)
@pytest.mark.parametrize("compare", [[], ["--compare"]], ids=["evaluate", "compare"])
def test_train_net_ends_in_one_sentence(
    family: str,
    opts: list[str],
    message: str,
    compare: list[str],
    elsewhere: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, words = FAMILIES[family]
    command = ["train_net.py", "--eval-only", *compare, "--config-file", str(MODELS / config)]
    command += [*words, "OUTPUT_DIR", str(elsewhere / "out"), "DATALOADER.NUM_WORKERS", "0"]
    command += ["DATASETS.TEST", "('nyuv2_test',)", *opts]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as caught:
        train_net.invoke_main()
    assert caught.value.code == 2
    one_sentence(capsys, message)
    left = {path.name for path in (elsewhere / "out").rglob("*")}
    assert left <= {"config.yaml", "log.txt"}


def test_predict_and_cost_end_in_one_sentence(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(elsewhere / "photo.png")
    config, wrong = str(MODELS / "dpt_tiny.yaml"), ["MODEL.DPT.READOUT", "class"]
    arguments = ["--config-file", config, "--input", "photo.png", "--output", "out", *wrong]
    for words in (
        ["predict", *arguments],
        ["cost", "--config-file", config, "--size", "64", "64", *wrong],
    ):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2
        one_sentence(capsys, "MODEL.DPT.READOUT must be one of")
    assert os.listdir(elsewhere) == ["photo.png"]

"""Multiply-adds of configurations: the published ones, padding, reports, the command."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from expedite_d2.__main__ import main
from expedite_d2.d2 import build_model
from expedite_d2.d2.comparison import cost
from expedite_d2.d2.config import load_config

TINY = [
    "MODEL.SWIN.EMBED_DIM", "16",
    "MODEL.SWIN.DEPTHS", "[1, 1, 4, 1]",
    "MODEL.SWIN.NUM_HEADS", "[1, 2, 4, 8]",
    "MODEL.MASK_FORMER.DEC_LAYERS", "3",
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", "1",
    "MODEL.EXPEDITE.ALPHA", "3",
]  # fmt: skip
EXPEDITED = "configs/scenes/panoptic/mask2former_swin_mini_expedited.yaml"
PLAIN = "configs/scenes/panoptic/mask2former_swin_mini.yaml"


@pytest.fixture(scope="module")
def tiny():
    return load_config(EXPEDITED, TINY)


@pytest.fixture(scope="module")
def result(tiny):
    return cost.config_cost(tiny, 128, 160)


def test_size_is_padded_as_inference_pads_it(tiny, result):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no operator of Mask2Former is uncounted
        gflops = cost.count_gflops(tiny, 97, 130)
    assert gflops == result["expedited"]["gflops"], "97x130 is padded to 128x160"


def test_model_is_counted_like_its_config_and_left_alone(tiny, result):
    cfg = tiny.clone()
    cfg.MODEL.DEVICE = "cpu"
    cfg.TEST.DTYPE = "bfloat16"
    model = build_model(cfg).train()
    with torch.inference_mode():
        assert cost.count_gflops(model, 128, 160) == result["expedited"]["gflops"]
    assert model.training and {p.device.type for p in model.parameters()} == {"cpu"}


# What README and docs/systems.md say: config, size, part, cost plain and expedited.
PUBLISHED = [
    ("coco/panoptic/mask2former_swin_large", (1152, 1152), "backbone", (936.9, 661.2)),
    ("coco/instance/mask2former_swin_large", (1152, 1152), "backbone", (936.9, 704.9)),
    ("ade20k/semantic/mask2former_swin_large", (1152, 1152), "backbone", (936.9, 618.0)),
    ("ade20k/semantic/segmenter_vit_large", (640, 640), "model", (671.8, 442.4)),
    ("kitti/depth/dpt_vit_hybrid", (352, 1216), "model", (405.1, 314.5)),
    ("nyuv2/depth/dpt_vit_hybrid", (480, 640), "model", (280.3, 219.2)),
    ("coco/instance/htc_swinv2_large", (1024, 1024), "backbone", (913.1, 744.4)),
    ("scenes/panoptic/mask2former_swin_mini", (384, 384), "backbone", (4.591, 2.844)),
    ("scenes/panoptic/mask2former_swin_mini", (384, 384), "model", (7.184, 5.438)),
]


@pytest.mark.parametrize(
    ("config", "size", "part", "expected"), PUBLISHED, ids=[f"{c}-{p}" for c, _, p, _ in PUBLISHED]
)
@pytest.mark.filterwarnings("error:multiply-adds")
def test_costs_are_the_published_ones(config, size, part, expected):
    report = cost.config_cost(load_config(f"configs/{config}_expedited.yaml"), *size)
    found = [report[name]["gflops"][part] for name in ("baseline", "expedited")]
    assert found == pytest.approx(expected, rel=2e-4)


def test_report_compares_baseline_and_expedited(result):
    assert result["size"] == [128, 160]
    for part in ("backbone", "model"):
        ratio = result["expedited"]["gflops"][part] / result["baseline"]["gflops"][part]
        assert 0.5 < ratio < 1
        assert result["ratio"][f"gflops_{part}"] == ratio
    assert result["expedited"]["settings"]["alpha"] == 3
    lines = cost._table(result).splitlines()
    assert [line.split()[0] for line in lines[1:]] == [
        "baseline",
        "expedited",
        "ratio",
        "settings:",
    ]
    assert "alpha 3, clusters 6x6, iterations 5" in lines[-1]


def test_command_prints_json_alone_and_a_plain_config_has_a_baseline_alone(capsys, result):
    main(["cost", "--config-file", PLAIN, "--size", "128", "160", "--json", *TINY])
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"size": [128, 160], "baseline": result["baseline"]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config-file", "nowhere.yaml", "--size", "8", "8"], "nowhere.yaml"),
        (["--config-file", PLAIN, "--size", "0", "8"], "--size must be two positive numbers"),
    ],
)
def test_command_names_what_is_wrong(capsys, words, message):
    with pytest.raises(SystemExit) as stopped:
        main(["cost", *words])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_count_in_inference_mode() -> None:
    # This stem standardises its weights in place.
    cfg = load_config("scenes/semantic/segmenter_vit_mini.yaml", ["MODEL.WEIGHTS", ""])
    model = build_model(cfg).eval()
    with torch.inference_mode():
        inside = cost.count_gflops(model, 64, 64)
    assert inside == cost.count_gflops(model, 64, 64)

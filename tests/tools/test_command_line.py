"""Verbs of the command line for models of other libraries."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_cases.plain import CONFIG
from PIL import Image
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTImageProcessor,
)

from expedite_d2.__main__ import main
from expedite_d2.reducers import Reduction
from expedite_d2.tools import describe
from expedite_d2.tools.named_models import named_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Depth Anything, as `save_pretrained` writes it."""
    path = tmp_path_factory.mktemp("depth-anything")
    torch.manual_seed(0)
    backbone: Any = Dinov2Config(
        **{**CONFIG, "image_size": 32},
        mlp_ratio=2,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=4,
        reassemble_hidden_size=16,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=8,
    )
    DepthAnythingForDepthEstimation(config).save_pretrained(path)
    size = {"height": 32, "width": 32}
    DPTImageProcessor(size=size, ensure_multiple_of=4).save_pretrained(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of pictures, and a file that is none."""
    path = tmp_path / "pictures"
    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(4):
        pixels = torch.randint(0, 256, (40, 52, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path / f"{number}.png")
    (path / "notes.txt").write_text("none")
    return path


def test_describe_takes_a_model_of_timm(capsys: pytest.CaptureFixture[str]) -> None:
    main(["describe", "--model", "vit_tiny_patch16_224", "--budget", "0.5"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "VisionTransformer (timm VisionTransformer), one image of 224x224"
    assert 0.45 < float(lines[-1].split("(")[1].split(" %")[0]) / 100 <= 0.5


def test_cost_takes_a_directory_of_transformers(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["cost", "--model", str(directory), "--size", "64", "96", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["size"] == [64, 96] and 0.6 < found["ratio"]["gflops_encoder"] <= 0.7
    plain = describe(named_model(str(directory)), (64, 96)).multiply_adds / 1e9
    assert found["baseline"]["gflops"]["encoder"] == pytest.approx(plain)
    main(["cost", "--model", str(directory)])
    assert capsys.readouterr().out.startswith("Dinov2Backbone, G multiply-adds at 32x32")


def test_tuned_settings_go_back_to_the_command_line(
    directory: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, plot = tmp_path / "best.yaml", tmp_path / "front.png"
    main(
        ["tune", "--model", str(directory), "--input", str(folder), "--budget", "0.6"]
        + ["--output", str(output), "--plot", str(plot)]
    )
    text = capsys.readouterr().out
    assert "DepthAnythingForDepthEstimation on cpu, * is the best" in text and "\n*" in text
    assert plot.stat().st_size > 1000
    best = Reduction.load(output)
    main(["describe", "--model", str(directory), "--settings", str(output)])
    assert str(best.steps[0]) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["cost", "--model", "vit_tinny"],
            "must be a directory of transformers or a model of timm",
        ),
        (["cost", "--model", "vit_tiny_patch16"], "near are vit_tiny_patch16_"),
        (["cost", "--model", "DIRECTORY/empty"], "must hold a config.json"),
        (["cost", "--model", "DIRECTORY/broken"], "must be a configuration of transformers"),
        (["cost", "--model", "DIRECTORY/unknown"], "must name a class of transformers"),
        (["cost", "--model", "resnet18"], "it has no attention, and so no tokens to reduce"),
        (["describe", "--model", "vit_tiny_patch16_224", "--budget", "2"], "between 0 and 1"),
        (["describe", "--model", "vit_tiny_patch16_224", "--settings", "no.yaml"], "no.yaml"),
        (["tune", "--model", "GOOD", "--input", "nowhere"], "must be a folder of pictures"),
        (["tune", "--model", "GOOD", "--input", "DIRECTORY/empty"], "got none in"),
        (["tune", "--model", "GOOD", "--input", "FOLDER", "--images", "0"], "at least 1, got 0"),
        (["tune", "--model", "GOOD", "--input", "FOLDER", "--images", "2"], "at least 3 images"),
        (
            ["tune", "--model", "GOOD", "--input", "FOLDER", "--plot", "nowhere/front.png"],
            "--plot must be in a folder that exists, got nowhere/front.png",
        ),
        (
            ["tune", "--model", "GOOD", "--input", "FOLDER", "--plot", "front.xyz"],
            "the plot's name must end in .png, .pdf, .svg, got front.xyz",
        ),
        (["tune", "--model", "GOOD", "--input", "FOLDER", "--device", "tpux"], "got 'tpux'"),
        (["tune", "--model", "DIRECTORY/cut", "--input", "FOLDER"], "cut cannot be read as a Dep"),
        (["tune", "--model", "GOOD", "--input", "DIRECTORY/odd"], "odd/1.png: more than eight"),
        (["tune", "--model", "GOOD", "--input", "DIRECTORY/bad"], "bad/2.jpg: "),
        (
            ["tune", "--model", "GOOD", "--input", "FOLDER", "--max-error", "1e-9"],
            "max_error must be at least",
        ),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str],
    message: str,
    directory: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, text in {"broken": "{", "unknown": '{"architectures": ["None"]}'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    for name in ("empty", "odd", "bad"):
        (tmp_path / name).mkdir()
    shutil.copytree(directory, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:99])
    Image.fromarray(np.full((40, 52), 40000, np.uint16)).save(tmp_path / "odd" / "1.png")
    (tmp_path / "bad" / "2.jpg").write_bytes(b"\xff\xd8\xff")
    places = {"DIRECTORY": tmp_path, "GOOD": directory, "FOLDER": folder}
    for name, place in places.items():
        arguments = [word.replace(name, str(place)) for word in arguments]
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and message in error.splitlines()[-1]


def test_a_directory_without_a_processor_is_told(
    directory: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    with pytest.raises(SystemExit):
        main(["tune", "--model", str(tmp_path), "--input", str(folder)])
    assert "must hold a preprocessor_config.json" in capsys.readouterr().err

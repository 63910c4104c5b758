"""The command that measures the temperature of a config's model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from settings_cases import clustered
from torch import nn

from expedite_d2.__main__ import main
from expedite_d2.d2.config import load_config
from expedite_d2.d2.engine import calibrate as command
from expedite_d2.d2.engine import defaults
from expedite_d2.d2.modeling.backbone import ExpeditedSwinTransformer
from expedite_d2.d2.modeling.backbone.settings import reduction_from_config
from expedite_d2.reducers import Reduction

CONFIG = "scenes/panoptic/mask2former_swin_mini_expedited.yaml"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = ExpeditedSwinTransformer(
            embed_dim=8,
            depths=[1, 2],
            num_heads=[1, 2],
            window_size=4,
            out_features=["res2", "res3"],
            reduction=clustered(2, (2, 2)),
        )

    def forward(self, inputs: list[dict[str, Any]]) -> Any:
        return self.backbone(torch.stack([x["image"] for x in inputs]))


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A tiny model and four images in place of the config's; names of the data sets asked for."""
    names: list[str] = []

    def loader(cfg: Any, name: str) -> Any:
        names.append(name)
        images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        return [[{"image": image}] for image in images]

    monkeypatch.setattr(defaults, "build_test_loader", loader)
    monkeypatch.setattr(command, "build_trained_model", lambda cfg: Model().eval())
    return names


@pytest.mark.parametrize(("asked", "read"), [("2", 2), ("9", 4)])
def test_calibrate_command_prints_key(
    asked: str,
    read: int,
    loaded: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["calibrate", "--config-file", CONFIG, "--images", asked]
    main([*argv, "DATASETS.TEST", "('scenes_val',)"])
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith(f"measured on {read} images of scenes_train")
    key, value = second.removeprefix("to store it: ").split()
    assert key == "MODEL.EXPEDITE.TEMPERATURE" and float(value) > 0
    assert load_config(CONFIG, [key, value]).MODEL.EXPEDITE.TEMPERATURE == float(value)
    assert loaded == ["scenes_train"]


def test_calibrate_command_writes_settings_that_a_config_takes(
    loaded: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "settings.yaml"
    main(["calibrate", "--config-file", CONFIG, "--output", str(path)])
    settings = Reduction.load(path)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("settings with") and last.endswith(f"MODEL.EXPEDITE.SETTINGS {path}")
    assert settings.cluster.temperature > 0
    cfg = load_config(CONFIG, ["MODEL.EXPEDITE.SETTINGS", str(path)])
    assert reduction_from_config(cfg) == settings


def test_calibrate_command_takes_test_set_without_training_set(loaded: list[str]) -> None:
    command.measure(load_config(CONFIG, ["DATASETS.TRAIN", "()"]))
    assert loaded == ["scenes_val"]


def test_calibrate_command_says_that_merges_have_no_temperature(loaded: list[str]) -> None:
    opts = ["MODEL.EXPEDITE.METHOD", "merge", "MODEL.EXPEDITE.MERGE_AT", "[1]"]
    with pytest.raises(ValueError, match="needs --output for settings that merge tokens"):
        command.main(["--config-file", CONFIG, *opts])
    assert not loaded


@pytest.mark.parametrize(
    ("opts", "images", "message"),
    [
        (["MODEL.EXPEDITE.ENABLED", "False"], 2, "got MODEL.EXPEDITE.ENABLED False"),
        ([], 0, "--images must be at least 1, got 0"),
        (["DATASETS.TRAIN", "()", "DATASETS.TEST", "()"], 2, "needs a data set .*, got none"),
    ],
)
def test_calibrate_command_refuses(
    opts: list[str], images: int, message: str, loaded: list[str]
) -> None:
    with pytest.raises(ValueError, match=message):
        command.measure(load_config(CONFIG, opts), images)

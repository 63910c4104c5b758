"""The command that finds the best settings of a config's model."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_cases import few_scenes, make_cfg
from settings_cases import clustered
from torch import nn

from expedite_d2.d2.config import load_config
from expedite_d2.d2.engine import defaults
from expedite_d2.d2.engine import tune as command
from expedite_d2.d2.modeling.backbone import ExpeditedSwinTransformer
from expedite_d2.d2.modeling.backbone.settings import reduction_from_config
from expedite_d2.errors import cli
from expedite_d2.reducers import Reduction
from expedite_d2.tools import describe

PLAIN = "scenes/panoptic/mask2former_swin_mini.yaml"
EXPEDITED = "scenes/panoptic/mask2former_swin_mini_expedited.yaml"
# A multiple of the stride of the deepest map, 8, after padding alone.
SIZE, PADDED = (60, 93), (64, 96)


class Model(nn.Module):
    """As a meta-architecture: images are padded, and results cut and given as dicts."""

    def __init__(self, expedited: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = ExpeditedSwinTransformer(
            embed_dim=8,
            depths=[1, 3],
            num_heads=[1, 2],
            window_size=4,
            out_features=["res2", "res3"],
            reduction=clustered(2, (2, 2)) if expedited else None,
        )

    def forward(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        assert not torch.is_grad_enabled() and not self.training
        results = []
        for item in inputs:
            height, width = item["image"].shape[-2:]
            padded = F.pad(item["image"], (0, -width % 8, 0, -height % 8))[None]
            (scores,) = self.backbone(padded)["res3"]
            results.append({"sem_seg": scores})
        return results


@pytest.fixture(autouse=True)
def one_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings are tried for the budget alone."""
    monkeypatch.setattr(sys.modules["expedite_d2.tools.tune"], "SHARES", ())


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A tiny model and six images in place of the config's; names of the data sets asked for."""
    names: list[str] = []

    def loader(cfg: Any, name: str) -> Any:
        names.append(name)
        images = torch.randn(6, 3, *SIZE, generator=torch.Generator().manual_seed(0))
        return [[{"image": image}] for image in images]

    monkeypatch.setattr(defaults, "build_test_loader", loader)
    monkeypatch.setattr(
        command, "build_trained_model", lambda cfg: Model(cfg.MODEL.EXPEDITE.ENABLED).eval()
    )
    return names


@pytest.mark.parametrize("config", [PLAIN, EXPEDITED])
def test_settings_are_written_and_a_config_takes_them(
    config: str, loaded: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, plot = tmp_path / "best.yaml", tmp_path / "front.png"
    argv = ["--config-file", config, "--budget", "0.75", "--output", str(settings)]
    command.main([*argv, "--plot", str(plot), "DATASETS.TEST", "('scenes_val',)"])
    first, *_, plotted, told = capsys.readouterr().out.splitlines()
    assert first == "Model on cpu, * is the best" and plotted == f"plotted in {plot}"
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert told.startswith(f"best settings written to {settings}: MODEL.EXPEDITE.")
    keys = told.split(": ")[1].split()
    assert keys[-2:] == ["MODEL.EXPEDITE.SETTINGS", str(settings)]
    found = Reduction.load(settings)
    assert reduction_from_config(load_config(config, keys)) == found
    model = Model(False)
    model.backbone.reduction = found
    assert 0.5 < describe(model, PADDED).share_of_blocks < 0.75
    assert loaded == ["scenes_train"]


def test_settings_of_an_expedited_config_are_set_aside(loaded: list[str]) -> None:
    plain, expedited = (command.measure(load_config(path), 3) for path in (PLAIN, EXPEDITED))
    assert plain.rows and len(plain.rows) == len(expedited.rows)
    for one, other in zip(plain.rows, expedited.rows, strict=True):
        assert (one.reduction, one.share) == (other.reduction, other.share)
        assert one.error == pytest.approx(other.error) and one.error > 0


def test_costs_are_counted_at_the_size_that_the_encoder_sees(loaded: list[str]) -> None:
    model, image = Model(False).eval(), [{"image": torch.zeros(3, *SIZE)}]
    assert command.seen_size(model, image) == PADDED
    assert not model.backbone._forward_pre_hooks
    row = command.measure(load_config(PLAIN), 3).rows[0]
    model.backbone.reduction = row.reduction
    assert row.share == pytest.approx(describe(model, PADDED).share)


def test_a_largest_error_takes_the_fastest(loaded: list[str]) -> None:
    tuning = command.measure(load_config(PLAIN), 3, max_error=0.99)
    assert tuning.row.speedup == max(row.speedup for row in tuning.rows)


def test_a_goal_that_nothing_reaches_comes_after_the_table(
    loaded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="max_error must be at least 0.*, got 1e-06"):
        command.main(["--config-file", PLAIN, "--images", "3", "--max-error", "1e-6"])
    assert len(capsys.readouterr().out.splitlines()) > 2


def test_the_first_test_set_is_read_without_a_training_set(loaded: list[str]) -> None:
    command.measure(load_config(PLAIN, ["DATASETS.TRAIN", "()"]), 3)
    assert loaded == ["scenes_val"]


def test_a_real_model_is_compared_by_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = []
    whole = command.dense_scores

    def dense_scores(*args: Any, **keywords: Any) -> Any:
        outputs.append(whole(*args, **keywords))
        return outputs[-1]

    monkeypatch.setattr(command, "dense_scores", dense_scores)
    with few_scenes(tmp_path / "cache"):
        cfg = make_cfg(tmp_path / "out", "MODEL.MASK_FORMER.TEST.INSTANCE_ON", "True")
        tuning = command.measure(cfg, 3, budget=0.97)
    assert tuning.rows and all(row.error > 0 for row in tuning.rows)
    assert {len(maps) for maps in outputs} == {2}  # semantic, and of the instances


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "0"], "--images must be at least 1, got 0"),
        (["--images", "2"], "tune needs at least 3 images, got 2"),
        (["--budget", "1.5"], "budget must be a share between 0 and 1, got 1.5"),
        (["--budget", "nan"], "budget must be a share between 0 and 1, got nan"),
        (["--budget", "0.01"], "budget must be at least 0.*, got 0.01$"),
        (["--max-error", "-1"], "max_error must be a number greater than 0, got -1"),
        (["--budget", "0.5", "--max-error", "0.1"], "not allowed with argument"),
        (
            ["--output", "nowhere/best.yaml"],
            "--output must be in a folder that exists, got nowhere",
        ),
        (["--plot", "nowhere/front.png"], "--plot must be in a folder that exists, got nowhere"),
        (["DATASETS.TRAIN", "()", "DATASETS.TEST", "()"], "tune needs a data set .*, got none"),
    ],
)
def test_what_cannot_be_tuned_is_a_sentence_and_code_2(
    arguments: list[str], message: str, loaded: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli(command.main)(["--config-file", PLAIN, *arguments])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert re.search(message, line)


def test_budget_and_largest_error_exclude_each_other(loaded: list[str]) -> None:
    with pytest.raises(ValueError, match="must not both be given"):
        command.measure(load_config(PLAIN), 3, budget=0.7, max_error=0.1)

"""Ranges of a profiled model, and the files that tell of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_compare import METADATA, tiny_config, tiny_images
from torch import Tensor, nn

from expedite_d2.d2.comparison.profile import profile, profile_model, profile_text
from expedite_d2.d2.config import load_config
from expedite_d2.profiling import profiler_range

STAGES = ["stage1", "stage2", "stage3", "stage4"]


class Halves(nn.Module):
    """Two ranges, the second one twice and inside another."""

    def forward(self, x: Tensor) -> Tensor:
        with profiler_range("expedite_d2.outer", x):
            x = x @ x
            for _ in range(2):
                with profiler_range("expedite_d2.inner", x):
                    x = x @ x
        return x


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return tiny_images(tmp_path_factory.mktemp("images"))


def test_ranges_nest_and_are_counted_an_image(tmp_path: Path):
    batches = [torch.ones(64, 64)] * 2
    result = profile_model(Halves(), batches, torch.device("cpu"), tmp_path / "trace.json")
    calls = {names: cost.calls for names, cost in result.ranges.items()}
    assert calls == {("model",): 1, ("model", "outer"): 1, ("model", "outer", "inner"): 2}
    model, outer, inner = (cost.milliseconds for cost in result.ranges.values())
    assert model >= outer >= inner > 0
    assert result.operators["aten::mm"].calls == 3
    table = profile_text({"baseline": result}, torch.device("cpu"))
    assert "\n· · inner " in table and "100.0 %" in table
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {"expedite_d2.outer", "aten::mm"} <= {event.get("name") for event in events}


def test_range_is_nothing_without_a_profiler():
    with profiler_range("expedite_d2.part", torch.ones(1)) as entered:
        assert entered is None


def test_profile_writes_traces_and_table(
    tmp_path: Path, images: list[dict], new_dataset: Callable[..., str]
):
    cfg = tiny_config(tmp_path, new_dataset(images, **METADATA))
    text = profile(cfg, iterations=2)
    out = Path(cfg.OUTPUT_DIR)
    files = sorted(path.name for path in out.iterdir() if path.suffix in (".json", ".txt"))
    assert files == ["profile.txt", "profile_baseline.json", "profile_expedited.json"]
    assert (out / "profile.txt").read_text() == text
    names: dict[str, set[str]] = {}
    for model in ("baseline", "expedited"):
        events = json.loads((out / f"profile_{model}.json").read_text())["traceEvents"]
        found = {event.get("name", "") for event in events if event.get("ph") == "X"}
        names[model] = {n.removeprefix("expedite_d2.") for n in found if "expedite_d2." in n}
    heads = {"pixel_decoder", "transformer_decoder", "post_processing"}
    assert names["baseline"] >= {"model", "backbone", "stem", *STAGES, *heads}
    low = {"reduce", "low_blocks", "reconstruct"}
    assert names["expedited"] >= names["baseline"] | low
    assert not names["baseline"] & low
    rows = [line for line in text.splitlines() if "· low_blocks " in line]
    assert len(rows) == 1 and rows[0].count("%") == 1


def test_profile_of_a_plain_config_is_the_baseline_alone(
    tmp_path: Path, images: list[dict], new_dataset: Callable[..., str]
):
    cfg = tiny_config(tmp_path, new_dataset(images, **METADATA))
    cfg.defrost()
    # Settings that do not fit the model must not matter where they are switched off.
    cfg.MODEL.EXPEDITE.ENABLED, cfg.MODEL.EXPEDITE.ALPHA = False, 99
    assert "expedited" not in profile(cfg, iterations=1)
    assert not (Path(cfg.OUTPUT_DIR) / "profile_expedited.json").exists()


def test_profile_needs_a_data_set():
    cfg = load_config("configs/scenes/panoptic/mask2former_swin_mini.yaml", ["DATASETS.TEST", "()"])
    with pytest.raises(ValueError, match=r"DATASETS\.TEST is empty"):
        profile(cfg)

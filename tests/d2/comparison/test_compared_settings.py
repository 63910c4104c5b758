"""Settings that are compared: of further configs, as JSON, and as words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from expedite_d2.d2.comparison.settings import (
    describe_settings,
    expedite_settings,
    further_configs,
    summarize_settings,
)
from expedite_d2.d2.config import load_config
from expedite_d2.reducers import Cluster, Correction, Reduction

MODELS = Path(__file__).parents[1] / "modeling"
SEGMENTER = MODELS / "segmenter_tiny.yaml"
HALF = "{ENABLED: True, METHOD: merge, MERGE_AT: [1, 2], KEEP: 0.8, ROUNDS: 2}"


def write(path: Path, expedite: str, rest: str = "") -> str:
    path.write_text(f"_BASE_: {SEGMENTER}\nMODEL:\n  EXPEDITE: {expedite}\n{rest}")
    return str(path)


@pytest.fixture
def config(tmp_path: Path) -> str:
    return write(tmp_path / "net_mini_expedited.yaml", "{ENABLED: True, ALPHA: 2}")


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("net_mini_half.yaml", "half"),
        ("net_mini_half_files.yaml", "half_files"),
        ("net_mini.yaml", "net_mini"),
        ("other.yaml", "other"),
    ],
)
def test_further_settings_are_named_by_what_their_files_do_not_share(
    file: str, name: str, config: str, tmp_path: Path
) -> None:
    half = write(tmp_path / file, HALF)
    assert list(further_configs(load_config(config), config, [half])) == [name]


def test_further_settings_are_taken_alone(config: str, tmp_path: Path) -> None:
    half = write(tmp_path / "net_mini_half.yaml", HALF, "OUTPUT_DIR: elsewhere\n")
    opts = ["MODEL.EXPEDITE.ALPHA", "3", "TEST.DTYPE", "bfloat16", "OUTPUT_DIR", "here"]
    cfg = load_config(config, opts)
    cfg.freeze()
    further = further_configs(cfg, config, [half], opts)["half"]
    assert (cfg.MODEL.EXPEDITE.ALPHA, further.MODEL.EXPEDITE.ALPHA) == (3, 1)
    assert further.MODEL.EXPEDITE.METHOD == "merge"
    assert further.TEST.DTYPE == "bfloat16" and further.OUTPUT_DIR == "here"
    further.MODEL.EXPEDITE = cfg.MODEL.EXPEDITE
    assert further == cfg


@pytest.mark.parametrize(
    ("file", "expedite", "rest", "message"),
    [
        (
            "net_mini_half.yaml",
            HALF,
            "  SEM_SEG_HEAD: {NUM_CLASSES: 7}\n",
            "same model as .*expedited.yaml, whose MODEL.SEM_SEG_HEAD.NUM_CLASSES is .*half.yaml, "
            "where it is 7",
        ),
        ("net_mini_half.yaml", "{ENABLED: True, BACKBONE: ViT}", "", "EXPEDITE.BACKBONE is ''"),
        ("net_mini_half.yaml", "{ENABLED: False}", "", "with MODEL.EXPEDITE.ENABLED, got .*half"),
        ("net_mini_baseline.yaml", HALF, "", "there is one called baseline already"),
        ("net_mini_expedited_expedited.yaml", HALF, "", "one called expedited already"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    file: str, expedite: str, rest: str, message: str, config: str, tmp_path: Path
) -> None:
    other = write(tmp_path / file, expedite, rest)
    with pytest.raises(ValueError, match=message):
        further_configs(load_config(config), config, [other])


def test_two_further_settings_of_one_name_are_refused(config: str, tmp_path: Path) -> None:
    half = write(tmp_path / "net_mini_half.yaml", HALF)
    with pytest.raises(ValueError, match="there is one called half already"):
        further_configs(load_config(config), config, [half, half])


def test_settings_are_what_their_file_holds(config: str, tmp_path: Path) -> None:
    cluster = Reduction(Cluster(2, (3, 3), topk=2))
    cluster.save(tmp_path / "settings.yaml")
    opts = ["MODEL.EXPEDITE.SETTINGS", str(tmp_path / "settings.yaml")]
    found = expedite_settings(load_config(config, opts))
    assert (found.pop("alpha"), found.pop("clusters")) == (2, [3, 3])
    assert found == yaml.safe_load((tmp_path / "settings.yaml").read_text())
    merges = load_config(write(tmp_path / "half.yaml", HALF))
    assert [step["merge"]["at"] for step in expedite_settings(merges)["steps"]] == [1, 2]


def test_detail_maps_are_told_by_what_their_file_is_called(config: str, tmp_path: Path) -> None:
    maps = {3: (torch.zeros(1, 4, 4), torch.zeros(4))}
    correction = Correction(maps, torch.zeros(1))
    Reduction(Cluster(2, (3, 3)), correction=correction).save(tmp_path / "settings.yaml")
    opts = ["MODEL.EXPEDITE.SETTINGS", str(tmp_path / "settings.yaml")]
    found = expedite_settings(load_config(config, opts))
    assert (tmp_path / f"settings-{found['correction']}.safetensors").is_file()
    assert describe_settings(found)[-1] == ("detail maps", found["correction"])


def test_settings_in_words() -> None:
    cluster: dict[str, Any] = {"at": 6, "grid": [8, 8], "topk": 4, "temperature": 0.0}
    clusters = {"steps": [{"cluster": cluster}], "reconstruction": "replace"}
    assert describe_settings(clusters) == [
        ("alpha", "6"), ("clusters", "8x8"), ("topk", "4"), ("temperature", "automatic"),
        ("reconstruction", "replace"),
    ]  # fmt: skip
    assert summarize_settings(clusters) == "alpha 6, clusters 8x8"
    cluster["temperature"] = 0.123456
    assert ("temperature", "0.1235") in describe_settings(clusters)
    steps = [{"merge": {"at": at, "keep": keep, "rounds": 2}} for at, keep in ((1, 0.8), (4, 0.9))]
    merges = {"steps": steps, "reconstruction": "residual"}
    assert summarize_settings(merges) == "merge at 1, 4, keep 0.8, 0.9, rounds 2"

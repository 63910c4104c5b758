from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expedite_d2.d2.config import PROJECT, find_config, find_weights, load_config

SCENES = "scenes/panoptic/mask2former_swin_mini.yaml"


def test_load_config_merges_base_file_and_overrides() -> None:
    cfg = load_config(
        "configs/scenes/panoptic/mask2former_swin_mini_expedited.yaml",
        ["MODEL.EXPEDITE.CLUSTERS", "[0.5, 0.75]", "SEED", "7"],
    )
    assert cfg.MODEL.EXPEDITE.ENABLED
    assert cfg.MODEL.EXPEDITE.CLUSTERS == [0.5, 0.75]
    assert cfg.SEED == 7
    assert cfg.MODEL.SWIN.EMBED_DIM == 48  # from _BASE_


@pytest.mark.parametrize(
    ("opts", "error", "named"),
    [
        (["MODEL.EXPEDITE.ALFA", "3"], KeyError, "ALFA"),
        (["MODEL.EXPEDITE.ALPHA", "many"], ValueError, "ALPHA"),
        (["MODEL.EXPEDITE.ALPHA"], ValueError, "KEY VALUE"),
        (["TEST.DTYPE", "float8"], ValueError, "TEST.DTYPE"),
        (["MODEL.EXPEDITE.CLUSTERS", "[8]"], ValueError, "MODEL.EXPEDITE.CLUSTERS"),
    ],
)
def test_load_config_names_a_bad_override(
    opts: list[str], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        load_config(SCENES, opts)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("MODEL.EXPEDITE.ALPHA", np.int64(6), 6),
        ("MODEL.EXPEDITE.TEMPERATURE", np.float32(0.5), 0.5),
        ("MODEL.EXPEDITE.CLUSTERS", np.array([6, 4]), [6, 4]),
        ("MODEL.EXPEDITE.CLUSTERS", [np.float64(0.5), np.float64(0.25)], [0.5, 0.25]),
        ("MODEL.EXPEDITE.CLUSTERS", torch.tensor([6, 4]), [6, 4]),
        ("MODEL.EXPEDITE.ENABLED", np.bool_(True), True),
    ],
)
def test_load_config_takes_numbers_of_numpy(key: str, value: Any, expected: Any) -> None:
    cfg = load_config(SCENES, [key, value])
    kept = cfg.MODEL.EXPEDITE[key.rpartition(".")[2]]
    assert repr(kept) == repr(expected)
    cfg.dump()  # which knows Python's own types alone


@pytest.mark.parametrize(
    ("text", "error", "named"),
    [
        ("MODEL:\n  EXPEDITE:\n    ALFA: 3\n", KeyError, "ALFA"),
        ("MODEL: [", ValueError, "not a valid config"),
        ("MODEL:\n  EXPEDITE:\n    ALPHA: many\n", ValueError, "ALPHA"),
    ],
)
def test_load_config_names_a_bad_file(
    tmp_path: Path, text: str, error: type[Exception], named: str
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(error, match=named) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_find_config_looks_in_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for spelling in (SCENES, f"configs/{SCENES}"):
        assert find_config(spelling).name == "mask2former_swin_mini.yaml"
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        find_config("configs/nowhere.yaml")


def test_find_weights_resolves_what_the_package_ships() -> None:
    assert find_weights("expedite_d2://x.pth") == str(PROJECT / "weights" / "x.pth")
    assert find_weights("some/x.pth") == "some/x.pth"


def test_load_config_translates_official_names(tmp_path: Path) -> None:
    path = tmp_path / "official.yaml"
    path.write_text(
        "MODEL:\n  META_ARCHITECTURE: MaskFormer\n  BACKBONE:\n    NAME: D2SwinTransformer\n"
    )
    cfg = load_config(path)
    # With the real Mask2Former imported its own classes would serve these names.
    assert cfg.MODEL.META_ARCHITECTURE == "ExpeditedMask2Former"
    assert cfg.MODEL.BACKBONE.NAME == "ExpeditedSwinTransformer"

"""The benchmark of a Mask2Former as transformers' own class, on a few images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import few_scenes

from benchmarks import converted
from expedite_d2 import expedite, restore
from expedite_d2.d2.data import build_test_loader

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unchanged_logger")]
# Detail maps are fitted to as many images as those that ship.
IMAGES, CALIBRATED = 12, converted.CALIBRATED


@pytest.fixture(scope="module", autouse=True)
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with few_scenes(tmp_path_factory.mktemp("scenes"), CALIBRATED):
        yield


def test_predictions_are_the_same() -> None:
    cfg = converted.config("cpu")
    pair = converted.Pair(cfg)
    plain, demo, _, half = converted.settings("cpu").values()
    ours, theirs = pair.readers.values()
    batches = list(islice(build_test_loader(cfg, "scenes_val"), IMAGES))
    few = [[item["image"] for item in batch] for batch in batches[:3]]
    images = [ours.preprocess(pictures).tensor for pictures in few]
    before: list[torch.Tensor] = []
    for reduction in (plain, demo):
        for model in pair.models.values():
            restore(model)
            if reduction is not None:
                expedite(model, reduction)
        with torch.inference_mode():
            logits = [[reader.logits(image) for image in images] for reader in (ours, theirs)]
            results: Any = [[reader(batch)[0] for batch in batches] for reader in (ours, theirs)]
        for expected, found in zip(*logits, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
        for expected, found in zip(*results, strict=True):
            ids, wanted = (one["panoptic_seg"][0] for one in (found, expected))
            assert (ids != wanted).float().mean() < 1e-4
        if before:  # that the settings are in effect
            assert not torch.allclose(logits[1][0][1], before[0], rtol=0, atol=0.1)
        before = [logits[1][0][1]]
    assert half is not None
    with pytest.raises(ValueError, match="fitted to other weights than those of this SwinModel"):
        expedite(pair.models["transformers"], half)


def test_metrics_are_the_same(tmp_path: Path) -> None:
    file = tmp_path / "cpu-converted.json"
    converted.main(["--device", "cpu", "--images", "4", "--output", str(file)])
    rows = json.loads(file.read_text())["results"]
    assert [row["maps"] for row in rows] == [False] * 6 + [True] * 2
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        assert (ours["library"], theirs["library"]) == ("expedite_d2", "transformers")
        assert ours["setting"] == theirs["setting"]
        assert theirs["share"] == pytest.approx(ours["share"], abs=0.01)
        assert theirs["metrics"] == pytest.approx(ours["metrics"], abs=0.1)
        assert theirs["metrics"]["PQ"] > 60
    assert [round(row["share"], 1) for row in rows[::2]] == [1, 0.6, 0.5, 0.5]

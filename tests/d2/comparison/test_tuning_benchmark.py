"""The benchmark of tuning without labels, on a few images, and its table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from engine_cases import few_scenes

from benchmarks import tuning
from expedite_d2.tools.budget import MERGING

pytestmark = pytest.mark.usefixtures("unchanged_logger")


@pytest.mark.slow
def test_settings_near_a_budget_are_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, file = sys.modules["expedite_d2.tools.tune"], tmp_path / "tuning.json"
    monkeypatch.setattr(module.Costs, "recipes", lambda _: (MERGING[0], MERGING[3]))
    with few_scenes(tmp_path / "scenes"):
        tuning.main(["--quick", "--device", "cpu", "--systems", "segmenter", "--output", str(file)])
    written = json.loads(file.read_text())
    assert written["benchmark"] == "tuning" and written["tuned"] == 3
    plain, *tried = written["results"]
    assert plain["metrics"]["mIoU"] > 0 and "budget" not in plain
    assert 0 < plain["choosing"]["mIoU"] != plain["metrics"]["mIoU"]
    assert [row["settings"].split()[0] for row in tried] == ["clusters", "merges"]
    assert all(0.62 < row["share"] <= 0.7 and row["dataset"] == "scenes_val" for row in tried)
    (chosen,) = [row for row in tried if row["chosen"]]
    assert chosen["error"] == min(row["error"] for row in tried)
    assert "without labels: kept" in capsys.readouterr().out


def test_the_table_compares_choices_by_other_images_than_those_that_choose() -> None:
    rows = [("first", True, 0.5, 0.7), ("second", False, 0.8, 0.6), ("third", False, 0.4, 0.9)]
    results = [
        {"system": "dpt", "metrics": {"RMSE": 0.4, "distance": 0.0}, "choosing": {"RMSE": 0.6}},
        *(
            {"system": "dpt", "budget": 0.7, "settings": name, "chosen": chosen}
            | {"metrics": {"RMSE": value, "distance": 0.1}, "choosing": {"RMSE": seen}}
            for name, chosen, value, seen in rows
        ),
    ]
    _, _, line = tuning.table(results).splitlines()
    chosen = ["first", "80.00", "second", "50.00", "third", "100.00"]
    assert line.split() == ["dpt", "0.70", "3", "RMSE", *chosen]

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
    monkeypatch.setattr(module, "recipes", lambda *_: (MERGING[0], MERGING[3]))
    with few_scenes(tmp_path / "scenes"):
        tuning.main(["--quick", "--device", "cpu", "--systems", "segmenter", "--output", str(file)])
    written = json.loads(file.read_text())
    assert written["benchmark"] == "tuning" and written["tuned"] == 3
    plain, *tried = written["results"]
    assert plain["metrics"]["mIoU"] > 0 and "budget" not in plain
    assert [row["settings"].split()[0] for row in tried] == ["clusters", "merges"]
    assert all(0.62 < row["share"] <= 0.7 and row["dataset"] == "scenes_val" for row in tried)
    (chosen,) = [row for row in tried if row["chosen"]]
    assert chosen["error"] == min(row["error"] for row in tried)
    assert "chosen without labels" in capsys.readouterr().out


def test_the_table_compares_the_chosen_settings_with_the_best() -> None:
    rows = [
        ("first", True, {"RMSE": 0.5, "distance": 0.1}),
        ("second", False, {"RMSE": 0.4, "distance": 0.2}),
    ]
    results = [
        {"system": "dpt", "metrics": {"RMSE": 0.4, "distance": 0.0}},
        *(
            {"system": "dpt", "budget": 0.7, "settings": name, "chosen": chosen, "metrics": metrics}
            for name, chosen, metrics in rows
        ),
    ]
    _, _, error, distance = tuning.table(results).splitlines()
    cells = ["dpt", "0.70", "2", "RMSE", "first", "0.50", "80.00", "second", "0.40", "100.00"]
    assert error.split() == cells
    assert distance.split() == ["dpt", "0.70", "2", "distance", "first", "0.10", "first", "0.10"]

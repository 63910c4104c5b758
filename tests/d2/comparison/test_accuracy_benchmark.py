"""The benchmark of accuracy at equal cost, on a few images, and its page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_cases import few_scenes
from rooms import few_rooms

from benchmarks import accuracy, accuracy_page

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unchanged_logger")]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with few_scenes(tmp_path_factory.mktemp("scenes")), pytest.MonkeyPatch.context() as patch:
        patch.setattr(accuracy, "CALIBRATED", 2)
        yield


def run(folder: Path, part: str, *words: str) -> list[dict[str, Any]]:
    file = folder / f"cpu-accuracy-{part}.json"
    accuracy.main(["--quick", "--device", "cpu", "--part", part, "--output", str(file), *words])
    written = json.loads(file.read_text())
    # The page leaves out what was run to try it.
    file.write_text(json.dumps({**written, "quick": False}))
    return written["results"]


def test_methods_meet_the_budget_and_fill_the_page(
    scenes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--systems", "segmenter", "--budgets", "0.5")
    recipes = accuracy.CHOSEN["sequence"]
    few = {method: recipes[method] for method in ("clustering", "grouped attention")}
    monkeypatch.setattr(accuracy, "CHOSEN", {"sequence": few})
    found = run(tmp_path, "report", *words)
    plain, *reduced = found
    assert plain["method"] == "plain" and plain["share"] == 1
    rivals = {"average pooling", "ToMe", "resized image"}
    assert {row["method"] for row in reduced} == rivals | set(few)
    assert all(0.4 < row["share"] <= 0.515 for row in reduced)
    assert all(row["dataset"] == "scenes_val" and row["images"] == 2 for row in found)
    assert all(0 < row["metrics"]["mIoU"] <= 100 for row in found)
    timed = run(tmp_path, "latency", *words, "--rounds", "1")
    assert [row["share"] for row in timed] == [row["share"] for row in found]
    monkeypatch.setattr(accuracy, "SWEEP", {"sequence": accuracy.SWEEP["sequence"][-1:]})
    (_, swept) = run(tmp_path, "sweep", *words)
    assert swept["dataset"] == "scenes_tune" and swept["images"] == 1  # beside those calibrated on
    page = tmp_path / "page.md"
    accuracy_page.main(["--results", str(tmp_path), "--output", str(page)])
    text = page.read_text()
    assert "| grouped attention" in text and "{" not in text
    assert (tmp_path / "page" / "segmenter.png").stat().st_size > 10_000


def test_distance_of_depth_to_the_plain_models(
    scenes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"clustering": accuracy.CHOSEN["sequence"]["clustering"]}
    monkeypatch.setattr(accuracy, "CHOSEN", {"sequence": few})
    words = ("--systems", "dpt", "--budgets", "0.5")
    plain, *reduced = run(tmp_path, "report", *words)
    assert plain["metrics"]["distance"] == 0
    assert all(row["metrics"]["distance"] > 0 for row in reduced)


def test_photographs_are_oblong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "CALIBRATED", 2)
    recipes = accuracy.CHOSEN["photographs"]
    few = {method: recipes[method] for method in ("clustering", "grouped attention")}
    monkeypatch.setattr(accuracy, "CHOSEN", {"photographs": few})
    with few_rooms(tmp_path, ["0900", "0901", "0902"]):
        words = ("--systems", *accuracy.ROOMS, "--budgets", "0.5")
        found = run(tmp_path, "report", *words)
    smaller = {row["system"]: row for row in found if row["method"] == "resized image"}
    assert smaller["segmenter_rooms"]["size"] == [288, 384]
    assert smaller["dpt_rooms"]["size"] == [288, 384]
    assert all(row["share"] <= 0.5 for row in smaller.values())
    for row in found:
        own = {"mIoU", "agreement"} if "mIoU" in row["metrics"] else {"RMSE", "AbsRel"}
        assert own <= {*row["metrics"]} == {*row["intervals"]}
        assert row["images"] == 2 and row["dataset"].endswith("_test")
    page = tmp_path / "page.md"
    accuracy_page.main(["--results", str(tmp_path), "--output", str(page)])
    assert "agreement with plain, %" in page.read_text()


def test_no_results_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        accuracy_page.main(["--results", str(tmp_path)])
    assert ended.value.code == 2

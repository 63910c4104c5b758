from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from expedite_d2.d2.comparison.examples import Example, Seen, TokenGroups
from expedite_d2.d2.comparison.figure import draw_comparison
from expedite_d2.d2.comparison.report import (
    Measurement,
    Subject,
    build_comparison,
    comparison_table,
    headline,
    headline_metrics,
    markdown,
    settings_of,
    to_json,
)
from expedite_d2.d2.visualize import Segment, Segmentation

SUBJECT = Subject(
    model="Model, Swin 48",
    dataset="tiny_val",
    images=3,
    device="cpu, 2 threads",
    dtype="float32",
    torch="2.8.0",
    extension={"cuda": None, "archs": [], "compiler": "g++ 13", "torch": "2.8.0"},
)
SETTINGS = {
    "alpha": 8,
    "clusters": [8, 8],
    "version": 1,
    "steps": [{"cluster": {"at": 8, "grid": [8, 8], "temperature": 0.0}}],
    "reconstruction": "residual",
}
MERGES = {
    "version": 1,
    "steps": [{"merge": {"at": at, "keep": 0.9, "rounds": 2}} for at in (1, 4)],
    "reconstruction": "residual",
}


def measurement(
    pq: float | None = 50.0,
    scale: float = 1.0,
    memory: float | None = 100.0,
    settings: dict[str, Any] | None = None,
) -> Measurement:
    return Measurement(
        metrics={
            "panoptic_seg": {"PQ": pq, "PQ_st": math.nan},
            "sem_seg": {"mIoU": np.float32(70.0)},  # type: ignore[dict-item]
            "segm": {"AP": 40.0, "APl": None},
        },
        gflops={"backbone": [10 * scale, 20 * scale], "model": [30.0, 30.0]},
        latency_ms={"backbone": [5.0, 4.0, 100.0], "model": [10 * scale, 8 * scale, 12 * scale]},
        peak_memory_mb=memory,
        settings=settings,
    )


def pair(baseline: Measurement, *expedited: Any, **changes: Any) -> dict[str, Any]:
    """A comparison of the default setting alone."""
    side = measurement(*expedited, **changes, settings=SETTINGS)
    return build_comparison(SUBJECT, {"baseline": baseline, "expedited": side})


def comparison(**changes: Any) -> dict[str, Any]:
    return pair(measurement(), 49.0, 0.5, **changes)


def three() -> dict[str, Any]:
    runs = {
        "baseline": measurement(),
        "expedited": measurement(49.0, 0.5, settings=SETTINGS),
        "half": measurement(45.0, 0.4, settings=MERGES),
    }
    return build_comparison(SUBJECT, runs)


def paths(tree: Any, prefix: str = "") -> set[str]:
    if not isinstance(tree, dict):
        return {prefix}
    return {path for key, value in tree.items() for path in paths(value, f"{prefix}.{key}")}


def test_comparison_has_the_documented_keys() -> None:
    found = comparison()
    assert set(found) == {
        "model", "dataset", "images", "device", "dtype", "torch", "extension", "baseline",
        "expedited", "ratio",
    }  # fmt: skip
    common = {
        f".{outer}{inner}"
        for outer, inners in {
            "gflops": (".backbone", ".model"),
            "fps": (".backbone", ".model"),
            "latency_ms": tuple(
                f".{part}.{value}"
                for part in ("backbone", "model")
                for value in ("min", "median", "max")
            ),
            "peak_memory_mb": ("",),
            "metrics": (
                ".panoptic_seg.PQ", ".panoptic_seg.PQ_st", ".sem_seg.mIoU", ".segm.AP", ".segm.APl",
            ),
        }.items()
        for inner in inners
    }  # fmt: skip
    assert paths(found["baseline"]) == common
    assert paths(found["expedited"]) == common | {f".settings.{name}" for name in SETTINGS}
    assert found["expedited"]["settings"] == SETTINGS
    metrics = {path for path in common if path.startswith(".metrics")}
    assert paths(found["ratio"]) == metrics | {
        ".gflops_backbone", ".gflops_model", ".speedup_backbone", ".speedup_model",
    }  # fmt: skip


def test_comparison_numbers() -> None:
    found = comparison()
    assert found["baseline"]["gflops"] == {"backbone": 15.0, "model": 30.0}
    assert found["baseline"]["latency_ms"]["backbone"] == {"min": 4.0, "median": 5.0, "max": 100.0}
    assert found["baseline"]["fps"] == {"backbone": 200.0, "model": 100.0}
    ratio = found["ratio"]
    assert ratio["gflops_backbone"] == 0.5 and ratio["gflops_model"] == 1.0
    assert ratio["speedup_backbone"] == 1.0 and ratio["speedup_model"] == 2.0
    assert ratio["metrics"]["panoptic_seg"]["PQ"] == pytest.approx(0.98)


def test_further_settings_are_like_the_first_one_and_change_nothing_else() -> None:
    found, alone = three(), comparison()
    (half,) = found.pop("further")
    assert found == alone
    assert set(half) == {"name", "expedited", "ratio"} and half["name"] == "half"
    assert paths(half["ratio"]) == paths(alone["ratio"])
    assert half["ratio"]["metrics"]["panoptic_seg"]["PQ"] == pytest.approx(0.9)
    assert half["ratio"]["speedup_model"] == pytest.approx(2.5)
    assert half["expedited"].pop("settings") == MERGES
    assert paths(half["expedited"]) == paths(alone["baseline"])


def test_comparison_is_strict_json_and_nan_is_null() -> None:
    found = json.loads(to_json(comparison(memory=None)))
    assert found["baseline"]["metrics"]["panoptic_seg"]["PQ_st"] is None
    assert found["ratio"]["metrics"]["panoptic_seg"]["PQ_st"] is None
    assert found["ratio"]["metrics"]["segm"]["APl"] is None
    assert found["expedited"]["peak_memory_mb"] is None
    assert found["baseline"]["metrics"]["sem_seg"]["mIoU"] == 70.0


def test_comparison_ratio_to_zero_is_null() -> None:
    found = pair(measurement(0.0), 1.0)
    assert found["ratio"]["metrics"]["panoptic_seg"]["PQ"] is None


def test_headline_metrics_are_those_measured() -> None:
    assert headline_metrics(comparison()) == [
        ("panoptic_seg", "PQ"), ("sem_seg", "mIoU"), ("segm", "AP"),
    ]  # fmt: skip
    nothing = pair(measurement(None), None)
    assert ("panoptic_seg", "PQ") not in headline_metrics(nothing)


def test_table_rows_are_aligned_and_complete() -> None:
    lines = comparison_table(comparison()).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["", "baseline", "expedited", "kept"]
    assert ["backbone GFLOPs", "15.00", "7.500", "50.0 %"] in cells
    assert ["model latency, ms", "10.00", "5.000", "2.00x as fast"] in cells
    assert ["PQ", "50.00", "49.00", "98.0 %"] in cells
    assert ["mask APl", "-", "-", "-"] in cells


def test_table_has_two_columns_for_each_setting() -> None:
    lines = comparison_table(three()).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["", "baseline", "expedited", "kept", "half", "kept"]
    assert ["PQ", "50.00", "49.00", "98.0 %", "45.00", "90.0 %"] in cells
    speeds = ["10.00", "5.000", "2.00x as fast", "4.000", "2.50x as fast"]
    assert ["model latency, ms", *speeds] in cells


def test_headline_names_the_setting_where_there_are_several() -> None:
    (alone,) = settings_of(comparison())
    found = three()
    first, half = (headline(found, setting) for setting in settings_of(found))
    assert first == f"expedited: {headline(comparison(), alone)}"
    assert half.startswith("half: 60 % fewer backbone GFLOPs, model 2.50x as fast, PQ 90.0 % kept")


def test_table_without_memory_leaves_the_row_out() -> None:
    found = pair(measurement(memory=None), memory=None)
    assert "memory" not in comparison_table(found)


def test_markdown_tells_settings_environment_and_command() -> None:
    text = markdown(comparison(), "weights.pth", "python train_net.py --compare")
    for part in (
        "# Model, Swin 48 on tiny_val", "| PQ ", "- expedited: alpha 8, clusters 8x8",
        "weights: weights.pth",
        "cpu, 2 threads", "dtype: float32", "compiler g++ 13", "python train_net.py --compare",
    ):  # fmt: skip
        assert part in text
    assert "\n- half: merge at 1, 4, keep 0.9, rounds 2, " in markdown(three(), "", "x")
    assert "weights: random" in markdown(comparison(), "", "x")


def example(height: int, width: int, settings: int = 1, clustered: bool = True) -> Example:
    ids = np.ones((height, width), dtype=np.int32)
    ids[: height // 2] = 2
    plain = Segmentation(ids, (Segment(1, 0, True), Segment(2, 1, False)))
    groups = TokenGroups(np.arange(64).reshape(8, 8), (7.5, 8.0), (4, 4)) if clustered else None
    seen = Seen("one", "cluster", groups, Segmentation(ids * 0, ()))
    return Example(np.full((height, width, 3), 90, dtype=np.uint8), plain, [seen] * settings)


@pytest.mark.parametrize(
    "examples",
    [[], [example(64, 64)], [example(120, 30), example(20, 200, clustered=False)]],
    ids=["none", "one", "tall and wide"],
)
def test_figure_is_1600_pixels_wide(examples: list[Example], tmp_path: Path) -> None:
    path = tmp_path / "comparison.png"
    draw_comparison(comparison(), examples, SimpleNamespace(), path)
    with Image.open(path) as picture:
        assert picture.width == 1600
        assert np.asarray(picture.convert("L")).std() > 1


def test_figure_shows_every_setting_and_as_many_images_as_make_four_rows(tmp_path: Path) -> None:
    drawn = []
    for found, settings in ((comparison(), 1), (three(), 2)):
        for count in (1, 2, 3):
            path = tmp_path / f"{settings}_{count}.png"
            draw_comparison(found, [example(64, 64, settings)] * count, None, path)
            drawn.append(Image.open(path).height)
    one, two, three_, both, twice, again = drawn
    row = two - one
    assert three_ - two == row and twice - both == 2 * row and again == twice


def test_figure_is_drawn_where_metrics_are_undefined(tmp_path: Path) -> None:
    found = pair(measurement(0.0), None)
    draw_comparison(found, [], None, tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").stat().st_size > 1000

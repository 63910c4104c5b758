from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from expedite_d2.d2.comparison.figure import Example, draw_comparison
from expedite_d2.d2.comparison.report import (
    Measurement,
    Subject,
    build_comparison,
    comparison_table,
    headline_metrics,
    markdown,
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
SETTINGS = {"alpha": 8, "clusters": [8, 8], "temperature": 0.0, "reconstruction": "residual"}


def measurement(pq: float | None = 50.0, scale: float = 1.0, memory: float | None = 100.0) -> Any:
    return Measurement(
        metrics={
            "panoptic_seg": {"PQ": pq, "PQ_st": math.nan},
            "sem_seg": {"mIoU": np.float32(70.0)},  # type: ignore[dict-item]
            "segm": {"AP": 40.0, "APl": None},
        },
        gflops={"backbone": [10 * scale, 20 * scale], "model": [30.0, 30.0]},
        latency_ms={"backbone": [5.0, 4.0, 100.0], "model": [10 * scale, 8 * scale, 12 * scale]},
        peak_memory_mb=memory,
    )


def comparison(**changes: Any) -> dict[str, Any]:
    return build_comparison(SUBJECT, measurement(), measurement(49.0, 0.5, **changes), SETTINGS)


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
    assert found["expedited"]["settings"] == SETTINGS


def test_comparison_is_strict_json_and_nan_is_null() -> None:
    found = json.loads(to_json(comparison(memory=None)))
    assert found["baseline"]["metrics"]["panoptic_seg"]["PQ_st"] is None
    assert found["ratio"]["metrics"]["panoptic_seg"]["PQ_st"] is None
    assert found["ratio"]["metrics"]["segm"]["APl"] is None
    assert found["expedited"]["peak_memory_mb"] is None
    assert found["baseline"]["metrics"]["sem_seg"]["mIoU"] == 70.0


def test_comparison_ratio_to_zero_is_null() -> None:
    found = build_comparison(SUBJECT, measurement(0.0), measurement(1.0), SETTINGS)
    assert found["ratio"]["metrics"]["panoptic_seg"]["PQ"] is None


def test_headline_metrics_are_those_measured() -> None:
    assert headline_metrics(comparison()) == [
        ("panoptic_seg", "PQ"), ("sem_seg", "mIoU"), ("segm", "AP"),
    ]  # fmt: skip
    nothing = build_comparison(SUBJECT, measurement(None), measurement(None), SETTINGS)
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


def test_table_without_memory_leaves_the_row_out() -> None:
    found = build_comparison(SUBJECT, measurement(memory=None), measurement(memory=None), SETTINGS)
    assert "memory" not in comparison_table(found)


def test_markdown_tells_settings_environment_and_command() -> None:
    text = markdown(comparison(), "weights.pth", "python train_net.py --compare")
    for part in (
        "# Model, Swin 48 on tiny_val", "| PQ ", "alpha 8, clusters 8 8", "weights: weights.pth",
        "cpu, 2 threads", "dtype: float32", "compiler g++ 13", "python train_net.py --compare",
    ):  # fmt: skip
        assert part in text
    assert "weights: random" in markdown(comparison(), "", "x")


def example(height: int, width: int, clustered: bool = True) -> Example:
    ids = np.ones((height, width), dtype=np.int32)
    ids[: height // 2] = 2
    seen = Segmentation(ids, (Segment(1, 0, True), Segment(2, 1, False)))
    return Example(
        image=np.full((height, width, 3), 90, dtype=np.uint8),
        clusters=np.arange(64).reshape(8, 8) if clustered else None,
        tokens=(7.5, 8.0),
        window=(4, 4),
        baseline=seen,
        expedited=Segmentation(ids * 0, ()),
    )


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


def test_figure_is_drawn_where_metrics_are_undefined(tmp_path: Path) -> None:
    found = build_comparison(SUBJECT, measurement(0.0), measurement(None), SETTINGS)
    draw_comparison(found, [], None, tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").stat().st_size > 1000

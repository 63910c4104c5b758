"""The comparison as one picture: cost, accuracy against latency, and predictions side by side."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from expedite_d2.d2.comparison.report import claims, headline_metrics, metric_title
from expedite_d2.d2.evaluation.evaluator import format_number
from expedite_d2.d2.visualize import (
    Prediction,
    disagreement,
    draw_clusters,
    draw_disagreement,
    draw_predictions,
)
from expedite_d2.files import written

__all__ = ["PANELS", "Example", "draw_comparison", "write_examples"]

logger = logging.getLogger(__name__)

# All lengths are pixels of the finished picture.
_WIDTH = 1600
_MARGIN = 36
_GAP = 14
_COLUMNS = 4
_TITLE = 110
_CHARTS = 250
_CHART_GAP = 74
_CAPTION = 30
_MAX_ROW = 420
_DPI = 100

_INK = "#1f2933"
_FAINT = "#6b7785"
_TRACK = "#dfe4ea"
_BASELINE = "#7b8794"
_EXPEDITED = "#0b7285"

# The four pictures of an example, in their order.
PANELS = {
    "clusters": "input and its clusters",
    "baseline": "baseline",
    "expedited": "expedited",
    "difference": "where they differ",
}
# Four of them stand side by side on a desktop, one fills a phone.
_PANEL_SIDE = 400


@dataclass(frozen=True)
class Example:
    """One image with what both models see in it.

    Attributes:
        image: (H, W, 3) uint8, RGB, at its original size.
        clusters: (h, w) integers, the nearest cluster centre of every token; it may reach beyond
            the image, where the model has padded it. None when the model took the plain path.
        tokens: Rows and columns of tokens that cover the image itself; fractions where a token
            reaches over its edge.
        window: Height and width of a window in tokens, or None.
        baseline: The baseline's prediction, (H, W).
        expedited: The expedited model's prediction, (H, W).
    """

    image: np.ndarray
    clusters: np.ndarray | None
    tokens: tuple[float, float]
    window: tuple[int, int] | None
    baseline: Prediction
    expedited: Prediction


def draw_comparison(
    comparison: Mapping[str, Any],
    examples: Sequence[Example],
    metadata: Any,
    path: str | os.PathLike,
) -> None:
    """Draw ``comparison.png``.

    Args:
        comparison: What ``build_comparison`` returned.
        examples: The images to show, one per row; may be empty.
        metadata: Detectron2's metadata of the data set.
        path: Where to write the PNG, 1600 pixels wide.
    """
    column = (_WIDTH - 2 * _MARGIN - (_COLUMNS - 1) * _GAP) // _COLUMNS
    sizes = [_fit(example.image.shape[:2], column, _MAX_ROW) for example in examples]
    rows = sum(height + _GAP for height, _ in sizes) + (_CAPTION if examples else 0)
    total = _TITLE + _CHART_GAP // 2 + _CHARTS + _CHART_GAP + rows + _MARGIN // 2
    figure = Figure(figsize=(_WIDTH / _DPI, total / _DPI), dpi=_DPI, facecolor="white")
    renderer = FigureCanvasAgg(figure).get_renderer()

    def panel(left: float, top: float, width: float, height: float) -> Axes:
        return figure.add_axes(
            (left / _WIDTH, 1 - (top + height) / total, width / _WIDTH, height / total)
        )

    def write(left: float, top: float, text: str, **style: Any) -> None:
        line = figure.text(left / _WIDTH, 1 - top / total, text, va="top", **style)
        # Names of models and devices have any length.
        excess = line.get_window_extent(renderer).width / (_WIDTH - _MARGIN - left)
        line.set_fontsize(float(line.get_fontsize()) / max(1.0, excess))

    title, subtitle, setting = _titles(comparison)
    write(_MARGIN, 22, title, size=17, weight="bold", color=_INK)
    write(_MARGIN, 60, subtitle, size=10.5, color=_FAINT)
    write(_MARGIN, 81, setting, size=10.5, color=_FAINT)

    top = _TITLE + _CHART_GAP // 2
    metrics = headline_metrics(comparison)[: _COLUMNS - 1]
    # The tracks of the cost chart need no axis labels, so it takes the whole first share.
    shares = len(metrics) + 1
    width = (_WIDTH - 2 * _MARGIN - len(metrics) * _CHART_GAP) / shares
    _draw_costs(panel(_MARGIN, top, width, _CHARTS), comparison)
    for index, (task, name) in enumerate(metrics, start=1):
        left = _MARGIN + index * (width + _CHART_GAP)
        _draw_accuracy(panel(left, top, width, _CHARTS), comparison, task, name)

    top += _CHARTS + _CHART_GAP
    if examples:
        for index, text in enumerate(PANELS.values()):
            write(_MARGIN + index * (column + _GAP), top, text, size=11, weight="bold", color=_INK)
        top += _CAPTION
    for example, (height, shown) in zip(examples, sizes, strict=True):
        for index, picture in enumerate(_pictures(example, (height, shown), metadata)):
            left = _MARGIN + index * (column + _GAP) + (column - shown) / 2
            axes = panel(left, top, shown, height)
            axes.imshow(picture, interpolation="nearest", aspect="auto")
            axes.set_axis_off()
        share = disagreement(example.baseline, example.expedited).mean()
        axes.text(
            8, height - 8, f"{100 * share:.1f} % of the pixels", size=9.5, color=_INK, va="bottom",
            bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 3},
        )  # fmt: skip
        top += height + _GAP
    figure.savefig(path, dpi=_DPI, format="png")


def write_examples(examples: Sequence[Example], metadata: Any, folder: Path) -> None:
    """Write the pictures one by one, for pages that lay them out by themselves.

    ``examples.json`` names them: a list with, for each image, {"panels": {panel: file name},
    "differs": share of the pixels on which the two predictions differ}.

    A picture that cannot be written is told, and its image left out.

    Args:
        examples: The images to show.
        metadata: Detectron2's metadata of the data set.
        folder: Where to write; it is made.
    """
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        logger.warning("%s cannot be made: %s", folder, error.strerror)
        return
    listed: list[dict[str, Any]] = []
    for number, example in enumerate(examples, start=1):
        files = {panel: f"{number}_{panel}.jpg" for panel in PANELS}
        size = _fit(example.image.shape[:2], _PANEL_SIDE, _PANEL_SIDE)
        done = [
            written(
                folder / name, partial(Image.fromarray(picture).save, quality=85), logger.warning
            )
            for name, picture in zip(
                files.values(), _pictures(example, size, metadata), strict=True
            )
        ]
        if all(done):
            share = float(disagreement(example.baseline, example.expedited).mean())
            listed.append({"panels": files, "differs": share})
    text = json.dumps(listed, indent=2) + "\n"
    written(folder / "examples.json", lambda path: path.write_text(text, "utf-8"), logger.warning)
    # What an earlier run with more images has left.
    named = {name for entry in listed for name in entry["panels"].values()}
    for panel in PANELS:
        for path in folder.glob(f"[0-9]*_{panel}.jpg"):
            if path.name not in named:
                with contextlib.suppress(OSError):
                    path.unlink()


def _fit(size: tuple[int, ...], column: int, row: int) -> tuple[int, int]:
    """Height and width of an image in a cell; tall images are made narrower instead."""
    height, width = size
    scale = min(column / width, row / height)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _titles(comparison: Mapping[str, Any]) -> tuple[str, str, str]:
    settings = comparison["expedited"]["settings"]
    if "clusters" in settings:
        clusters = "x".join(map(str, settings["clusters"]))
        reduction = f"alpha {settings['alpha']}, clusters {clusters}"
    else:
        reduction = " ".join(settings["merges"])
    subtitle = (
        f"{comparison['model']}: the same weights, no training; "
        f"{comparison['images']} images of {comparison['dataset']}"
    )
    setting = f"{reduction}; {comparison['dtype']} on {comparison['device']}"
    return ", ".join(claims(comparison)) or "baseline and expedited", subtitle, setting


def _draw_costs(axes: Axes, comparison: Mapping[str, Any]) -> None:
    """Four bars: what remains of the baseline's multiply-adds and latency."""
    baseline, expedited = comparison["baseline"], comparison["expedited"]
    rows = [
        (f"{part} {word}", [read(side, part) for side in (baseline, expedited)])
        for word, read in (
            ("GFLOPs", lambda side, part: side["gflops"][part]),
            ("latency, ms", lambda side, part: side["latency_ms"][part]["median"]),
        )
        for part in ("backbone", "model")
    ]
    for y, (label, (before, after)) in enumerate(rows):
        if before is None or after is None or before == 0:
            continue
        share = after / before
        axes.barh(y, 1.0, height=0.36, color=_TRACK)
        axes.barh(y, min(share, 1.0), height=0.36, color=_EXPEDITED)
        axes.text(0, y - 0.29, label, size=10, color=_INK, va="bottom")
        change = f"{format_number(before, 4)} → {format_number(after, 4)}"
        axes.text(1, y - 0.29, change, size=10, color=_INK, va="bottom", ha="right")
        axes.text(
            min(share, 1.0) - 0.02, y, f"{100 * share:.0f} %",
            size=9.5, color="white", weight="bold", va="center", ha="right",
        )  # fmt: skip
    axes.set_xlim(0, 1)
    axes.set_ylim(len(rows) - 0.75, -0.72)
    axes.set_axis_off()
    axes.set_title("cost, share of the baseline", loc="left", size=11, weight="bold", color=_INK)


def _draw_accuracy(axes: Axes, comparison: Mapping[str, Any], task: str, name: str) -> None:
    """Accuracy against latency: an arrow from the baseline to the expedited model."""
    points = []
    for side in (comparison["baseline"], comparison["expedited"]):
        value = side["metrics"].get(task, {}).get(name)
        points.append((side["latency_ms"]["model"]["median"], 0.0 if value is None else value))
    (x0, y0), (x1, y1) = points
    axes.annotate(
        "", (x1, y1), (x0, y0),
        arrowprops={
            "arrowstyle": "-|>,head_width=0.3,head_length=0.6", "color": _FAINT, "linewidth": 1.4,
            "shrinkA": 7, "shrinkB": 7,
        },
    )  # fmt: skip
    for (x, y), colour in zip(points, (_BASELINE, _EXPEDITED), strict=True):
        axes.scatter([x], [y], s=90, color=colour, zorder=3, edgecolor="white", linewidth=1.2)
    # One label above its point and the other below: they never meet, however close the points.
    above = 1 if y1 > y0 else 0
    words = (f"baseline {format_number(y0, 3)}", f"expedited {format_number(y1, 3)}")
    for index, colour in enumerate((_BASELINE, _EXPEDITED)):
        axes.annotate(
            words[index], points[index], (0, 11 if index == above else -11),
            textcoords="offset points", ha="center", va="bottom" if index == above else "top",
            size=10.5, weight="bold", color=colour,
        )  # fmt: skip
    # A tenth of the value around the points: a loss of a few per cent is seen, and not blown up.
    room = max(0.10 * max(y0, y1), 0.6 * abs(y1 - y0)) or 0.5
    axes.set_ylim(min(y0, y1) - room, max(y0, y1) + room)
    side_room = max(0.8 * abs(x1 - x0), 0.06 * max(x0, x1))
    axes.set_xlim(min(x0, x1) - side_room, max(x0, x1) + side_room)
    axes.set_title(metric_title(task), loc="left", size=11, weight="bold", color=_INK)
    axes.set_xlabel("model latency, ms per image (median)", size=9.5, color=_FAINT)
    axes.grid(color="#eef1f4", linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_FAINT, labelsize=9, length=0)
    axes.locator_params(nbins=5)
    for spine in ("top", "right", "left", "bottom"):
        axes.spines[spine].set_visible(spine == "bottom")
        axes.spines[spine].set_color(_TRACK)


def _pictures(example: Example, size: tuple[int, int], metadata: Any) -> list[np.ndarray]:
    """The row's four pictures, drawn at the size at which they are shown."""
    height, width = size
    # Shown as it is, a photograph is 8-bit RGB; a label map must not be blended.
    image = np.asarray(
        Image.fromarray(example.image).resize((width, height), Image.Resampling.LANCZOS)
    )
    sides = [side.resized(height, width) for side in (example.baseline, example.expedited)]
    differs = disagreement(example.baseline, example.expedited)
    shown = np.asarray(Image.fromarray(differs).resize((width, height), Image.Resampling.NEAREST))
    clusters = image
    if example.clusters is not None:
        stride = (height / example.tokens[0], width / example.tokens[1])
        clusters = draw_clusters(image, example.clusters, stride, example.window)
    return [
        clusters,
        *draw_predictions(image, sides, metadata),
        draw_disagreement(image, shown),
    ]

"""The comparison as one picture: cost, accuracy against latency, and predictions side by side."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from expedite_d2.d2.comparison.examples import Example, draw_panels, fit
from expedite_d2.d2.comparison.labels import box, place_labels
from expedite_d2.d2.comparison.report import (
    Setting,
    headline,
    headline_metrics,
    metric_title,
    settings_of,
)
from expedite_d2.d2.comparison.settings import BASELINE, summarize_settings
from expedite_d2.d2.evaluation.evaluator import format_number

__all__ = ["draw_comparison"]

# All lengths are pixels of the finished picture.
_WIDTH = 1600
_MARGIN = 36
_GAP = 14
_COLUMNS = 4
_TITLE = 38
_LINE = 21
_CHARTS = 190
_BAR = 60
_CHART_GAP = 74
_CAPTION = 28
_MAX_ROW = 420
_MAX_ROWS = 4
_DPI = 100

_INK = "#1f2933"
_FAINT = "#6b7785"
_TRACK = "#dfe4ea"
_BASELINE = "#7b8794"
# Of the settings, one after the other.
_COLOURS = ("#0b7285", "#c2570c", "#6741d9")


def draw_comparison(
    comparison: Mapping[str, Any],
    examples: Sequence[Example],
    metadata: Any,
    path: str | os.PathLike,
) -> None:
    """Draw ``comparison.png``.

    Args:
        comparison: What ``build_comparison`` returned.
        examples: The images to show, a row for each setting; may be empty. Shown are as many as
            make four rows, and at least one.
        metadata: Detectron2's metadata of the data set.
        path: Where to write the PNG, 1600 pixels wide.
    """
    settings = settings_of(comparison)
    titles, subtitles = _titles(comparison, settings)
    head = 22 + _TITLE * len(titles) + _LINE * len(subtitles) + _CHART_GAP // 2
    charts = _CHARTS + _BAR * len(settings)
    column = (_WIDTH - 2 * _MARGIN - (_COLUMNS - 1) * _GAP) // _COLUMNS
    examples = examples[: max(1, _MAX_ROWS // len(settings))]
    sizes = [fit(example.image.shape[:2], column, _MAX_ROW) for example in examples]
    rows = sum((_CAPTION + height + _GAP) * len(settings) for height, _ in sizes)
    total = head + charts + _CHART_GAP + rows + _MARGIN // 2
    figure = Figure(figsize=(_WIDTH / _DPI, total / _DPI), dpi=_DPI, facecolor="white")
    renderer = FigureCanvasAgg(figure).get_renderer()

    def panel(left: float, top: float, width: float, height: float) -> Axes:
        return figure.add_axes(
            (left / _WIDTH, 1 - (top + height) / total, width / _WIDTH, height / total)
        )

    def write(left: float, top: float, text: str, width: float, **style: Any) -> None:
        line = figure.text(left / _WIDTH, 1 - top / total, text, va="top", **style)
        # Names of models, devices and settings have any length.
        excess = line.get_window_extent(renderer).width / width
        line.set_fontsize(float(line.get_fontsize()) / max(1.0, excess))

    top = 22.0
    colours = _colours(settings)
    for text, colour in zip(titles, colours if len(settings) > 1 else [_INK], strict=True):
        write(_MARGIN, top, text, _WIDTH - 2 * _MARGIN, size=17, weight="bold", color=colour)
        top += _TITLE
    for text in subtitles:
        write(_MARGIN, top, text, _WIDTH - 2 * _MARGIN, size=10.5, color=_FAINT)
        top += _LINE

    metrics = headline_metrics(comparison)[: _COLUMNS - 1]
    # The tracks of the cost chart need no axis labels, so it takes the whole first share.
    shares = len(metrics) + 1
    width = (_WIDTH - 2 * _MARGIN - len(metrics) * _CHART_GAP) / shares
    _draw_costs(panel(_MARGIN, head, width, charts), comparison["baseline"], settings)
    for index, (task, name) in enumerate(metrics, start=1):
        left = _MARGIN + index * (width + _CHART_GAP)
        axes = panel(left, head, width, charts)
        _draw_accuracy(axes, comparison["baseline"], settings, task, name)

    top = head + charts + _CHART_GAP
    for example, (height, shown) in zip(examples, sizes, strict=True):
        for row in draw_panels(example, (height, shown), metadata):
            for index, cell in enumerate(row):
                left = _MARGIN + index * (column + _GAP)
                write(left, top, cell.caption, column, size=11, weight="bold", color=_INK)
                axes = panel(left + (column - shown) / 2, top + _CAPTION, shown, height)
                axes.imshow(cell.picture, interpolation="nearest", aspect="auto")
                axes.set_axis_off()
            top += _CAPTION + height + _GAP
    figure.savefig(path, dpi=_DPI, format="png")


def _titles(
    comparison: Mapping[str, Any], settings: Sequence[Setting]
) -> tuple[list[str], list[str]]:
    """Lines of what was reached, one for each setting, and lines of what was compared."""
    reductions = [
        (f"{setting.name}: " if len(settings) > 1 else "")
        + summarize_settings(setting.expedited["settings"])
        for setting in settings
    ]
    subject = (
        f"{comparison['model']}: the same weights, no training; "
        f"{comparison['images']} images of {comparison['dataset']}"
    )
    device = f"{comparison['dtype']} on {comparison['device']}"
    titles = [headline(comparison, setting) for setting in settings]
    return titles, [subject, "; ".join([*reductions, device])]


def _draw_costs(axes: Axes, baseline: Mapping[str, Any], settings: Sequence[Setting]) -> None:
    """What remains of the baseline's multiply-adds and latency: four groups of bars."""
    sides = [baseline, *(setting.expedited for setting in settings)]
    rows = [
        (f"{part} {word}", [read(side, part) for side in sides])
        for word, read in (
            ("GFLOPs", lambda side, part: side["gflops"][part]),
            ("latency, ms", lambda side, part: side["latency_ms"][part]["median"]),
        )
        for part in ("backbone", "model")
    ]
    # A label takes as much as a bar and a half; between the groups is a half.
    step = 1 / (len(settings) + 2)
    for y, (label, (before, *after)) in enumerate(rows):
        if not before or None in after:
            continue
        first = y + 1.5 * step
        change = f"{format_number(before, 4)} → {', '.join(format_number(a, 4) for a in after)}"
        written = [
            axes.text(x, first - 0.1 * step, text, size=10, color=_INK, va="bottom", ha=side)
            for x, text, side in ((0, label, "left"), (1, change, "right"))
        ]
        length = sum(text.get_window_extent().width for text in written) + _GAP
        for text in written:
            text.set_fontsize(10 * min(1.0, axes.get_window_extent().width / length))
        for index, (value, colour) in enumerate(zip(after, _colours(settings), strict=True)):
            middle, share = first + (index + 0.5) * step, value / before
            axes.barh(middle, 1.0, height=0.86 * step, color=_TRACK)
            axes.barh(middle, min(share, 1.0), height=0.86 * step, color=colour)
            axes.text(
                min(share, 1.0) - 0.02, middle, f"{100 * share:.0f} %",
                size=9.5, color="white", weight="bold", va="center", ha="right",
            )  # fmt: skip
    axes.set_xlim(0, 1)
    axes.set_ylim(len(rows) - 0.5 * step, 0)
    axes.set_axis_off()
    axes.set_title("cost, share of the baseline", loc="left", size=11, weight="bold", color=_INK)


def _draw_accuracy(
    axes: Axes, baseline: Mapping[str, Any], settings: Sequence[Setting], task: str, name: str
) -> None:
    """Accuracy against latency: arrows from the baseline on, from one setting to the next."""
    colours = [_BASELINE, *_colours(settings)]
    points, words = [], []
    for title, side in ((BASELINE, baseline), *((s.name, s.expedited) for s in settings)):
        value = side["metrics"].get(task, {}).get(name)
        points.append((side["latency_ms"]["model"]["median"], 0.0 if value is None else value))
        words.append(f"{title} {format_number(points[-1][1], 3)}")
    for start, end in itertools.pairwise(points):
        axes.annotate(
            "", end, start,
            arrowprops={
                "arrowstyle": "-|>,head_width=0.3,head_length=0.6", "color": _FAINT,
                "linewidth": 1.4, "shrinkA": 7, "shrinkB": 7,
            },
        )  # fmt: skip
    for (x, y), colour in zip(points, colours, strict=True):
        axes.scatter([x], [y], s=90, color=colour, zorder=3, edgecolor="white", linewidth=1.2)
    xs, ys = zip(*points, strict=True)
    # A tenth of the value around the points: a loss of a few per cent is seen, and not blown up.
    room = max(0.10 * max(ys), 0.6 * (max(ys) - min(ys))) or 0.5
    axes.set_ylim(min(ys) - room, max(ys) + room)
    side_room = max(0.8 * (max(xs) - min(xs)), 0.06 * max(xs))
    axes.set_xlim(min(xs) - side_room, max(xs) + side_room)
    _label_points(axes, points, words, colours)
    axes.set_title(metric_title(task), loc="left", size=11, weight="bold", color=_INK)
    axes.set_xlabel("model latency, ms per image (median)", size=9.5, color=_FAINT)
    axes.grid(color="#eef1f4", linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_FAINT, labelsize=9, length=0)
    axes.locator_params(nbins=5)
    for spine in ("top", "right", "left", "bottom"):
        axes.spines[spine].set_visible(spine == "bottom")
        axes.spines[spine].set_color(_TRACK)


def _label_points(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    words: Sequence[str],
    colours: Sequence[str],
) -> None:
    """Write a label beside each point, clear of the arrows from one to the next."""
    texts = [
        axes.text(0, 0, text, size=10.5, weight="bold", color=colour, ha="center", va="center")
        for text, colour in zip(words, colours, strict=True)
    ]
    extents = [text.get_window_extent() for text in texts]
    places = [(float(x), float(y)) for x, y in axes.transData.transform(points)]
    arrows = [
        box(x0 + part / 20 * (x1 - x0), y0 + part / 20 * (y1 - y0), 6, 6)
        for (x0, y0), (x1, y1) in itertools.pairwise(places)
        for part in range(21)
    ]
    sizes = [(extent.width, extent.height) for extent in extents]
    frame = axes.get_window_extent()
    bounds = (frame.x0, frame.y0, frame.x1, frame.y1)
    found = place_labels(places, sizes, 8, bounds, arrows)
    for text, (left, bottom, right, top) in zip(texts, found, strict=True):
        centre = ((left + right) / 2, (bottom + top) / 2)
        x, y = axes.transData.inverted().transform(centre)
        text.set_position((float(x), float(y)))


def _colours(settings: Sequence[Setting]) -> list[str]:
    return [_COLOURS[number % len(_COLOURS)] for number in range(len(settings))]

"""Accuracy against latency of many systems as one SVG, each relative to its own baseline."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from expedite_d2.d2.comparison.labels import Box, box, place_labels

__all__ = ["SHAPES", "Point", "draw_marker", "draw_scatter"]

# Shares of one; the paper's claim is that this much of the accuracy is kept.
KEPT = 0.98

_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 18, 34, 50
_FONT = 13
# Mean width of a character of a proportional sans-serif font, as a share of its size.
_CHARACTER = 0.64
_RADIUS = 6.5
_STEPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)

# Corners of the markers in units of their radius; a system is told by shape as well as by colour.
# None is a circle.
SHAPES: tuple[tuple[tuple[float, float], ...] | None, ...] = (
    None,
    ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    ((0, -1.2), (1.15, 0.85), (-1.15, 0.85)),
    ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
    ((0, 1.2), (1.15, -0.85), (-1.15, -0.85)),
    tuple(
        (1.2 * math.sin(2 * math.pi * k / 5), -1.2 * math.cos(2 * math.pi * k / 5))
        for k in range(5)
    ),
)


@dataclass(frozen=True)
class Point:
    """What is drawn of one setting of a system.

    Attributes:
        style: The system's number; chooses shape and colour.
        latency: Model latency, expedited / baseline.
        kept: (label, share of the accuracy kept), one for each task.
        further: Whether the setting is not the system's first: its marks are outlines.
    """

    style: int
    latency: float
    kept: Sequence[tuple[str, float]]
    further: bool = False


def draw_scatter(points: Sequence[Point], width: int, height: int, name: str) -> str:
    """Draw one mark for each metric of each setting, and the one of all baselines.

    Colours are the custom properties and classes of the page's style sheet.

    Args:
        points: In the order of the table.
        width: Of the view box; text is 13 units high, so this is best the width on the screen.
        height: Of the view box.
        name: What the picture is called for those who do not see it.

    Returns:
        An ``<svg>`` element.
    """
    xs = [1.0, *(point.latency for point in points)]
    ys = [KEPT, 1.0, *(share for point in points for _, share in point.kept)]
    across = _Axis.around(xs, _LEFT, width - _RIGHT, wanted=max(4, width // 120))
    up = _Axis.around(ys, height - _BOTTOM, _TOP, wanted=max(4, height // 70))
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(name)}">',
        *_draw_frame(across, up, width, height),
    ]
    markers = []
    labels: list[tuple[str, str, float, float]] = [("faint", "baselines", across(1), up(1))]
    for point in points:
        x = across(point.latency)
        heights = [up(share) for _, share in point.kept]
        style = f"s{point.style % len(SHAPES)}"
        if len(heights) > 1:
            ends = f'y1="{min(heights):.1f}" y2="{max(heights):.1f}"'
            parts.append(f'<line class="stem {style}" x1="{x:.1f}" x2="{x:.1f}" {ends}/>')
        for (label, _), y in zip(point.kept, heights, strict=True):
            markers.append(draw_marker(point.style, x, y, point.further))
            labels.append((style, label, x, y))
    parts.append(f'<circle class="origin" cx="{across(1):.1f}" cy="{up(1):.1f}" r="{_RADIUS}"/>')
    parts += markers
    goal = box(width - _RIGHT - 40, up(KEPT) + 11, 80, _FONT)
    parts += _draw_labels(labels, (_LEFT, _TOP - 12, width, height - _BOTTOM), goal)
    return "\n".join([*parts, "</svg>"])


def draw_marker(style: int, x: float, y: float, outline: bool = False) -> str:
    """The SVG element that stands for a system at a point."""
    index = style % len(SHAPES)
    corners = SHAPES[index]
    kind = f"mark outline s{index}" if outline else f"mark s{index}"
    if corners is None:
        return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{_RADIUS}"/>'
    ends = " ".join(f"{x + _RADIUS * dx:.1f},{y + _RADIUS * dy:.1f}" for dx, dy in corners)
    return f'<polygon class="{kind}" points="{ends}"/>'


@dataclass(frozen=True)
class _Axis:
    """Map of values to coordinates of the picture, with its round values."""

    low: float
    high: float
    start: float
    stop: float
    step: float

    @classmethod
    def around(cls, values: Sequence[float], start: float, stop: float, wanted: int) -> _Axis:
        """An axis that holds these values, with about so many round ones."""
        span = max(max(values) - min(values), 0.02)
        step = next((s for s in _STEPS if span / s <= wanted), _STEPS[-1])
        low = math.floor(min(values) / step - 0.4) * step
        high = math.ceil(max(values) / step + 0.4) * step
        return cls(low, high, start, stop, step)

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> Iterator[tuple[float, str]]:
        """Coordinates and per cent of the round values."""
        digits = 1 if self.step < 0.01 else 0
        for number in range(round(self.low / self.step), round(self.high / self.step) + 1):
            value = number * self.step
            yield self(value), f"{100 * value:.{digits}f}"


def _draw_frame(across: _Axis, up: _Axis, width: int, height: int) -> Iterator[str]:
    left, right, top, bottom = _LEFT, width - _RIGHT, _TOP, height - _BOTTOM
    for x, text in across.ticks():
        yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>'
        yield f'<text class="tick" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{text}</text>'
    for y, text in up.ticks():
        yield f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="tick" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    y = up(KEPT)
    yield f'<line class="goal" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
    yield (
        f'<text class="goal" x="{right - 4}" y="{y + 15:.1f}" text-anchor="end">'
        f"{100 * KEPT:.0f} % kept</text>"
    )
    yield '<text class="axis" x="4" y="16">accuracy kept, % of the baseline</text>'
    yield (
        f'<text class="axis" x="{right}" y="{height - 10}" text-anchor="end">'
        "model latency, % of the baseline</text>"
    )
    yield f'<text class="axis" x="{left}" y="{height - 10}">← faster</text>'


def _draw_labels(
    labels: Sequence[tuple[str, str, float, float]], bounds: Box, goal: Box
) -> Iterator[str]:
    points = [(x, y) for _, _, x, y in labels]
    sizes = [(_CHARACTER * _FONT * len(text), _FONT) for _, text, _, _ in labels]
    places = place_labels(points, sizes, _RADIUS, bounds, [goal])
    for (style, text, _, _), place in zip(labels, places, strict=True):
        yield (
            f'<text class="label {style}" x="{(place[0] + place[2]) / 2:.1f}" '
            f'y="{place[3] - 2:.1f}" text-anchor="middle">{escape(text)}</text>'
        )

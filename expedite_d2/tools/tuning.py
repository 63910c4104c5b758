"""What tuning measured, and which settings are the best of it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from expedite_d2.errors import needs_extra
from expedite_d2.files import replacing
from expedite_d2.reducers import Cluster, Merge, Reduction
from expedite_d2.tools.budget import BUDGET
from expedite_d2.tools.latency import Latency

# How the name of a plot may end.
_PICTURES = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class Row:
    """One settings, and what was measured with them.

    Attributes:
        reduction: the settings.
        share: the share of the encoder's multiply-adds that they leave.
        error: relative distance (L2) of the model's outputs to the plain model's, mean over images.
        latency: milliseconds of the whole model.
        plain: milliseconds of the plain model, measured in turn with it.
    """

    reduction: Reduction
    share: float
    error: float
    latency: Latency
    plain: Latency

    @property
    def speedup(self) -> float:
        """How many times as fast as the plain model: the ratio of the medians."""
        return self.plain.median / self.latency.median

    @property
    def kind(self) -> str:
        """How tokens are reduced, in one word or two."""
        first = self.reduction.steps[0]
        if isinstance(first, Cluster):
            return "clusters"
        return "merges and groups" if getattr(first, "rounds", 0) else "merges"


@dataclass(frozen=True)
class Tuning:
    """The outcome of `tune`; its text is a table.

    Attributes:
        model: name of the model's class.
        device: where the latencies were measured.
        rows: what was measured.
        budget: largest share of the multiply-adds that the best settings may leave; None for 0.7,
            if there is no `max_error` either.
        max_error: largest error that the best settings may have, or None.
    """

    model: str
    device: str
    rows: tuple[Row, ...]
    budget: float | None = None
    max_error: float | None = None

    @property
    def row(self) -> Row:
        """The row of the best settings.

        Raises:
            ValueError: see `best`.
        """
        if self.max_error is not None:
            near = [row for row in self.rows if row.error <= self.max_error]
            if not near:
                least = min(row.error for row in self.rows)
                raise ValueError(
                    f"max_error must be at least {least:.4g}, the least of the settings that were "
                    f"tried, got {self.max_error}"
                )
            return min(near, key=lambda row: row.latency.median / row.plain.median)
        most = BUDGET if self.budget is None else self.budget
        cheap = [row for row in self.rows if row.share <= most]
        if not cheap:
            least = min(row.share for row in self.rows)
            raise ValueError(
                f"budget must be at least {least:.3f}, the least share of the settings that were "
                f"tried, got {most}"
            )
        return min(cheap, key=lambda row: row.error)

    @property
    def best(self) -> Reduction:
        """The settings of the least error within the budget, or the fastest within `max_error`.

        Raises:
            ValueError: there are none; the message has the least that there are.
        """
        return self.row.reduction

    @property
    def front(self) -> tuple[Row, ...]:
        """The rows for which no other is both faster and nearer, the fastest first."""
        rows = sorted(self.rows, key=lambda row: (-row.speedup, row.error))
        front: list[Row] = []
        for row in rows:
            if not front or row.error < front[-1].error:
                front.append(row)
        return tuple(front)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the best settings to a YAML file, with their tensors beside it.

        `Reduction.load` reads it, as does the config key `MODEL.EXPEDITE.SETTINGS`.

        Raises:
            ValueError: see `best`.
        """
        self.best.save(path)

    def plot(self, path: str | PathLike[str]) -> None:
        """Draws error against speed-up, with the front, to a PNG, PDF or SVG.

        A ring is around the best settings, if any are good enough.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: the file's name ends in something else.
        """
        check_picture(path)
        with needs_extra("tune"):
            from matplotlib.figure import Figure
        figure: Any = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        kinds = sorted({row.kind for row in self.rows})
        for number, kind in enumerate(kinds):
            rows = [row for row in self.rows if row.kind == kind]
            axes.scatter(*_places(rows), color=f"C{number}", label=kind, zorder=3)
        for row in self.front:  # those of all settings would lie on one another
            text, place = f"{100 * row.share:.0f} %", (row.speedup, 100 * row.error)
            axes.annotate(text, place, xytext=(6, -10), textcoords="offset points", fontsize=8)
        axes.plot(*_places(self.front), color="0.7", zorder=1, label="front")
        with suppress(ValueError):  # none is good enough
            ring = {"facecolors": "none", "edgecolors": "black", "label": "best"}
            axes.scatter(*_places([self.row]), s=160, zorder=4, **ring)
        axes.axvline(1, color="0.85", zorder=0)
        axes.set_xlabel(f"times as fast as the plain {self.model}, on {self.device}")
        axes.set_ylabel("error: distance of the outputs to the plain model's, %")
        axes.margins(x=0.08)
        axes.set_ylim(bottom=0)
        axes.set_title("beside the front: share of the encoder's multiply-adds left", fontsize=9)
        axes.legend()
        with replacing(path) as partial:
            figure.savefig(partial, dpi=120)

    def __str__(self) -> str:
        best: Row | None = None
        with suppress(ValueError):  # none is good enough
            best = self.row
        cells = [("", "settings", "multiply-adds", "error", "ms", "plain ms", "speed-up")]
        for row in sorted(self.rows, key=lambda row: -row.share):
            cells.append(
                (
                    "*" if row is best else "",
                    in_words(row.reduction),
                    f"{100 * row.share:.1f} %",
                    f"{100 * row.error:.2f} %",
                    f"{row.latency.median:.4g}",
                    f"{row.plain.median:.4g}",
                    f"{row.speedup:.2f}",
                )
            )
        return f"{self.model} on {self.device}, * is the best\n" + _table(cells)


def check_picture(path: str | PathLike[str]) -> None:
    """Raises a ValueError for a file name that does not end as a picture's."""
    if Path(path).suffix.lower() not in _PICTURES:
        raise ValueError(f"the plot's name must end in {', '.join(_PICTURES)}, got {path}")


def in_words(reduction: Reduction) -> str:
    """Returns settings in a few words."""
    first = reduction.steps[0]
    maps = ", detail map" if reduction.correction is not None else ""
    if isinstance(first, Cluster):
        side = "x".join(f"{part:g}" for part in first.grid)
        return f"clusters {side} from block {first.at}{maps}"
    merges = [step for step in reduction.steps if isinstance(step, Merge)]
    places = ", ".join(str(step.at) for step in merges)
    rounds = max(step.rounds for step in merges)
    groups = f", groups of {2**rounds}" if rounds else ""
    return f"merges before {places}, keep {merges[0].keep:g}{groups}{maps}"


def _places(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    return [row.speedup for row in rows], [100 * row.error for row in rows]


def _table(cells: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = []
    for line in cells:
        left = [text.ljust(width) for text, width in zip(line[:2], widths[:2], strict=True)]
        right = [text.rjust(width) for text, width in zip(line[2:], widths[2:], strict=True)]
        lines.append("  ".join([*left, *right]).rstrip())
    return "\n".join(lines)

"""The plots of docs/performance.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402 (after the choice of backend)
from matplotlib.figure import Figure  # noqa: E402

from benchmarks.systems import TITLES  # noqa: E402
from expedite_d2.files import replacing  # noqa: E402

Row = Mapping[str, Any]

_WHOLE = "all four"
_VARIANTS = ("released", "reference", "compiled", "kernel", "floor")
# Points that lie on one another are seen both: the one is a ring around the other.
_MODES: dict[str, dict[str, Any]] = {
    "eager": {"alpha": 0.8},
    "compiled": {"fillstyle": "none", "markersize": 10},
}
_DPI = 120


def operators(rows: Sequence[Row]) -> Figure | None:
    """Milliseconds of all four operators in sequence, by case; one panel per type."""
    rows = [row for row in rows if row["operator"] == _WHOLE]
    if not rows:
        return None
    dtypes = sorted({row["dtype"] for row in rows})
    cases = list(dict.fromkeys(row["case"] for row in rows))
    measured = {"floor"}.union(*(row["variants"] for row in rows))
    variants = [name for name in _VARIANTS if name in measured]
    width = 0.8 / len(variants)
    figure, panels = plt.subplots(
        1, len(dtypes), figsize=(6.5 * len(dtypes), 4), sharey=True, squeeze=False
    )
    for panel, dtype in zip(panels[0], dtypes, strict=True):
        found = {row["case"]: row for row in rows if row["dtype"] == dtype}
        for place, variant in enumerate(variants):
            values = [_milliseconds(found.get(case), variant) for case in cases]
            x = np.arange(len(cases)) + width * (place - (len(variants) - 1) / 2)
            panel.bar(x, values, width, label=variant, color=f"C{_VARIANTS.index(variant)}")
        panel.set_yscale("log")
        panel.set_xticks(range(len(cases)), cases, rotation=30, ha="right")
        panel.set_title(f"spread, cluster, match and reconstruct, {dtype}")
    panels[0][0].set_ylabel("milliseconds")
    panels[0][-1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _milliseconds(row: Row | None, variant: str) -> float:
    if row is None:
        return np.nan
    if variant == "floor":
        return row["floor_ms"]
    return row["variants"].get(variant, {}).get("median", np.nan)


def models(rows: Sequence[Row]) -> Figure | None:
    """Speed-up over the ratio of multiply-adds: what is spared is felt on the diagonal."""
    figure, panel = plt.subplots(figsize=(6.5, 5))
    dtypes = sorted({row["dtype"] for row in rows})
    modes = [mode for mode in _MODES if any(row["mode"] == mode for row in rows)]
    batches = sorted({row["batch"] for row in rows})
    markers = "osD^v*"
    for row in rows:
        panel.plot(
            row["ratio_of_multiplyadds"],
            row["speedup"],
            markers[batches.index(row["batch"]) % len(markers)],
            color=f"C{dtypes.index(row['dtype'])}",
            **_MODES[row["mode"]],
        )
    for number, dtype in enumerate(dtypes):
        for mode in modes:
            look: dict[str, Any] = {"color": f"C{number}", **_MODES[mode]}
            panel.plot([], [], "o", label=f"{dtype}, {mode}", **look)
    for place, batch in enumerate(batches):
        panel.plot([], [], markers[place % len(markers)], color="0.5", label=f"batch {batch}")
    ends = [1.0, 1.05 * max(max(r["ratio_of_multiplyadds"], r["speedup"]) for r in rows)]
    panel.plot(ends, ends, "--", color="0.6", label="efficiency 1")
    panel.set_xlabel("ratio of multiply-adds, baseline / expedited")
    panel.set_ylabel("measured speed-up")
    panel.legend()
    return figure


def competitors(rows: Sequence[Row]) -> Figure:
    """Speed-up of each method, by system and arithmetic."""
    most = sorted(rows, key=lambda row: -len(row["methods"]))
    named = dict.fromkeys(name for row in most for name in row["methods"])
    names = [name for name in named if name != "baseline"]
    height = 0.8 / len(names)
    labels = [f"{TITLES[r['system']]}\n{r['dtype']}, batch {r['batch']}" for r in rows]
    figure, panel = plt.subplots(figsize=(9, 1.2 + 1.1 * len(rows)))
    for line, row in enumerate(rows):
        found = [name for name in names if name in row["methods"]]
        for place, name in enumerate(found):
            y = line + height * (place - (len(found) - 1) / 2)
            speedup = row["methods"][name]["speedup"]
            panel.barh(y, speedup, height, color=f"C{names.index(name)}")
    for number, name in enumerate(names):
        panel.barh(0, 0, color=f"C{number}", label=name)
    panel.axvline(1, color="0.6", linestyle="--")
    panel.set_yticks(range(len(rows)), labels)
    panel.invert_yaxis()
    panel.set_xlabel("speed-up of the backbone at equal multiply-adds")
    panel.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a plot, whole or not at all."""
    figure.tight_layout()
    with replacing(path) as partial:
        figure.savefig(partial, dpi=_DPI)
    plt.close(figure)

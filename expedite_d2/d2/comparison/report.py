"""The comparison of a baseline with its expedited selves, as JSON, Markdown and text."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from expedite_d2.d2.comparison.settings import BASELINE, EXPEDITED, describe_settings
from expedite_d2.d2.evaluation.evaluator import Results, format_number
from expedite_d2.tools.latency import Latency

__all__ = [
    "Measurement",
    "Setting",
    "Subject",
    "build_comparison",
    "comparison_rows",
    "comparison_table",
    "describe_build",
    "headline",
    "headline_metrics",
    "is_error",
    "markdown",
    "metric_title",
    "settings_of",
    "to_json",
]

_PARTS = ("backbone", "model")
# The one metric that a task is judged by.
_HEADLINES = {
    "panoptic_seg": "PQ",
    "sem_seg": "mIoU",
    "segm": "AP",
    "bbox": "AP",
    "depth": "RMSE",
}
_ERRORS = frozenset({"RMSE", "RMSE_log", "AbsRel", "SqRel", "SILog"})
_TITLES = {
    "panoptic_seg": "panoptic PQ",
    "sem_seg": "semantic mIoU",
    "segm": "mask AP",
    "bbox": "box AP",
    "depth": "depth RMSE, m",
}


@dataclass(frozen=True)
class Subject:
    """What was compared, and on what.

    Attributes:
        model: Architecture in words.
        dataset: Name in the catalogs.
        images: How many were evaluated.
        device: Hardware in words.
        dtype: Arithmetic of the forward pass, as in ``TEST.DTYPE``.
        torch: Version.
        extension: Build information of the extension.
    """

    model: str
    dataset: str
    images: int
    device: str
    dtype: str
    torch: str
    extension: Mapping[str, Any]


@dataclass(frozen=True)
class Measurement:
    """What one model cost and reached, over all images and ranks.

    Attributes:
        metrics: {task: {metric: value}}.
        gflops: Billions of multiply-adds of every image, "backbone" and "model".
        latency_ms: Milliseconds of every image, "backbone" and "model".
        peak_memory_mb: Largest of all images; None where it cannot be measured.
        settings: What ``expedite_settings`` tells of it; None of the baseline.
    """

    metrics: Results
    gflops: Mapping[str, Sequence[float]]
    latency_ms: Mapping[str, Sequence[float]]
    peak_memory_mb: float | None
    settings: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Setting:
    """One setting beside the baseline, as ``comparison.json`` has it.

    Attributes:
        name: "expedited" for the config's own, or what is told of the config of a further one.
        expedited: What the model cost and reached with it, and the settings themselves.
        ratio: Expedited / baseline; of latencies baseline / expedited.
    """

    name: str
    expedited: Mapping[str, Any]
    ratio: Mapping[str, Any]

    def kept(self, task: str, name: str) -> float | None:
        """How much of the baseline's accuracy is kept; 1 is all of it.

        For an error, of which less is better, it is one less the error's relative increase, so that
        98 % of any accuracy and 102 % of any error are the same share.
        """
        ratio = self.ratio["metrics"][task][name]
        return ratio if ratio is None or not is_error(name) else 2.0 - ratio


def build_comparison(subject: Subject, runs: Mapping[str, Measurement]) -> dict[str, Any]:
    """Assemble what ``comparison.json`` holds.

    Args:
        subject: What was compared.
        runs: By name "baseline", "expedited", and those of further settings.

    Returns:
        A dict of plain Python values; whatever is undefined (not a number, a ratio to zero) is
        None. Speed-ups are ratios of the median latencies, the other ratios are
        expedited / baseline. "further", where there are further settings, is a list with "name",
        "expedited" and "ratio" of each.
    """
    sides = {name: _side(measured) for name, measured in runs.items()}
    baseline = sides.pop(BASELINE)
    ratios = {name: _ratios(baseline, side) for name, side in sides.items()}
    comparison = {
        **asdict(subject),
        "baseline": baseline,
        "expedited": sides[EXPEDITED],
        "ratio": ratios[EXPEDITED],
    }
    further = [
        {"name": name, "expedited": side, "ratio": ratios[name]}
        for name, side in sides.items()
        if name != EXPEDITED
    ]
    return _finite(comparison | ({"further": further} if further else {}))


def settings_of(comparison: Mapping[str, Any]) -> list[Setting]:
    """All settings of a comparison, the config's own first."""
    own = Setting(EXPEDITED, comparison["expedited"], comparison["ratio"])
    return [own, *(Setting(**entry) for entry in comparison.get("further", ()))]


def headline_metrics(comparison: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The (task, metric) that each task is judged by, of those that were measured."""
    metrics = comparison["baseline"]["metrics"]
    return [
        (task, name)
        for task, name in _HEADLINES.items()
        if metrics.get(task, {}).get(name) is not None
    ]


def is_error(name: str) -> bool:
    """Whether less of a metric is better."""
    return name in _ERRORS


def metric_title(task: str) -> str:
    """What a task is judged by, in words, with its unit where it has one."""
    return _TITLES[task]


def headline(comparison: Mapping[str, Any], setting: Setting) -> str:
    """What was gained and kept with a setting, in one line; its name where there are several."""
    found = ", ".join(_claims(comparison, setting)) or f"{BASELINE} and {setting.name}"
    return f"{setting.name}: {found}" if "further" in comparison else found


def _claims(comparison: Mapping[str, Any], setting: Setting) -> list[str]:
    """A few words each; only what was measured."""
    ratio = setting.ratio
    found = []
    if ratio["gflops_backbone"] is not None:
        found.append(f"{100 * (1 - ratio['gflops_backbone']):.0f} % fewer backbone GFLOPs")
    if ratio["speedup_model"] is not None:
        found.append(f"model {ratio['speedup_model']:.2f}x as fast")
    for task, name in headline_metrics(comparison):
        kept = ratio["metrics"][task][name]
        if kept is not None:
            label = "box AP" if task == "bbox" else name
            change = f"{100 * (kept - 1):+.1f} %" if is_error(name) else f"{100 * kept:.1f} % kept"
            found.append(f"{label} {change}")
    return found


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """The numbers as a Markdown table whose columns are aligned, so that it also reads as text."""
    return _aligned(comparison_rows(comparison))


def comparison_rows(comparison: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The numbers as words: a line of titles, then label, baseline, and two for each setting.

    These are the value and the share kept.
    """
    settings = settings_of(comparison)
    sides = [comparison["baseline"], *(setting.expedited for setting in settings)]
    rows = [("", BASELINE, *(title for s in settings for title in (s.name, "kept")))]

    def add(label: str, values: Sequence[float | None], kept: Sequence[str]) -> None:
        first, *others = (format_number(value, 4) for value in values)
        rows.append((label, first, *itertools.chain(*zip(others, kept, strict=True))))

    for part in _PARTS:
        kept = [_percentage(setting.ratio[f"gflops_{part}"]) for setting in settings]
        add(f"{part} GFLOPs", [side["gflops"][part] for side in sides], kept)
    for part in _PARTS:
        kept = [_as_fast(setting.ratio[f"speedup_{part}"]) for setting in settings]
        add(f"{part} latency, ms", [side["latency_ms"][part]["median"] for side in sides], kept)
    memory = [side["peak_memory_mb"] for side in sides]
    if memory[0] is not None:
        kept = [_percentage(_ratio(peak, memory[0])) for peak in memory[1:]]
        add("peak memory, MiB", memory, kept)
    metrics = comparison["baseline"]["metrics"]
    for task in metrics:
        for name in metrics[task]:
            kept = [_percentage(setting.ratio["metrics"][task][name]) for setting in settings]
            values = [side["metrics"].get(task, {}).get(name) for side in sides]
            add(_label(task, name, metrics), values, kept)
    return rows


def markdown(comparison: Mapping[str, Any], weights: str, command: str) -> str:
    """The text of ``comparison.md``: the table, then how to read it and how it was made.

    Args:
        comparison: What ``build_comparison`` returned.
        weights: The checkpoint, or "" for random weights.
        command: The command line that made it.
    """
    settings = settings_of(comparison)
    listed = "\n".join(
        f"- {setting.name}: "
        + ", ".join(" ".join(pair) for pair in describe_settings(setting.expedited["settings"]))
        for setting in settings
    )
    sides = [(BASELINE, comparison["baseline"]), *((s.name, s.expedited) for s in settings)]
    spread = "; ".join(
        f"{name} {part} {format_number(times['min'], 4)} to {format_number(times['max'], 4)}"
        for name, side in sides
        for part, times in side["latency_ms"].items()
    )
    return f"""# {comparison["model"]} on {comparison["dataset"]}

{comparison_table(comparison)}

All models share their weights and saw the same {comparison["images"]} images in turn, one image
at a time. GFLOPs are billions of multiply-adds, the mean over the images. Latency is the median
after warm-up; "kept" is the share of the baseline's value.

{listed}
- weights: {weights or "random"}
- device: {comparison["device"]}
- dtype: {comparison["dtype"]}
- torch: {comparison["torch"]}
- extension: {describe_build(comparison)}
- latency, ms, fastest to slowest image: {spread}

```
{command}
```
"""


def describe_build(comparison: Mapping[str, Any]) -> str:
    """Returns build information of the extension, in one line."""
    extension = comparison["extension"]
    return ", ".join(f"{k} {_inline(v)}" for k, v in extension.items() if v) or "not built"


def to_json(comparison: Mapping[str, Any]) -> str:
    """The text of ``comparison.json``; strict JSON."""
    return json.dumps(comparison, indent=2, allow_nan=False) + "\n"


def _side(measured: Measurement) -> dict[str, Any]:
    latency = {part: asdict(Latency.of(times)) for part, times in measured.latency_ms.items()}
    side = {
        "metrics": {task: dict(metrics) for task, metrics in measured.metrics.items()},
        "gflops": {part: _mean(values) for part, values in measured.gflops.items()},
        "latency_ms": latency,
        "fps": {part: _ratio(1e3, times["median"]) for part, times in latency.items()},
        "peak_memory_mb": measured.peak_memory_mb,
    }
    return side if measured.settings is None else side | {"settings": dict(measured.settings)}


def _ratios(baseline: Mapping[str, Any], expedited: Mapping[str, Any]) -> dict[str, Any]:
    ratios: dict[str, Any] = {}
    for part in _PARTS:
        ratios[f"gflops_{part}"] = _ratio(*(side["gflops"][part] for side in (expedited, baseline)))
    for part in _PARTS:
        medians = (side["latency_ms"][part]["median"] for side in (baseline, expedited))
        ratios[f"speedup_{part}"] = _ratio(*medians)
    ratios["metrics"] = {
        task: {
            name: _ratio(expedited["metrics"].get(task, {}).get(name), value)
            for name, value in metrics.items()
        }
        for task, metrics in baseline["metrics"].items()
    }
    return ratios


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return None if numerator is None or not denominator else numerator / denominator


def _finite(value: Any) -> Any:
    """Copy a JSON tree; numbers that JSON does not know become None, NumPy's become Python's."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _label(task: str, name: str, metrics: Mapping[str, Any]) -> str:
    """A metric's own name, with its task where two tasks use the same one (mask and box AP)."""
    shared = sum(name in others for others in metrics.values()) > 1
    kind = {"segm": "mask", "bbox": "box"}.get(task, task)
    label = f"{kind} {name}" if shared or task in ("segm", "bbox") else name
    return f"{label} (error)" if is_error(name) else label


def _percentage(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _as_fast(speedup: float | None) -> str:
    return "-" if speedup is None else f"{speedup:.2f}x as fast"


def _inline(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        [row[0].ljust(widths[0]), *(v.rjust(w) for v, w in zip(row[1:], widths[1:], strict=True))]
        for row in rows
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (lines[0], rule, *lines[1:]))

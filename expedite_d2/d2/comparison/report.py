"""The comparison of a baseline with its expedited self, as JSON, Markdown and text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from expedite_d2.d2.evaluation.evaluator import Results, format_number
from expedite_d2.tools.latency import Latency

__all__ = [
    "Measurement",
    "Subject",
    "build_comparison",
    "claims",
    "comparison_rows",
    "comparison_table",
    "describe_build",
    "describe_settings",
    "headline_metrics",
    "is_error",
    "markdown",
    "metric_title",
    "share_kept",
    "to_json",
]

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
    """

    metrics: Results
    gflops: Mapping[str, Sequence[float]]
    latency_ms: Mapping[str, Sequence[float]]
    peak_memory_mb: float | None


def build_comparison(
    subject: Subject,
    baseline: Measurement,
    expedited: Measurement,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Assemble what ``comparison.json`` holds.

    Args:
        subject: What was compared.
        baseline: The plain model.
        expedited: The model with its tokens clustered.
        settings: Its reduction: alpha, clusters and so on.

    Returns:
        A dict of plain Python values; whatever is undefined (not a number, a ratio to zero) is
        None. Speed-ups are ratios of the median latencies, the other ratios are
        expedited / baseline.
    """
    sides = {"baseline": _side(baseline), "expedited": _side(expedited)}
    first, second = sides["baseline"], sides["expedited"]
    ratio: dict[str, Any] = {
        f"gflops_{part}": _ratio(second["gflops"][part], first["gflops"][part])
        for part in ("backbone", "model")
    }
    for part in ("backbone", "model"):
        medians = [side["latency_ms"][part]["median"] for side in (first, second)]
        ratio[f"speedup_{part}"] = _ratio(*medians)
    ratio["metrics"] = {
        task: {
            name: _ratio(second["metrics"].get(task, {}).get(name), value)
            for name, value in metrics.items()
        }
        for task, metrics in first["metrics"].items()
    }
    second["settings"] = dict(settings)
    return _finite({**asdict(subject), **sides, "ratio": ratio})


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


def share_kept(comparison: Mapping[str, Any], task: str, name: str) -> float | None:
    """How much of the baseline's accuracy the expedited model keeps; 1 is all of it.

    For an error, of which less is better, it is one less the error's relative increase, so that
    98 % of any accuracy and 102 % of any error are the same share.
    """
    ratio = comparison["ratio"]["metrics"][task][name]
    return ratio if ratio is None or not is_error(name) else 2.0 - ratio


def claims(comparison: Mapping[str, Any]) -> list[str]:
    """What was gained and what was kept, in a few words each; only what was measured."""
    ratio = comparison["ratio"]
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
    """The numbers as words: a line of titles, then label, baseline, expedited and share kept."""
    baseline, expedited, ratio = (comparison[k] for k in ("baseline", "expedited", "ratio"))
    rows: list[tuple[str, ...]] = [("", "baseline", "expedited", "kept")]
    for part in ("backbone", "model"):
        values = [format_number(side["gflops"][part], 4) for side in (baseline, expedited)]
        rows.append((f"{part} GFLOPs", *values, _percentage(ratio[f"gflops_{part}"])))
    for part in ("backbone", "model"):
        values = [
            format_number(side["latency_ms"][part]["median"], 4) for side in (baseline, expedited)
        ]
        speedup = ratio[f"speedup_{part}"]
        speed = "-" if speedup is None else f"{speedup:.2f}x as fast"
        rows.append((f"{part} latency, ms", *values, speed))
    memory = [side["peak_memory_mb"] for side in (baseline, expedited)]
    if memory[0] is not None:
        kept = _percentage(_ratio(memory[1], memory[0]))
        rows.append(("peak memory, MiB", *(format_number(m, 4) for m in memory), kept))
    for task, metrics in baseline["metrics"].items():
        for name, value in metrics.items():
            other = expedited["metrics"].get(task, {}).get(name)
            kept = _percentage(ratio["metrics"][task][name])
            rows.append(
                (
                    _label(task, name, baseline["metrics"]),
                    *(format_number(v, 4) for v in (value, other)),
                    kept,
                )
            )
    return rows


def markdown(comparison: Mapping[str, Any], weights: str, command: str) -> str:
    """The text of ``comparison.md``: the table, then how to read it and how it was made.

    Args:
        comparison: What ``build_comparison`` returned.
        weights: The checkpoint, or "" for random weights.
        command: The command line that made it.
    """
    settings = ", ".join(" ".join(pair) for pair in describe_settings(comparison))
    spread = "; ".join(
        f"{kind} {part} {format_number(times['min'], 4)} to {format_number(times['max'], 4)}"
        for kind in ("baseline", "expedited")
        for part, times in comparison[kind]["latency_ms"].items()
    )
    return f"""# {comparison["model"]} on {comparison["dataset"]}

{comparison_table(comparison)}

Both models share their weights and saw the same {comparison["images"]} images in turn, one image
at a time. GFLOPs are billions of multiply-adds, the mean over the images. Latency is the median
after warm-up; "kept" is expedited / baseline.

- settings: {settings}
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


def describe_settings(comparison: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values of the reduction, as words."""
    settings = comparison["expedited"]["settings"]
    return [(name, _inline(value)) for name, value in settings.items()]


def to_json(comparison: Mapping[str, Any]) -> str:
    """The text of ``comparison.json``; strict JSON."""
    return json.dumps(comparison, indent=2, allow_nan=False) + "\n"


def _side(measured: Measurement) -> dict[str, Any]:
    latency = {part: asdict(Latency.of(times)) for part, times in measured.latency_ms.items()}
    return {
        "metrics": {task: dict(metrics) for task, metrics in measured.metrics.items()},
        "gflops": {part: _mean(values) for part, values in measured.gflops.items()},
        "latency_ms": latency,
        "fps": {part: _ratio(1e3, times["median"]) for part, times in latency.items()},
        "peak_memory_mb": measured.peak_memory_mb,
    }


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

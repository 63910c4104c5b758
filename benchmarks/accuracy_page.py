"""Writes docs/accuracy.md and its plots from benchmarks/results/*-accuracy*.json.

python -m benchmarks.accuracy_page
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from tabulate import tabulate

from benchmarks.accuracy import SYSTEMS, speedup
from benchmarks.common import ROOT
from benchmarks.paired import kept
from expedite_d2.errors import cli
from expedite_d2.files import replacing

Row = Mapping[str, Any]

TITLES = {
    "segmenter": "Segmenter, ViT",
    "dpt": "DPT, ViT",
    "mask2former": "Mask2Former, Swin",
    "htc": "HTC, Swin",
    "panoptic_fpn": "Panoptic FPN, Swin",
    "segmenter_rooms": "Segmenter, ViT, photographs of rooms",
    "dpt_rooms": "DPT, ViT, photographs of rooms",
}
# What is measured against the plain model's outputs.
TO_PLAIN = {
    "distance": "distance to plain, m",
    "relative": "distance to plain, %",
    "agreement": "agreement with plain, %",
}
# Colour and marker of each method, the same in every plot.
STYLES = {
    "clustering": ("tab:blue", "o"),
    "merging": ("tab:green", "s"),
    "grouped attention": ("tab:red", "D"),
    "average pooling": ("tab:gray", "v"),
    "ToMe": ("tab:brown", "^"),
    "resized image": ("black", "x"),
}


def read(files: Iterable[Path]) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, Any]]]:
    """The rows of each part of the benchmark, of two alike the later one, and the runs."""
    runs = [json.loads(file.read_text()) for file in files]
    runs = sorted((run for run in runs if not run["quick"]), key=lambda run: run["date"])
    parts: dict[str, dict[str, dict[str, Any]]] = {"report": {}, "sweep": {}, "latency": {}}
    for run in runs:
        for row in run["results"]:
            parts[run["part"]][_identity(row)] = {**row, "device": run["device"]}
    return {part: list(rows.values()) for part, rows in parts.items()}, runs


def _identity(row: Row) -> str:
    return json.dumps([row["system"], row["method"], row.get("budget"), bool(row.get("maps"))])


def name_of(row: Row) -> str:
    """The method with or without detail maps."""
    return row["method"] + (" + detail map" if row.get("maps") else "")


def results(rows: Sequence[Row], latencies: Mapping[str, Row], system: str) -> str:
    """A table of one system."""
    found = [row for row in rows if row["system"] == system]
    plain = next(row for row in found if row["method"] == "plain")
    clocked = any(_identity(row) in latencies for row in found)
    lines = []
    for row in sorted(found, key=lambda row: -row.get("budget", 1.0)):
        line: dict[str, Any] = {
            "budget, %": f"{100 * row['budget']:.0f}" if "budget" in row else "",
            "method": name_of(row),
            "multiply-adds of the blocks, %": f"{100 * row['share']:.1f}",
        }
        if clocked:
            timed = latencies.get(_identity(row))
            line["encoder's speed-up"] = f"{speedup(timed):.2f}" if timed else ""
        for metric, value in row["metrics"].items():
            share = kept(metric, value, plain["metrics"][metric])
            interval = row.get("intervals", {}).get(metric)
            if share is None:
                line[TO_PLAIN[metric]] = _with_interval(value, interval, _digits(metric))
            else:
                line[metric] = f"{value:.{3 if value < 10 else 2}f}"
                line[f"{metric} kept, %"] = _with_interval(share, interval, 1)
        lines.append(line)
    return tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)


def _digits(metric: str) -> int:
    """How many digits of the nearness to plain are told."""
    return 3 if metric == "distance" else 1


def _with_interval(value: float, interval: Sequence[float] | None, digits: int) -> str:
    """A figure and its interval, where there is one that is not empty, as the plain model's is."""
    if interval is None or interval[0] == interval[1]:
        return f"{value:.{digits}f}"
    low, high = interval
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def swept(rows: Sequence[Row], system: str) -> str:
    """A table of what was chosen from: for each budget the best first.

    That is the nearest to plain where this was measured, as luck moves a metric.
    """
    found = [row for row in rows if row["system"] == system]
    plain = next(row for row in found if row["method"] == "plain")
    metric = SYSTEMS[system].metrics[0][1]

    def share(row: Row) -> float:
        return kept(metric, row["metrics"][metric], plain["metrics"][metric]) or 0.0

    near = [name for name in TO_PLAIN if name in plain["metrics"]]

    def goodness(row: Row) -> float:
        if not near:
            return share(row)
        return row["metrics"][near[-1]] * (1 if near[-1] == "agreement" else -1)

    reduced = [row for row in found if row["method"] != "plain"]
    lines = [
        {
            "budget, %": f"{100 * row['budget']:.0f}",
            "images": row["images"],
            "settings": _words(row["steps"]),
            "detail map": "yes" if row["maps"] else "",
            "multiply-adds of the blocks, %": f"{100 * row['share']:.1f}",
            f"{metric} kept, %": f"{share(row):.1f}",
            **{
                words: f"{row['metrics'][name]:.{_digits(name)}f}"
                for name, words in TO_PLAIN.items()
                if name in row["metrics"]
            },
        }
        for row in sorted(reduced, key=lambda row: (-row["budget"], -goodness(row)))
    ]
    return tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)


def _words(steps: Sequence[str]) -> str:
    """Steps in a few words, from their texts."""
    numbers = [re.findall(r"[\d.]+", step) for step in steps]
    if steps[0].startswith("Cluster"):
        ((at, side, *_),) = numbers
        return f"clusters before block {at}, {float(side):.2f} of the sides"
    at = ", ".join(found[0] for found in numbers)
    _, keep, rounds = numbers[0]
    return f"merges before blocks {at}, keep {keep}" + (
        f", rounds {rounds}" if rounds > "0" else ""
    )


def plot(rows: Sequence[Row], latencies: Mapping[str, Row], system: str, path: Path) -> None:
    """Accuracy kept against multiply-adds; beside it against the encoder's measured latency.

    Where that was not measured, nearness to plain against multiply-adds.
    """
    found = [row for row in rows if row["system"] == system]
    plain = next(row for row in found if row["method"] == "plain")
    metric = SYSTEMS[system].metrics[0][1]
    clocked = any(_identity(row) in latencies for row in found)
    nearness = [name for name in TO_PLAIN if name in plain["metrics"] and not clocked][-1:]
    columns = 1 + clocked + len(nearness)
    figure, grid = plt.subplots(
        1,
        columns,
        figsize=(5.5 * columns, 4.4),
        sharey=clocked,
        layout="constrained",
        squeeze=False,
    )
    panels = grid[0]
    for method, (colour, marker) in STYLES.items():
        for maps in (False, True):
            points = [r for r in found if r["method"] == method and bool(r.get("maps")) is maps]
            points.sort(key=lambda row: row["share"])
            if not points:
                continue
            shares = [
                kept(metric, row["metrics"][metric], plain["metrics"][metric]) for row in points
            ]
            style = {
                "color": colour,
                "marker": marker,
                "linestyle": "--" if maps else "-",
                "fillstyle": "none" if maps else "full",
                "label": name_of(points[0]),
            }
            left = [100 * row["share"] for row in points]
            panels[0].plot(left, shares, **style)
            timed = [latencies.get(_identity(row)) for row in points]
            if clocked and all(timed):
                panels[1].plot([100 / speedup(row) for row in timed if row], shares, **style)
            for name in nearness:
                panels[1].plot(left, [row["metrics"][name] for row in points], **style)
    for panel in panels:
        panel.set_xlabel("multiply-adds of the blocks, % of the plain encoder's")
        panel.grid(alpha=0.2)
    for panel in panels[: 1 + clocked]:
        panel.axhline(99, color="lightgray", zorder=0)
    panels[0].set_ylabel(f"{metric} kept, %")
    if clocked:
        panels[1].set_xlabel("latency of the encoder, % of the plain one's")
    for name in nearness:
        panels[1].set_ylabel(TO_PLAIN[name])
    handles = panels[0].get_legend_handles_labels()[0]
    figure.legend(handles=handles, fontsize=8, ncols=len(handles), loc="outside lower center")
    figure.suptitle(TITLES[system])
    with replacing(path) as partial:
        figure.savefig(partial, dpi=100)
    plt.close(figure)


def page(parts: Mapping[str, Sequence[Row]], runs: Sequence[Row], text: str, folder: Path) -> str:
    """The page: its text, in which {segmenter} and so on stand for the tables."""
    latencies = {_identity(row): row for row in parts["latency"]}
    filled = {}
    for system in SYSTEMS:
        rows = [row for row in parts["report"] if row["system"] == system]
        if rows:
            plot(rows, latencies, system, folder / f"{system}.png")
            images = f"The first {rows[0]['images']} images of `{rows[0]['dataset']}`"
            timed = {row["device"] for row in parts["latency"] if row["system"] == system}
            images += f"; speed-ups on {' and '.join(sorted(timed))}:" if timed else ":"
            picture = f"![{TITLES[system]}]({folder.name}/{system}.png)"
            table = results(parts["report"], latencies, system)
            filled[system] = f"### {TITLES[system]}\n\n{images}\n\n{table}\n\n{picture}"
        else:
            filled[system] = f"### {TITLES[system]}\n\nNot measured yet."
        rows = [row for row in parts["sweep"] if row["system"] == system]
        filled[f"{system}_sweep"] = (
            f"{TITLES[system]}, `{rows[0]['dataset']}`:\n\n{swept(parts['sweep'], system)}"
            if rows
            else ""
        )
    filled["torch"] = " and ".join(sorted({run["torch"] for run in runs}))
    return text.format_map(filled)


@cli
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results", metavar="DIR")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/accuracy.md", metavar="FILE")
    args = parser.parse_args(argv)
    parts, runs = read(args.results.glob("*-accuracy*.json"))
    if not runs:
        raise ValueError(f"--results must hold files of benchmarks.accuracy, got {args.results}")
    folder = args.output.parent / args.output.stem
    folder.mkdir(parents=True, exist_ok=True)
    text = (Path(__file__).parent / "accuracy_page.md").read_text(encoding="utf-8")
    with replacing(args.output) as partial:
        partial.write_text(page(parts, runs, text, folder), encoding="utf-8")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()

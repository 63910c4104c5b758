"""Writes docs/performance.md and its plots from all of benchmarks/results/*.json.

    python -m benchmarks.report

Where several files hold the same measurement on the same device, the latest one counts; of an
operator, the latest one of each rival.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tabulate import tabulate

from benchmarks import others, plots
from benchmarks.common import ROOT
from benchmarks.models import operators_share
from benchmarks.operators import floor
from benchmarks.other_models import OTHERS
from benchmarks.systems import TITLES
from expedite_d2.errors import cli
from expedite_d2.files import replacing

Row = dict[str, Any]

INTRODUCTION = """\
# Performance

This page is written by `python -m benchmarks.report` from the files in `benchmarks/results`: what
is not in a table has not been measured. Each benchmark is one command (`python -m benchmarks.NAME
--help`), `benchmarks/gpu.sh` and `benchmarks/cpu.sh` run them all.

How the numbers come about:

- What is compared runs in alternation in one process. Times are medians of the rounds, the spread
  is that of the fastest and the slowest one, and ratios are medians of the rounds' own ratios. On a
  GPU they are measured with events on the stream, on a CPU with `perf_counter`.
- Before anything is timed its results are compared: operators with their references in float64,
  ours with transformers' Mask2Former, compiled models with the ones that are not.
- The floor of an operator is the time that its bytes (each input read once, each output written
  once) or its multiply-adds alone would take, whichever is longer, at the bandwidth of a copy and
  the rate of a matrix product that the same run measured, in float32 where that is faster than in
  16 bits. Inputs rotate through more than twice the last cache. On a GPU the kernel's time for this
  is that of its replay in a CUDA graph.
- On a CPU `cpu.sh` keeps freed memory in the process and asks for huge pages, for all that is
  compared (see there). Without instructions for bfloat16 products the layers of our models take
  them in float32, transformers' and the operators' rivals in bfloat16.
- Efficiency is the measured speed-up divided by the ratio of the multiply-adds: 1 where every
  multiply-add that is spared is felt. Weights are random, which changes no work.
- "Half" are the settings at half of the blocks' multiply-adds (`configs/**/*_half.yaml`): merging
  with grouped attention on ViTs, 6x6 clusters a window on Swin. "Detail maps" has, beside the
  residual reconstruction, the products of a detail map at every output that the model reads.
- "Operators, % of the baseline" is the time in which the expedited backbone clusters or merges,
  averages over groups and reads what the groups were given, and reconstructs, detail maps
  included: by the profiler in the same run, divided by the baseline's median. What the tokens that
  are left take is not in it.
- "transformers / expedited" divides the two ratios to the baseline.
"""

COMPETITORS = """\
Backbones with random weights. Ours run at the settings that the system's name tells; the others
cost as many multiply-adds, or a little less where their settings have no finer steps: one-shot
clustering, average pooling on the grid of these clusters, token merging (ToMe: as many pairs in
each block), and the plain model on images made smaller, whose features are smaller, too. To resize
the images is not in the time. All are our own implementations and run through the same attention.
"""

OTHER_MODELS = """\
transformers' own classes with random weights, as they come and expedited by one line: `70 %` is
`expedite(model)`, `50 %` is `expedite(model, budget=0.5)`, of the encoder's multiply-adds. Plain
encoders run with PyTorch's fused attention (SDPA), the fastest exact form that these classes have.
In bfloat16 all run in the form that is faster for the plain model, which is named: under autocast,
or the whole model converted. The multiply-adds are those of the part that is timed: of a model with
its heads, which are not reduced. SAM is given one point.

In ONNX Runtime these models run as programs of standard operators (docs/guides/export.md), of SAM
the encoder; their outputs are compared with PyTorch's before they are timed.
"""

TRIED = """\

## Tried, and not built in: fewer queries in Mask2Former's pixel decoder

At half a backbone the pixel decoder bounds the model. In its deformable encoder all tokens stayed
as values, but only representatives of the 1/8 map passed the attention and the MLP, and every token
gained the change of its group. The bar was 99.5 % of PQ and mIoU at 60 % of the pixel decoder's
multiply-adds, and a whole model 1.1 times as fast. It was not met.

- By counting, this encoder has 61 % of the pixel decoder's multiply-adds in the small Mask2Former
  at 384×384, and 66 % in Swin-L's at 1024×1024 (the MLPs alone 49 and 47 %); the 3×3 convolution of
  the 1/4 map, in which queries have no part, has 32 and 27 %. One query for each 2×2 tokens of the
  1/8 map leaves 66 % on both, no queries of that map at all 55 and 54 %.
- On the 64 images of `scenes_tune`, means of 2×2 tokens keep 92.0 % of PQ and 96.1 % of mIoU at
  66 % (94.1 and 96.4 % with each token's own norms), their top left tokens 77.3 and 90.9 %, merging
  in windows or clusters 83 to 89 % of PQ, and 2×2 in the 1/16 map as well 88.8 and 93.8 % at 58 %.
- The MLPs bear groups better than the attention. With the attention in full, groups made of each
  MLP's own input, and a linear map of the tokens' own detail, the three quarters of the 2×2 groups
  that vary least keep 100.1 and 99.8 % at 81 % (first 48 images); the best at 60 % keeps 93.9 and
  97.4 %. On the 200 images of `scenes_val` these two keep 98.8 and 99.4 %, and 91.5 and 96.7 %.
- Whole models gain little: expedited Swin-L at 1024×1024 has 732 G multiply-adds, the pixel decoder
  145 of them; queries for 2×2 tokens leave 683. Its stages, timed in turn in three rounds on two
  shared cores (float32, random weights), add up to 1.05 times the speed (1.04 to 1.07).
"""

# What makes two results the same measurement.
IDENTITY = ("case", "operator", "part", "system", "size", "mode", "dtype", "batch", "maps")

SHARE = "operators, % of the baseline"
EMPTY = "\nNo results have been recorded yet.\n"


def load(files: Iterable[Path]) -> dict[str, dict[str, list[Row]]]:
    """Device -> benchmark -> results, the latest of each measurement, with the run's facts.

    Raises:
        ValueError: a file that no benchmark wrote.
    """
    runs = []
    for file in sorted(files):
        try:
            run = json.loads(file.read_text())
            runs.append((run["date"], run["benchmark"], run["results"], run))
        except (KeyError, TypeError, json.JSONDecodeError):
            raise ValueError(f"{file} is not a result of benchmarks") from None
    latest: dict[tuple[str, str, str], Row] = {}
    for _, benchmark, results, run in sorted(runs, key=lambda one: one[0]):
        facts = {k: v for k, v in run.items() if k not in ("results", "skipped", "benchmark")}
        for row in results:
            what = json.dumps({name: row.get(name) for name in IDENTITY})
            key = (device_of(facts), benchmark, what)
            merged_row = {**row, "run": facts}
            if "variants" in row:  # an operator's rivals may have been timed in several runs
                before = latest.get(key, {}).get("variants", {})
                merged_row["variants"] = {**before, **row["variants"]}
                merged_row |= floor(merged_row, facts)
            latest[key] = merged_row
    merged: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for (device, benchmark, _), row in sorted(latest.items()):
        merged[device][benchmark].append(row)
    return merged


def device_of(facts: Mapping[str, Any]) -> str:
    """The device in words."""
    threads = f", {facts['threads']} threads" if facts["device_type"] == "cpu" else ""
    quick = " (tiny sizes, no measurement)" if facts["quick"] else ""
    return f"{facts['device']}{threads}{quick}"


def table(rows: Sequence[Row], digits: str = ".3g") -> str:
    """A Markdown table, numbers to the right."""
    return tabulate(rows, headers="keys", tablefmt="github", floatfmt=digits, missingval="")


def milliseconds(times: Mapping[str, float] | None) -> str | None:
    """Median and spread."""
    if not times:
        return None
    median, least, most = (
        f"{times[name]:.3g}" if times[name] < 1000 else f"{times[name]:.0f}"
        for name in ("median", "min", "max")
    )
    return f"{median} ({least} to {most})"


def without_empty(rows: Sequence[Row], column: str) -> Sequence[Row]:
    """The rows without a column in which none of them has anything."""
    if any(row[column] for row in rows):
        return rows
    return [{k: v for k, v in row.items() if k != column} for row in rows]


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def environment_lines(results: Mapping[str, Sequence[Row]]) -> str:
    """Versions and commits of the runs behind a device's tables."""
    runs = [row["run"] for rows in results.values() for row in rows]
    parts = []
    for title, key in [("torch", "torch"), ("CUDA", "cuda"), ("commit", "commit")]:
        found = sorted({str(run[key]) for run in runs if run.get(key)})
        if found:
            parts.append(f"{title} {', '.join(found)}")
    # Runs of before were without, and did not name the allocator's settings.
    huge = sorted({str(run["commit"]) for run in runs if "hugetlb" in str(run.get("allocator"))})
    if huge:
        parts.append(f"with huge pages commit {', '.join(huge)}")
    dates = sorted({run["date"][:10] for run in runs})
    return f"{'; '.join(parts)}; measured on {', '.join(dates)}."


def operator_section(device: str, rows: Sequence[Row]) -> str:
    """Every operator against its rivals."""
    latest = max(rows, key=lambda row: row["run"]["date"])["run"]
    rates = ", ".join(
        f"{name} {rate / 1e3:.3g} T multiply-adds/s"
        for name, rate in latest["gigamultiplyadds_per_second"].items()
    )
    lines = [f"Ceilings measured: {latest['gigabytes_per_second']:.4g} GB/s; {rates}."]
    for dtype in sorted({row["dtype"] for row in rows}):
        body = []
        for row in (row for row in rows if row["dtype"] == dtype):
            times = row["variants"]
            others = ("reference", "compiled", "released")
            body.append(
                {
                    "case": row["case"],
                    "operator": row["operator"],
                    "kernel, ms": milliseconds(times["kernel"]),
                    "in a graph, ms": milliseconds(times.get("kernel in a graph")),
                    "floor, ms": row["floor_ms"],
                    "of the floor": percent(row["share_of_floor"]),
                    "bound by": row["bound"],
                    **{f"{o} / kernel": times[o]["ratio"] if o in times else None for o in others},
                }
            )
        lines += [f"{dtype}:", table(without_empty(body, "in a graph, ms"))]
    return "\n\n".join(lines)


def model_section(rows: Sequence[Row], part: str) -> str:
    """Baseline against expedited, and transformers' own where it ran."""
    body = []
    for row in (row for row in rows if row["part"] == part):
        outside = row.get("transformers")
        line = {
            "system": TITLES[row["system"]] + (", detail maps" if row.get("maps") else ""),
            "size": "×".join(map(str, row["size"])),
            "batch": row["batch"],
            "arithmetic": f"{row['dtype']}, {row['mode']}",
            "baseline, ms": milliseconds(row["baseline"]["latency_ms"]),
            "expedited, ms": milliseconds(row["expedited"]["latency_ms"]),
            "speed-up": row["speedup"],
            "multiply-adds": row["ratio_of_multiplyadds"],
            "efficiency": row["efficiency"],
            SHARE: operators_share(row),
        }
        if part == "model":
            line["transformers, ms"] = milliseconds(outside and outside["latency_ms"])
            ratio = outside["latency_ms"]["ratio"] if outside else None
            line["transformers / baseline"] = ratio
            line["transformers / expedited"] = ratio and ratio * row["speedup"]
        body.append(line)
    return table(without_empty(body, SHARE))


def competitor_section(rows: Sequence[Row]) -> str:
    """Ways to one cost: their latency."""
    body = [
        {
            "system": TITLES[row["system"]],
            "batch": row["batch"],
            "arithmetic": row["dtype"],
            "method": name,
            "size": "×".join(map(str, method.get("size", row["size"]))),
            "G multiply-adds": method["gflops"],
            "ms": milliseconds(method["latency_ms"]),
            "speed-up": method["speedup"],
        }
        for row in rows
        for name, method in row["methods"].items()
    ]
    return f"{COMPETITORS}\n{table(body)}"


def other_section(rows: Sequence[Row]) -> str:
    """Models of other libraries, plain against expedited."""
    body = [
        {
            "model": OTHERS[row["system"]].title,
            "part": row["part"].replace("_", " "),
            "size": "×".join(map(str, row["size"])),
            "batch": row["batch"],
            "arithmetic": others.arithmetic(row),
            "settings": settings,
            "plain, ms": milliseconds(row["plain"]["latency_ms"]),
            "expedited, ms": milliseconds(one["latency_ms"]),
            "speed-up": one["speedup"],
            "multiply-adds": one["ratio_of_multiplyadds"],
            "efficiency": one["efficiency"],
        }
        for row in rows
        for settings, one in row["expedited"].items()
    ]
    return f"{OTHER_MODELS}\n{table(body)}"


def page(results: Mapping[str, Mapping[str, list[Row]]], folder: Path, base: Path) -> str:
    """The whole page; plots are written to `folder` and linked relative to `base`."""
    sections = [INTRODUCTION]

    def plot(figure: Figure | None, name: str) -> str:
        if figure is None:
            return ""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.png"
        plots.save(figure, path)
        return f"\n![{name.replace('-', ' ')}]({path.relative_to(base).as_posix()})\n"

    for number, (device, found) in enumerate(results.items(), start=1):
        sections.append(f"\n## {device}\n\n{environment_lines(found)}\n")
        if found.get("operators"):
            text = operator_section(device, found["operators"])
            image = plot(plots.operators(found["operators"]), f"operators-{number}")
            sections.append(f"\n### Operators\n\n{text}\n{image}")
        models = found.get("models", [])
        for part, title in [("backbone", "Backbones"), ("model", "Whole models")]:
            chosen = [row for row in models if row["part"] == part]
            if chosen:
                image = plot(plots.models(chosen), f"{part}s-{number}")
                sections.append(f"\n### {title}\n\n{model_section(models, part)}\n{image}")
        if found.get("competitors"):
            rows = found["competitors"]
            image = plot(plots.competitors(rows), f"competitors-{number}")
            text = competitor_section(rows)
            sections.append(f"\n### Rivals at equal multiply-adds\n\n{text}\n{image}")
        if found.get("others"):
            text = other_section(found["others"])
            sections.append(f"\n### Models of other libraries\n\n{text}\n")
    return "".join([*sections, TRIED] if results else [*sections, EMPTY])


@cli
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", default=str(ROOT / "benchmarks" / "results"), metavar="DIR")
    parser.add_argument("--output", default=str(ROOT / "docs" / "performance.md"), metavar="FILE")
    args = parser.parse_args(argv)
    output = Path(args.output)
    files = Path(args.results).glob("*.json")
    # Metrics are on pages of their own.
    results = load(
        file for file in files if not re.search("-(accuracy|converted|tuning)", file.name)
    )
    text = page(results, output.parent / output.stem, output.parent)
    with replacing(output) as partial:
        partial.write_text(text, encoding="utf-8")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()

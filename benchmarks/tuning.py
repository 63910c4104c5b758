"""Whether `tune`, which sees no labels, chooses what labels would have chosen.

    python -m benchmarks.tuning --systems segmenter

Settings for the budgets alone are tried, calibrated and compared without labels on images of
`scenes_tune`. Those within a budget, and not far below it, are then evaluated with labels, on the
same images, by which labels choose, and on others of `scenes_val`, by which both choices are
reported.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

from tabulate import tabulate

from benchmarks.accuracy import SCENES, SYSTEMS, Runner
from benchmarks.common import Recorder, parser
from benchmarks.paired import ERRORS, kept
from expedite_d2 import expedited
from expedite_d2.d2.data import build_test_loader
from expedite_d2.d2.engine import tune
from expedite_d2.d2.evaluation import build_evaluators, inference_on_dataset
from expedite_d2.errors import cli
from expedite_d2.tools.tuning import in_words

# How far below a budget settings are still its rivals: who asks for 0.7 does not want 0.6.
NEAR = 0.08


@cli
def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SCENES))
    arguments.add_argument("--budgets", nargs="+", type=float, default=[0.7, 0.5])
    arguments.add_argument("--tuned", type=int, default=24, help="images to tune on (default 24)")
    arguments.add_argument("--images", type=int, default=80, help="images with labels (default 80)")
    args = arguments.parse_args(argv)
    args.part = "report"
    if args.quick:
        args.tuned, args.images, args.budgets = 3, 2, args.budgets[:1]
    logging.getLogger("expedite_d2").setLevel(logging.ERROR)
    recorder = Recorder("tuning", args, tuned=args.tuned)
    for name in args.systems:
        if recorder.late(name):
            continue
        runner = Runner(name, args)
        given = runner.config("DATASETS.TRAIN", (runner.unlabelled,))
        with mock.patch.object(
            importlib.import_module("expedite_d2.tools.tune"), "SHARES", args.budgets
        ):
            tuning = tune.measure(given, args.tuned, args.budgets[0])
        row = {"system": name, "dataset": runner.dataset, "images": len(runner.images)}
        labels = labelled(runner, args.tuned)
        recorder.add({**row, **runner.measure(), "choosing": labels()})
        for budget in args.budgets:
            best = replace(tuning, budget=budget).row
            for tried in tuning.rows:
                if tried is not best and not budget - NEAR < tried.share <= budget:
                    continue
                found = {
                    "budget": budget,
                    "settings": in_words(tried.reduction),
                    "chosen": tried is best,
                    "error": tried.error,
                }
                with expedited(runner.model, tried.reduction):
                    found["choosing"] = labels()
                reduced = runner.reduced(tried.reduction)
                recorder.add({**row, **reduced, **found, "share": tried.share})
    recorder.finish(table(recorder.results))


def labelled(runner: Runner, count: int) -> Callable[[], dict[str, float | None]]:
    """What measures the runner's model with labels, on the first images of those that choose."""
    images = list(build_test_loader(runner.cfg, runner.unlabelled))[:count]
    evaluators = build_evaluators(runner.cfg, runner.unlabelled)

    def measure() -> dict[str, float | None]:
        found = inference_on_dataset(runner.model, images, evaluators)
        return {metric: found[task][metric] for task, metric in runner.system.metrics}

    return measure


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """One line per system, budget and metric: what is chosen without labels, and with them.

    The best is what would have been chosen by the images that are reported on.
    """
    plain = {row["system"]: row["metrics"] for row in results if "budget" not in row}
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for row in results:
        if "budget" in row:
            groups.setdefault((row["system"], row["budget"]), []).append(row)
    lines = []
    for (system, budget), rows in groups.items():
        (chosen,) = [row for row in rows if row["chosen"]]
        for metric in chosen["choosing"]:
            whole = plain[system][metric]
            better = min if metric in ERRORS else max
            line = {"system": system, "budget": budget, "tried": len(rows), "metric": metric}
            for label, row in (
                ("without labels", chosen),
                ("with labels", better(rows, key=lambda row: row["choosing"][metric])),
                ("best", better(rows, key=lambda row: row["metrics"][metric])),
            ):
                line[label] = row["settings"]
                line[f"{label}: kept, %"] = kept(metric, row["metrics"][metric], whole)
            lines.append(line)
    return tabulate(lines, headers="keys", floatfmt=".2f")


if __name__ == "__main__":
    main()

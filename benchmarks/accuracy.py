"""What is kept of the accuracy at equal cost: clustering, merging, grouped attention, detail maps.

    python -m benchmarks.accuracy --systems segmenter dpt --budgets 0.5 0.4 --images 80

A budget is the share of the multiply-adds of the encoder's blocks (Swin: of all its blocks), which
each method meets from below. Metrics are those of the first images of the embedded scenes' test
set; temperature and detail maps are calibrated on its last ones, which are not among them.
"""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tabulate import tabulate

from benchmarks.common import ROOT, Recorder, parser
from expedite_d2 import Cluster, Merge, Reduction, calibrate, describe, expedite, restore
from expedite_d2.d2.config import load_config
from expedite_d2.d2.data import build_test_loader
from expedite_d2.d2.engine import build_trained_model
from expedite_d2.d2.evaluation import build_evaluators, inference_on_dataset
from expedite_d2.errors import cli


class System(NamedTuple):
    """A small model with weights.

    Attributes:
        config: its config, plain.
        metrics: task and name of those that it is judged by.
        alphas: of the clustering, the later one where the budget allows it.
        merges: whether it can merge.
    """

    config: str
    metrics: tuple[tuple[str, str], ...]
    alphas: tuple[int, ...]
    merges: bool


SYSTEMS = {
    "segmenter": System(
        "configs/scenes/semantic/segmenter_vit_mini.yaml", (("sem_seg", "mIoU"),), (4, 3), True
    ),
    "dpt": System("configs/scenes/depth/dpt_vit_mini.yaml", (("depth", "RMSE"),), (4, 3), True),
    "mask2former": System(
        "configs/scenes/panoptic/mask2former_swin_mini.yaml",
        (("panoptic_seg", "PQ"), ("sem_seg", "mIoU")),
        (6, 4),
        False,
    ),
}
# Blocks before which tokens merge: more merges where less is to be kept.
MERGE_AT = (1, 4, 7)
MERGE_EARLY_AT = (0, 3, 6, 9)
EARLY_BELOW = 0.45
ROUNDS = 2
# Images that maps and temperature are calibrated on, from the end of the data set.
CALIBRATED = 16


def share(model: Any, reduction: Reduction, size: tuple[int, int]) -> float:
    """Share of the blocks' multiply-adds that are left; the model is expedited so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings that save next to nothing, on the way
        blocks = describe(expedite(model, reduction), size).blocks
    return sum(b.reduced_multiply_adds for b in blocks) / sum(b.multiply_adds for b in blocks)


def clustered(system: System, cost: Callable[[Reduction], float], budget: float) -> Reduction:
    """The largest square grid that meets the budget, after the latest alpha that lets one."""
    for alpha in system.alphas:
        sides = itertools.count(2)
        fitting = None
        for side in sides:
            try:
                reduction = Reduction((Cluster(alpha, (side, side)),))
                if cost(reduction) > budget:
                    break
            except ValueError:  # no fewer clusters than tokens
                break
            fitting = reduction
        if fitting is not None and fitting.cluster.grid[0] > 5:
            return fitting
    raise ValueError(f"no clustering of {system.config} meets the budget {budget}")


def merged(cost: Callable[[Reduction], float], budget: float, rounds: int) -> Reduction:
    """The merges that keep the most tokens and meet the budget."""
    at = MERGE_EARLY_AT if budget < EARLY_BELOW else MERGE_AT
    least, most = 0.5, 0.99
    for _ in range(12):
        keep = (least + most) / 2
        if cost(Reduction((Merge(at, keep, rounds),))) > budget:
            most = keep
        else:
            least = keep
    return Reduction((Merge(at, round(least, 4), rounds),))


def methods(
    system: System, cost: Callable[[Reduction], float], budget: float
) -> Iterator[tuple[str, Reduction]]:
    """Each method's settings at a budget."""
    yield "clustering", clustered(system, cost, budget)
    if system.merges:
        yield "merging", merged(cost, budget, 0)
        yield "grouped attention", merged(cost, budget, ROUNDS)


@cli
def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    arguments.add_argument("--budgets", nargs="+", type=float, default=[0.5, 0.4])
    arguments.add_argument("--images", type=int, default=80, help="reported on (default 80)")
    args = arguments.parse_args(argv)
    if args.quick:
        args.images, args.budgets = 2, args.budgets[:1]
    logging.getLogger("expedite_d2").setLevel(logging.ERROR)
    recorder = Recorder("accuracy", args)
    for name in args.systems:
        system = SYSTEMS[name]
        cfg = load_config(
            str(ROOT / system.config),
            ["MODEL.DEVICE", args.device, "DATALOADER.NUM_WORKERS", 0],
        )
        dataset = cfg.DATASETS.TEST[0]
        model = build_trained_model(cfg)
        images = list(build_test_loader(cfg, dataset))
        if args.images > len(images) - CALIBRATED:
            raise ValueError(
                f"--images must be at most {len(images) - CALIBRATED} of {dataset}, got "
                f"{args.images}: the last {CALIBRATED} are calibrated on"
            )
        reported, calibrated = images[: args.images], images[-CALIBRATED:]
        size = tuple(reported[0][0]["image"].shape[-2:])

        def metrics() -> dict[str, float]:
            found: Any = inference_on_dataset(model, reported, build_evaluators(cfg, dataset))  # noqa: B023
            return {metric: found[task][metric] for task, metric in system.metrics}  # noqa: B023

        row = {"system": name, "dataset": dataset, "images": len(reported), "size": size}
        recorder.add({**row, "method": "plain", "share": 1.0, "metrics": metrics()})
        for budget in args.budgets:
            cost = lambda reduction: share(model, reduction, size)  # noqa: B023, E731
            for method, reduction in methods(system, cost, budget):
                if recorder.late(f"{row} {method} {budget}"):
                    continue
                at = {**row, "budget": budget, "share": cost(reduction)}
                steps = [str(step) for step in reduction.steps]
                recorder.add({**at, "method": method, "steps": steps, "metrics": metrics()})
                settings = calibrate(model, calibrated)
                if settings.correction is not None:
                    at["share"] = cost(settings)
                    method = f"{method}, detail maps"
                    recorder.add({**at, "method": method, "steps": steps, "metrics": metrics()})
        restore(model)
    recorder.finish(table(recorder.results))


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """One line per system, budget and method; an error is kept as its inverse ratio."""
    plain = {row["system"]: row["metrics"] for row in results if row["method"] == "plain"}
    rows = []
    for row in results:
        for metric, value in row["metrics"].items():
            before = plain[row["system"]][metric]
            rows.append(
                {
                    "system": row["system"],
                    "budget": row.get("budget"),
                    "method": row["method"],
                    "blocks' multiply-adds, %": 100 * row["share"],
                    "metric": metric,
                    "value": value,
                    "kept, %": 100 * (before / value if metric == "RMSE" else value / before),
                }
            )
    return tabulate(rows, headers="keys", floatfmt=".4g")


if __name__ == "__main__":
    main()

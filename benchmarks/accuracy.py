"""What is kept of the accuracy at equal cost: clustering, merging, grouped attention, detail maps.

    python -m benchmarks.accuracy --part sweep     # many settings, on the images that choose
    python -m benchmarks.accuracy                  # the chosen ones and their rivals, on others
    python -m benchmarks.accuracy --part latency   # how long the encoder takes with each of them

A budget is the share that is left of the multiply-adds of the encoder's blocks; every method meets
it nearly, with what the reduction itself costs. Temperature and detail maps are
calibrated on the first images of `scenes_tune`, settings are chosen on its others, and what is
reported was measured on `scenes_val`; on photographs of rooms likewise on frames that were kept out
of training, and on the official test frames.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from tabulate import tabulate

from benchmarks.common import ROOT, Recorder, measure, parser
from benchmarks.paired import Judge, kept
from benchmarks.pooling import average_pooled
from benchmarks.tome import block_multiplyadds, equal_schedule, merging
from expedite_d2 import Reduction, calibrate, describe, expedite, restore
from expedite_d2.d2.config import load_config
from expedite_d2.d2.data import build_test_loader
from expedite_d2.d2.engine import build_trained_model
from expedite_d2.d2.evaluation import build_evaluators
from expedite_d2.errors import cli
from expedite_d2.tools.budget import Clusters, Costs, Merges, Recipe


class System(NamedTuple):
    """A small model with weights.

    Attributes:
        config: its config below configs, plain.
        metrics: task and name of those that it is judged by.
        resized: config options that give it images of a height and a width.
        step: in what steps the height may shrink.
    """

    config: str
    metrics: tuple[tuple[str, str], ...]
    resized: Callable[[int, int], list[Any]] = lambda height, _: ["INPUT.MIN_SIZE_TEST", height]
    step: int = 32


def _segmenter(data: str) -> System:
    return System(f"{data}/semantic/segmenter_vit_mini.yaml", (("sem_seg", "mIoU"),), step=16)


def _dpt(data: str, *metrics: str) -> System:
    return System(
        f"{data}/depth/dpt_vit_mini.yaml",
        tuple(("depth", metric) for metric in metrics),
        lambda *size: ["MODEL.DPT.TEST_SIZE", size],
    )


SCENES = {
    "segmenter": _segmenter("scenes"),
    "dpt": _dpt("scenes", "RMSE", "AbsRel", "d1"),
    "mask2former": System(
        "scenes/panoptic/mask2former_swin_mini.yaml", (("panoptic_seg", "PQ"), ("sem_seg", "mIoU"))
    ),
    "htc": System("scenes/instance/htc_swin_mini.yaml", (("segm", "AP"),)),
    "panoptic_fpn": System(
        "scenes/panoptic/panoptic_fpn_swin_mini.yaml", (("panoptic_seg", "PQ"),)
    ),
}
# On photographs of rooms, which do not come with the project.
ROOMS = {
    "segmenter_rooms": _segmenter("rooms"),
    "dpt_rooms": _dpt("rooms", "RMSE", "AbsRel"),
}
SYSTEMS = SCENES | ROOMS
# Images that maps and temperature are calibrated on.
CALIBRATED = 16
# How far clusters, whose alpha is whole, may exceed a budget; their detail maps cost half of it.
TOLERANCE = 0.015


def _blocks(*numbers: int) -> tuple[float, ...]:
    """Blocks of twelve as shares."""
    return tuple(round(number / 12, 4) for number in numbers)


# Of the sweep, on encoders whose blocks take a sequence, and on those with windows.
SWEEP: dict[str, tuple[Recipe, ...]] = {
    "sequence": (
        *(Clusters(round(side / 24, 4)) for side in (12, 14, 16)),
        *(
            Merges(_blocks(*blocks), rounds)
            for rounds in (0, 1, 2)
            for blocks in ((1, 4, 7), (0, 3, 6, 9))
        ),
    ),
    "windows": tuple(Clusters(round(side / 12, 4)) for side in (5, 6, 7, 8)),
}
# What the sweep chose on scenes, on encoders of either kind, and on photographs: each method's
# recipe, by budget.
CHOSEN: dict[str, dict[str, dict[float, Recipe]]] = {
    "sequence": {
        "clustering": {0.7: Clusters(0.6667), 0.5: Clusters(0.5833), 0.4: Clusters(0.5833)},
        "merging": dict.fromkeys((0.7, 0.5, 0.4), Merges(_blocks(0, 3, 6, 9))),
        "grouped attention": dict.fromkeys((0.5, 0.4), Merges(_blocks(0, 3, 6, 9), 2)),
    },
    "windows": {"clustering": {0.7: Clusters(0.6667), 0.5: Clusters(0.5), 0.4: Clusters(0.5)}},
    "photographs": {
        "clustering": {0.7: Clusters(0.5833), 0.5: Clusters(0.5), 0.4: Clusters(0.5)},
        "merging": dict.fromkeys((0.7, 0.5, 0.4), Merges(_blocks(0, 3, 6, 9))),
        "grouped attention": {
            0.5: Merges(_blocks(0, 3, 6, 9), 1),
            0.4: Merges(_blocks(0, 3, 6, 9), 2),
        },
    },
}


class Runner:
    """A system's plain model and images, and what is measured of it.

    Args:
        name: of the system.
        args: of the command.
    """

    def __init__(self, name: str, args: Any) -> None:
        self.system, self.args = SYSTEMS[name], args
        self.cfg = self.config()
        (test,) = self.cfg.DATASETS.TEST
        self.unlabelled = test.rsplit("_", 1)[0] + "_tune"
        self.dataset, self.shown = test, slice(args.images)
        if args.part == "sweep":
            self.dataset, self.shown = self.unlabelled, slice(CALIBRATED, CALIBRATED + args.images)
        self.model = build_trained_model(self.cfg).eval()
        self.plain = copy.deepcopy(self.model)
        self.kind = "sequence" if hasattr(self.model.backbone, "vit") else "windows"
        self.chosen = CHOSEN["photographs" if name in ROOMS else self.kind]
        self.calibrated = list(build_test_loader(self.cfg, self.unlabelled))[:CALIBRATED]
        self.images = self._images(self.cfg)
        height, width = self.images[0][0]["image"].shape[-2:]
        self.size = (int(height), int(width))
        self.whole = self._multiply_adds(self.size)
        self.judge = Judge(build_evaluators(self.cfg, self.dataset), self.system.metrics)

    def config(self, *opts: Any) -> Any:
        """The system's config, with options."""
        path = str(ROOT / "configs" / self.system.config)
        fixed = ["MODEL.DEVICE", self.args.device, "DATALOADER.NUM_WORKERS", 0]
        return load_config(path, [*fixed, *opts])

    def _images(self, cfg: Any) -> list[Any]:
        return list(build_test_loader(cfg, self.dataset))[self.shown]

    def _multiply_adds(self, size: tuple[int, int]) -> int:
        return sum(block.multiply_adds for block in describe(self.plain, size).blocks)

    def measure(self, opts: Sequence[Any] = (), size: tuple[int, int] | None = None) -> Any:
        """What the part of the benchmark measures of the model as it is.

        Args:
            opts: config options that give it its images.
            size: of these images.
        """
        if self.args.part == "latency":
            return {"latency_ms": self._latency(size or self.size)}
        images = self._images(self.config(*opts)) if opts else self.images
        return self.judge(self.model, images)

    @torch.inference_mode()
    def _latency(self, size: tuple[int, int]) -> dict[str, Any]:
        """Times the encoder, in turn with the plain one on the whole image."""
        whole, image = (torch.randn(1, 3, *of, device=self.args.device) for of in (self.size, size))
        plain, reduced = (model.get_submodule("backbone") for model in (self.plain, self.model))
        calls = {"plain": partial(plain, whole), "reduced": partial(reduced, image)}
        return measure(calls, self.args.device, self.args.rounds, quick=self.args.quick)["reduced"]

    def recipe(self, recipe: Recipe, budget: float, maps: bool) -> dict[str, Any] | None:
        """A row of a recipe at a budget, which detail maps are part of; None where they hurt."""
        settings = self.settings(recipe, budget)
        if maps:
            settings = calibrate(expedite(self.model, settings), self.calibrated)
            over = describe(self.model, self.size).share_of_blocks - budget
            if over > TOLERANCE:
                settings = self.settings(recipe, budget - over)
                settings = calibrate(expedite(self.model, settings), self.calibrated)
            if settings.correction is None:
                return None
        return {"maps": maps, **self.reduced(settings)}

    def settings(self, recipe: Recipe, budget: float) -> Reduction:
        """The settings of a recipe at a budget; clusters, whose alpha is whole, near to it."""
        near = budget + TOLERANCE if isinstance(recipe, Clusters) else budget
        return Costs(self.plain, self.size).meet(recipe, budget_of(self.plain, near, self.size))

    def reduced(self, settings: Reduction) -> dict[str, Any]:
        """A row of settings; the model is plain again then."""
        expedite(self.model, settings)
        steps = [str(step) for step in settings.steps]
        share = describe(self.model, self.size).share_of_blocks
        row = {"steps": steps, "share": share, **self.measure()}
        restore(self.model)
        return row

    def average_pooling(self, recipe: Recipe, budget: float) -> dict[str, Any]:
        """The row of cells in the place of clusters, on the same grid after the same blocks."""
        with average_pooled():
            return self.reduced(self.settings(recipe, budget))

    def resized(self, budget: float) -> dict[str, Any]:
        """The row of the plain model on smaller images."""
        height, width = self.size
        for side in range(height - self.system.step, 0, -self.system.step):
            opts = self.system.resized(side, round(side * width / height))
            (first,) = next(iter(build_test_loader(self.config(*opts), self.dataset)))
            size = (int(first["image"].shape[1]), int(first["image"].shape[2]))
            share = self._multiply_adds(size) / self.whole
            if share <= budget:
                return {"size": size, "share": share, **self.measure(opts, size)}
        raise ValueError(f"no image is small enough for {budget} of the multiply-adds")

    def token_merging(self, budget: float) -> dict[str, Any]:
        """The row of ToMe, on a plain ViT of which the last block alone is read."""
        backbone: Any = self.model.backbone
        rows, columns = (-(-side // backbone.size_divisibility) for side in self.size)
        tokens = rows * columns + backbone.vit.num_prefix_tokens
        whole = block_multiplyadds(backbone.vit, tokens, [0] * len(backbone.vit.blocks))
        schedule = equal_schedule(backbone.vit, tokens, budget * whole)
        share = block_multiplyadds(backbone.vit, tokens, schedule) / whole
        with merging(backbone.vit, schedule):
            return {"share": share, **self.measure()}


def budget_of(plain: Any, share: float, size: tuple[int, int]) -> float:
    """The share of a plain encoder's multiply-adds that goes with one of its blocks' alone."""
    found = describe(plain, size)
    blocks = sum(block.multiply_adds for block in found.blocks)
    return 1 - (1 - share) * blocks / found.multiply_adds


Rows = Iterator[tuple[str, Callable[[], dict[str, Any] | None]]]


def swept(runner: Runner, budget: float) -> Rows:
    """Every recipe, without and with detail maps."""
    for recipe in SWEEP[runner.kind]:
        yield str(recipe), partial(runner.recipe, recipe, budget, False)
        if not getattr(recipe, "rounds", 0):
            yield str(recipe), partial(runner.recipe, recipe, budget, True)


def reported(runner: Runner, budget: float) -> Rows:
    """Each method's chosen recipe, and the rivals."""
    for method, recipes in runner.chosen.items():
        if budget not in recipes:  # groups leave less
            continue
        for maps in (False, True) if method != "grouped attention" else (False,):
            yield method, partial(runner.recipe, recipes[budget], budget, maps)
    clusters = runner.chosen["clustering"][budget]
    yield "average pooling", partial(runner.average_pooling, clusters, budget)
    if runner.kind == "sequence" and runner.cfg.MODEL.VIT.OUT_BLOCKS == ["last"]:
        yield "ToMe", partial(runner.token_merging, budget)
    yield "resized image", partial(runner.resized, budget)


@cli
def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--part", choices=["report", "sweep", "latency"], default="report")
    arguments.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SCENES))
    arguments.add_argument("--budgets", nargs="+", type=float, default=[0.7, 0.5, 0.4])
    arguments.add_argument("--images", type=int, default=80, help="of the set (default 80)")
    args = arguments.parse_args(argv)
    if args.quick:
        args.images, args.budgets = 2, args.budgets[:1]
    logging.getLogger("expedite_d2").setLevel(logging.ERROR)
    recorder = Recorder("accuracy", args, part=args.part)
    for name in args.systems:
        runner = Runner(name, args)
        row = {"system": name, "dataset": runner.dataset, "images": len(runner.images)}
        recorder.add({**row, "method": "plain", "share": 1.0, **runner.measure()})
        for budget in args.budgets:
            for method, run in (swept if args.part == "sweep" else reported)(runner, budget):
                if recorder.late(f"{name} {method} {budget}"):
                    continue
                try:
                    found = run()
                except ValueError as error:  # a budget that a recipe does not reach
                    recorder.skipped.append(f"{name} {method} {budget}: {error}")
                    continue
                if found is not None:
                    recorder.add({**row, "method": method, "budget": budget, **found})
    recorder.finish(table(recorder.results))


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """One line per system, budget, method and figure."""
    plain = {row["system"]: row for row in results if row["method"] == "plain"}
    rows = []
    for row in results:
        line = {
            "system": row["system"],
            "budget": row.get("budget"),
            "method": row["method"] + (", detail maps" if row.get("maps") else ""),
            "blocks' multiply-adds, %": 100 * row["share"],
        }
        if "latency_ms" in row:
            rows.append({**line, "ms": row["latency_ms"]["median"], "speed-up": speedup(row)})
        for metric, value in row.get("metrics", {}).items():
            share = kept(metric, value, plain[row["system"]]["metrics"][metric])
            rows.append({**line, "metric": metric, "value": value, "kept, %": share})
    return tabulate(rows, headers="keys", floatfmt=".4g")


def speedup(row: Mapping[str, Any]) -> float:
    """How many times faster than the plain encoder."""
    return 1 / row["latency_ms"]["ratio"]


if __name__ == "__main__":
    main()

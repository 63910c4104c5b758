"""What is kept of the accuracy at equal cost: clustering, merging, grouped attention, detail maps.

    python -m benchmarks.accuracy --sweep      # many settings, on the images that choose
    python -m benchmarks.accuracy              # the chosen ones and their rivals, on other images

A budget is the share that is left of the multiply-adds of the encoder's blocks; every method meets
it from below, with what the reduction itself costs. Temperature and detail maps are calibrated on
the first images of `scenes_tune`, settings are chosen on its others, and what is reported was
measured on `scenes_val`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor

from benchmarks.common import ROOT, Recorder, parser
from benchmarks.pooling import average_pooled
from benchmarks.tome import block_multiplyadds, equal_schedule, merging
from expedite_d2 import Reduction, calibrate, describe, expedite, restore
from expedite_d2.d2.config import load_config
from expedite_d2.d2.data import build_test_loader
from expedite_d2.d2.engine import build_trained_model
from expedite_d2.d2.evaluation import build_evaluators, inference_on_dataset
from expedite_d2.errors import cli
from expedite_d2.tools.budget import Clusters, Merges, Recipe, meet_budget


class System(NamedTuple):
    """A small model with weights.

    Attributes:
        config: its config below configs/scenes, plain.
        metrics: task and name of those that it is judged by.
        resized: config options that give it images of a side.
        step: what that side must be a multiple of.
    """

    config: str
    metrics: tuple[tuple[str, str], ...]
    resized: Callable[[int], list[Any]] = lambda side: ["INPUT.MIN_SIZE_TEST", side]
    step: int = 32


SYSTEMS = {
    "segmenter": System("semantic/segmenter_vit_mini.yaml", (("sem_seg", "mIoU"),), step=16),
    "dpt": System(
        "depth/dpt_vit_mini.yaml",
        (("depth", "RMSE"),),
        lambda side: ["MODEL.DPT.TEST_SIZE", [side, side]],
    ),
    "mask2former": System(
        "panoptic/mask2former_swin_mini.yaml", (("panoptic_seg", "PQ"), ("sem_seg", "mIoU"))
    ),
    "htc": System("instance/htc_swin_mini.yaml", (("segm", "AP"),)),
    "panoptic_fpn": System("panoptic/panoptic_fpn_swin_mini.yaml", (("panoptic_seg", "PQ"),)),
}
BUDGETS = (0.7, 0.6, 0.5, 0.4)
# Images that maps and temperature are calibrated on.
CALIBRATED = 16
# Of a budget: detail maps of clusters cost half of it, and alpha has no fractions.
TOLERANCE = 0.01


def _blocks(*numbers: int) -> tuple[float, ...]:
    """Blocks of twelve as shares."""
    return tuple(round(number / 12, 4) for number in numbers)


# Of the sweep, on encoders whose blocks take a sequence, and on those with windows.
SEQUENCE_RECIPES: tuple[Recipe, ...] = (
    *(Clusters(round(side / 24, 4)) for side in (10, 12, 14, 16, 18)),
    *(
        Merges(_blocks(*blocks), rounds)
        for rounds in (0, 1, 2)
        for blocks in ((1, 4, 7), (0, 3, 6, 9), (2, 5, 8))
    ),
)
WINDOW_RECIPES = tuple(Clusters(round(side / 12, 4)) for side in (4, 5, 6, 7, 8))


class Runner:
    """A system's plain model and images, and what is measured of it.

    Args:
        name: of the system.
        device: that it runs on.
        images: how many of `scenes_val` to report on; None: those of `scenes_tune` that choose.
    """

    def __init__(self, name: str, device: str, images: int | None) -> None:
        self.system, self.device = SYSTEMS[name], device
        self.cfg = self._config()
        (test,) = self.cfg.DATASETS.TEST
        tune = test.replace("_val", "_tune")
        self.dataset, self.shown = (tune, slice(CALIBRATED, None))
        if images is not None:
            self.dataset, self.shown = test, slice(images)
        self.model = build_trained_model(self.cfg)
        self.calibrated = list(build_test_loader(self.cfg, tune))[:CALIBRATED]
        self.images = self._images(self.cfg)
        height, width = self.images[0][0]["image"].shape[-2:]
        self.size = (int(height), int(width))
        self.whole = self._multiply_adds(self.size)
        self.depths: list[Tensor] = []

    def _config(self, *opts: Any) -> Any:
        path = str(ROOT / "configs/scenes" / self.system.config)
        return load_config(path, ["MODEL.DEVICE", self.device, "DATALOADER.NUM_WORKERS", 0, *opts])

    def _images(self, cfg: Any) -> list[Any]:
        return list(build_test_loader(cfg, self.dataset))[self.shown]

    def _multiply_adds(self, size: tuple[int, int]) -> int:
        return sum(block.multiply_adds for block in describe(self.model, size).blocks)

    def measure(self, images: Sequence[Any] | None = None) -> dict[str, float]:
        """Metrics of the model as it is.

        Of depth also the root mean square in m of its distance to the plain model's, which is
        measured first.
        """
        depths: list[Tensor] = []
        hook = self.model.register_forward_hook(
            lambda model, batch, outputs: depths.extend(
                output["depth"].cpu() for output in outputs if "depth" in output
            )
        )
        evaluators = build_evaluators(self.cfg, self.dataset)
        try:
            found: Any = inference_on_dataset(self.model, images or self.images, evaluators)
        finally:
            hook.remove()
        metrics = {metric: found[task][metric] for task, metric in self.system.metrics}
        self.depths = self.depths or depths
        if depths:
            squares = [(a - b).square().mean() for a, b in zip(depths, self.depths, strict=True)]
            metrics["distance"] = torch.stack(squares).mean().sqrt().item()
        return metrics

    def recipe(self, recipe: Recipe, budget: float, maps: bool) -> dict[str, Any] | None:
        """A row of a recipe at a budget, which detail maps are part of; None where they hurt."""
        settings = meet_budget(self.model, recipe, budget, self.size)
        if maps:
            calibrate(expedite(self.model, settings), self.calibrated)
            over = describe(self.model, self.size).share - budget
            if over > TOLERANCE:
                settings = meet_budget(self.model, recipe, budget - over, self.size)
            settings = calibrate(expedite(self.model, settings), self.calibrated)
            if settings.correction is None:
                return None
        return {"maps": maps, **self.reduced(settings)}

    def reduced(self, settings: Reduction) -> dict[str, Any]:
        """A row of settings; the model is plain again then."""
        expedite(self.model, settings)
        steps = [str(step) for step in settings.steps]
        share = describe(self.model, self.size).share
        row = {"steps": steps, "share": share, "metrics": self.measure()}
        restore(self.model)
        return row

    def resized(self, budget: float) -> dict[str, Any]:
        """The row of the plain model on smaller images."""
        side, step = self.size[0] - self.system.step, self.system.step
        while self._multiply_adds((side, side)) > budget * self.whole:
            side -= step
        smaller = self._images(self._config(*self.system.resized(side)))
        share = self._multiply_adds((side, side)) / self.whole
        return {"side": side, "share": share, "metrics": self.measure(smaller)}

    def token_merging(self, budget: float) -> dict[str, Any]:
        """The row of ToMe, on a plain ViT."""
        backbone: Any = self.model.backbone
        rows, columns = (-(-side // backbone.size_divisibility) for side in self.size)
        tokens = rows * columns + backbone.vit.num_prefix_tokens
        whole = block_multiplyadds(backbone.vit, tokens, [0] * len(backbone.vit.blocks))
        schedule = equal_schedule(backbone.vit, tokens, budget * whole)
        share = block_multiplyadds(backbone.vit, tokens, schedule) / whole
        with merging(backbone.vit, schedule):
            return {"share": share, "metrics": self.measure()}


def sweep(runner: Runner, budget: float) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every recipe with and without maps."""
    on_sequence = hasattr(runner.model.backbone, "vit")
    for recipe in SEQUENCE_RECIPES if on_sequence else WINDOW_RECIPES:
        grouped = isinstance(recipe, Merges) and recipe.rounds > 0
        for maps in (False,) if grouped else (False, True):
            yield str(recipe), partial(runner.recipe, recipe, budget, maps)


@cli
def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    arguments.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    arguments.add_argument("--images", type=int, default=200, help="reported on (default 200)")
    arguments.add_argument("--sweep", action="store_true", help="many settings, to choose from")
    args = arguments.parse_args(argv)
    if args.quick:
        args.images, args.budgets = 2, args.budgets[:1]
    logging.getLogger("expedite_d2").setLevel(logging.ERROR)
    recorder = Recorder("accuracy", args)
    for name in args.systems:
        runner = Runner(name, args.device, None if args.sweep else args.images)
        row = {"system": name, "dataset": runner.dataset, "images": len(runner.images)}
        recorder.add({**row, "method": "plain", "share": 1.0, "metrics": runner.measure()})
        for budget in args.budgets:
            for method, run in (sweep if args.sweep else report)(runner, budget):
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
    """One line per system, budget and method; an error is kept as its inverse ratio."""
    plain = {row["system"]: row["metrics"] for row in results if row["method"] == "plain"}
    rows = []
    for row in results:
        for metric, value in row["metrics"].items():
            before = plain[row["system"]][metric]
            kept = before / value if metric == "RMSE" else value / before if before else None
            rows.append(
                {
                    "system": row["system"],
                    "budget": row.get("budget"),
                    "method": row["method"] + (", detail maps" if row.get("maps") else ""),
                    "blocks' multiply-adds, %": 100 * row["share"],
                    "metric": metric,
                    "value": value,
                    "kept, %": kept and 100 * kept,
                }
            )
    return tabulate(rows, headers="keys", floatfmt=".4g")


if __name__ == "__main__":
    main()

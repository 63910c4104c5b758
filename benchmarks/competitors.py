"""Clustering against token merging (ToMe) and average pooling at equal multiply-adds.

    python -m benchmarks.competitors --part speed
    python -m benchmarks.competitors --part accuracy --images 50

All are our own implementations (benchmarks/tome.py, benchmarks/pooling.py) on the same backbones,
through the same attention. Token merging chooses how many pairs it merges in a block so that all
blocks together cost what the expedited ones do; average pooling has the same grid as the clusters.
Token merging needs global attention and positions that do not matter after the embedding: it runs
on ViTs, not on Swin. Speed is that of the backbone with random weights, accuracy that of models
with weights on the embedded scenes.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from tabulate import tabulate

from benchmarks.common import DTYPES, ROOT, Call, Recorder, measure, parser
from benchmarks.models import flattened
from benchmarks.pooling import average_pooled
from benchmarks.systems import SYSTEMS, TITLES, config, pair, run, sizes
from benchmarks.tome import block_multiplyadds, equal_schedule, merging
from expedite_d2.d2 import CfgNode
from expedite_d2.d2.comparison.compare import build_pair
from expedite_d2.d2.comparison.cost import count_gflops
from expedite_d2.d2.config import load_config
from expedite_d2.d2.data import build_test_loader
from expedite_d2.d2.evaluation import build_evaluators, inference_on_dataset
from expedite_d2.d2.modeling.backbone.vit import ExpeditedViT
from expedite_d2.errors import cli

SPEED = ("segmenter", "panoptic")
# Each of them where its config has weights.
ACCURACY = {
    "scenes_panoptic": "configs/scenes/panoptic/mask2former_swin_mini_expedited.yaml",
    "scenes_semantic": "configs/scenes/semantic/segmenter_vit_mini_expedited.yaml",
}
# Features come back at full resolution, by this package's own settings: the same for all rivals.
OURS = [
    *("MODEL.EXPEDITE.TOPK", 4, "MODEL.EXPEDITE.TEMPERATURE", 0.0),
    *("MODEL.EXPEDITE.RECONSTRUCTION", "residual", "MODEL.SEGMENTER.PLACEMENT", "features"),
]


class Method(NamedTuple):
    """A way to a cheaper backbone.

    Attributes:
        model: which of the pair it runs on.
        gflops: of the backbone, for one image.
        entered: what must be entered while it runs.
    """

    model: Any
    gflops: float
    entered: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext


def methods(models: Mapping[str, Any], height: int, width: int) -> dict[str, Method]:
    """All methods that the backbone takes, the baseline first.

    Args:
        models: "baseline" and "expedited".
        height, width: of the images; merging is planned for their number of tokens.
    """
    baseline, expedited = models["baseline"], models["expedited"]
    whole, ours = (count_gflops(m, height, width)["backbone"] for m in (baseline, expedited))
    with average_pooled():
        pooled = count_gflops(expedited, height, width)["backbone"]
    result = {
        "baseline": Method(baseline, whole),
        "clustering": Method(expedited, ours),
        "average pooling": Method(expedited, pooled, average_pooled),
    }
    if isinstance(baseline.backbone, ExpeditedViT):
        vit, stride = baseline.backbone.vit, baseline.backbone.size_divisibility
        tokens = -(-height // stride) * -(-width // stride) + vit.num_prefix_tokens
        all_blocks = block_multiplyadds(vit, tokens, [0] * len(vit.blocks))
        schedule = equal_schedule(vit, tokens, all_blocks - 1e9 * (whole - ours))
        spared = all_blocks - block_multiplyadds(vit, tokens, schedule)
        result["token merging"] = Method(
            baseline, whole - spared / 1e9, lambda: merging(vit, schedule)
        )
    return result


def call_of(method: Method, dtype: str, images: torch.Tensor) -> Call:
    """A call of the method's backbone.

    Raises:
        ValueError: an output is not finite.
    """
    forward = run(method.model, "backbone", DTYPES[dtype], images)

    def call() -> Any:
        with method.entered():
            return forward()

    with torch.inference_mode():
        outputs = flattened(call())
    if not all(tensor.isfinite().all() for tensor in outputs):
        raise ValueError("an output is not finite")
    return call


def speed(recorder: Recorder, args: Any) -> None:
    """Latency of the backbone with each method, all in turn."""
    for name in args.systems:
        system = SYSTEMS[name]
        cfg = config(system, args.device, args.quick, OURS)
        height, width = sizes(system, args.quick)[0]
        models = pair(cfg)
        found = methods(models, height, width)
        for batch, dtype in itertools.product(args.batch, args.dtype):
            row = {"part": "speed", "system": name, "size": [height, width], "batch": batch}
            if recorder.late(f"{row} {dtype}"):
                continue
            images = torch.randn(batch, 3, height, width, device=args.device)
            calls = {one: call_of(method, dtype, images) for one, method in found.items()}
            warmup = 0 if args.device == "cpu" else 2  # every call has run once
            times = measure(calls, args.device, args.rounds, warmup=warmup, quick=args.quick)
            recorder.add(
                {
                    **row,
                    "dtype": dtype,
                    "methods": {
                        one: {
                            "latency_ms": times[one],
                            "gflops": method.gflops,
                            "speedup": 1 / times[one]["ratio"],
                        }
                        for one, method in found.items()
                    },
                }
            )


def accuracy(recorder: Recorder, args: Any) -> None:
    """Metrics of models with weights on the embedded scenes, the first images of the data set."""
    for name, path in ACCURACY.items():
        cfg: CfgNode = load_config(str(ROOT / path), ["MODEL.DEVICE", args.device, *OURS])
        if not cfg.MODEL.WEIGHTS:
            recorder.skipped.append(f"accuracy {name}: {path} has no weights")
            continue
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0
        dataset = cfg.DATASETS.TEST[0]
        models = dict(zip(("baseline", "expedited"), build_pair(cfg), strict=True))
        batches = list(itertools.islice(build_test_loader(cfg, dataset), args.images))
        # Most images are landscapes of one size; merging is planned for those.
        height, width = batches[0][0]["image"].shape[-2:]
        row = {"part": "accuracy", "system": name, "images": len(batches)}
        results = {}
        for one, method in methods(models, height, width).items():
            if recorder.late(f"{row} {one}"):
                continue
            with method.entered():
                metrics = inference_on_dataset(
                    method.model, batches, build_evaluators(cfg, dataset)
                )
            results[one] = {"gflops": method.gflops, "metrics": metrics}
        recorder.add({**row, "dtype": cfg.TEST.DTYPE, "dataset": dataset, "methods": results})


@cli
def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__ or "")
    parts = {"speed": speed, "accuracy": accuracy}
    arguments.add_argument("--part", nargs="+", choices=parts, default=["speed"])
    arguments.add_argument("--systems", nargs="+", choices=SPEED, default=SPEED)
    arguments.add_argument("--batch", nargs="+", type=int, default=[1])
    arguments.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    arguments.add_argument("--images", type=int, default=50, help="of the data set (default 50)")
    args = arguments.parse_args(argv)
    logging.getLogger("expedite_d2").setLevel(logging.ERROR)
    recorder = Recorder("competitors", args)
    for part in args.part:
        parts[part](recorder, args)
    recorder.finish(table(recorder.results))


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """One line a method."""
    rows = []
    for row in results:
        for name, method in row["methods"].items():
            latency = method.get("latency_ms", {})
            metrics = method.get("metrics", {})
            rows.append(
                {
                    "system": TITLES.get(row["system"], row["system"]),
                    "batch": row.get("batch"),
                    "dtype": row["dtype"],
                    "method": name,
                    "G multiply-adds": method["gflops"],
                    "ms": latency.get("median"),
                    "speed-up": method.get("speedup"),
                    **{key: value for key, value in headlines(metrics).items()},
                }
            )
    return tabulate(rows, headers="keys", floatfmt=".4g")


def headlines(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The metric that each task is judged by."""
    wanted = {"panoptic_seg": "PQ", "sem_seg": "mIoU", "segm": "AP"}
    return {
        wanted[task]: values[wanted[task]] for task, values in metrics.items() if task in wanted
    }


if __name__ == "__main__":
    main()

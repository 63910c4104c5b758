"""Our settings at half of the blocks' multiply-adds against other ways to the same cost.

    python -m benchmarks.competitors --systems segmenter_half --dtype float32

Each costs at most what ours cost, with what it takes to choose and to undo it, and runs on the
same weights through the same attention:

- one-shot clustering; of a few cluster grids the one whose cost comes nearest;
- average pooling on the grid of these clusters (benchmarks/pooling.py);
- token merging, ToMe (benchmarks/tome.py), which needs global attention and positions that do not
  matter after the embedding: it runs on ViTs, not on Swin;
- the plain model on smaller images, whose features then are smaller, too.

Speed is that of the backbone with random weights; benchmarks/accuracy.py has the accuracy.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from tabulate import tabulate

from benchmarks.common import DTYPES, Call, Recorder, measure, parser
from benchmarks.models import flattened
from benchmarks.pooling import average_pooled
from benchmarks.systems import SYSTEMS, TITLES, config, pair, run, sizes
from benchmarks.tome import block_multiplyadds, equal_schedule, merging
from expedite_d2 import Reduction, describe
from expedite_d2.errors import cli
from expedite_d2.reducers import Merge
from expedite_d2.tools.budget import Clusters, Costs

CHOSEN = ("segmenter_half", "panoptic_half")
# Sides of one-shot clusters, as shares of the image's; the budget decides how many blocks run on
# them, a whole number.
SIDES = (0.5, 0.6, 0.7, 0.8)

Size = tuple[int, int]


class Method(NamedTuple):
    """A way to a cheaper backbone.

    Attributes:
        model: what runs.
        size: rows and columns of its images.
        gflops: giga multiply-adds of its backbone for one of them.
        entered: what must be entered while it runs.
    """

    model: Any
    size: Size
    gflops: float
    entered: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext


def methods(models: Mapping[str, Any], size: Size) -> dict[str, Method]:
    """All methods that the backbone takes, the baseline first and ours after it.

    Args:
        models: "baseline" and "expedited", whose cost is the others' budget.
        size: rows and columns of the images.
    """
    baseline, ours = models["baseline"], models["expedited"]
    whole, budget = gflops(baseline, size), gflops(ours, size)
    found = {"baseline": Method(baseline, size, whole)}
    clustered = Method(ours, size, budget)
    if isinstance(ours.backbone.reduction.steps[0], Merge):
        grouped = ours.backbone.reduction.steps[0].rounds > 0
        found["merging, grouped attention" if grouped else "merging"] = clustered
        clustered = one_shot(baseline, size, budget / whole)
    found["clustering"] = clustered
    with average_pooled():
        pooled = gflops(clustered.model, size)
    found["average pooling"] = Method(clustered.model, size, pooled, average_pooled)
    if hasattr(baseline.backbone, "vit"):
        found["token merging (ToMe)"] = token_merging(baseline, size, whole, budget)
    smaller = smaller_size(baseline, size, budget)
    found["smaller images"] = Method(baseline, smaller, gflops(baseline, smaller))
    return found


def gflops(model: Any, size: Size) -> float:
    """Giga multiply-adds of a model's backbone for one image."""
    return describe(model.backbone, size).reduced_multiply_adds / 1e9


def one_shot(baseline: Any, size: Size, share: float) -> Method:
    """Clustering that leaves at most a share of the multiply-adds.

    Raises:
        ValueError: no grid of `SIDES` is small enough.
    """
    found = []
    for side in SIDES:
        with contextlib.suppress(ValueError):  # a grid that is too large for the share
            settings = Costs(baseline.backbone, size).meet(Clusters(side), share)
            model = with_settings(baseline, settings)
            found.append(Method(model, size, gflops(model, size)))
    if not found:
        raise ValueError(f"no clusters leave {share:.3f} of the multiply-adds")
    return max(found, key=lambda method: method.gflops)


def with_settings(model: Any, reduction: Reduction) -> Any:
    """A copy with the same parameter tensors and other settings."""
    copied = copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})
    copied.backbone.reduction = reduction
    return copied


def token_merging(baseline: Any, size: Size, whole: float, budget: float) -> Method:
    """ToMe on a ViT, the same number of pairs in each block.

    Args:
        baseline: the plain model.
        size: rows and columns of the images.
        whole, budget: giga multiply-adds of the plain backbone and of the merging one.
    """
    vit, stride = baseline.backbone.vit, baseline.backbone.size_divisibility
    tokens = -(-size[0] // stride) * -(-size[1] // stride) + vit.num_prefix_tokens
    blocks = block_multiplyadds(vit, tokens, [0] * len(vit.blocks))
    schedule = equal_schedule(vit, tokens, blocks - 1e9 * (whole - budget))
    spared = blocks - block_multiplyadds(vit, tokens, schedule)
    return Method(baseline, size, whole - spared / 1e9, lambda: merging(vit, schedule))


def smaller_size(baseline: Any, size: Size, budget: float) -> Size:
    """The largest size at which the plain backbone keeps to a budget of giga multiply-adds.

    Its sides are multiples of what the backbone divides images by, and shrink in turn.
    """
    step = baseline.backbone.size_divisibility
    height, width = size
    while gflops(baseline, (height, width)) > budget:
        if height / size[0] >= width / size[1]:
            height -= step
        else:
            width -= step
    return height, width


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


@cli
def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--systems", nargs="+", choices=CHOSEN, default=CHOSEN)
    arguments.add_argument("--batch", nargs="+", type=int, default=[1])
    arguments.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    args = arguments.parse_args(argv)
    logging.getLogger("expedite_d2").setLevel(logging.ERROR)
    recorder = Recorder("competitors", args)
    for name in args.systems:
        size = sizes(SYSTEMS[name], args.quick)[0]
        found = methods(pair(config(SYSTEMS[name], args.device, args.quick)), size)
        for batch, dtype in itertools.product(args.batch, args.dtype):
            row = {"system": name, "size": list(size), "batch": batch, "dtype": dtype}
            if recorder.late(str(row)):
                continue
            calls = {
                one: call_of(method, dtype, torch.randn(batch, 3, *method.size, device=args.device))
                for one, method in found.items()
            }
            warmup = 0 if args.device == "cpu" else 2  # every call has run once
            times = measure(calls, args.device, args.rounds, warmup=warmup, quick=args.quick)
            timed = {
                one: {
                    "size": list(method.size),
                    "gflops": method.gflops,
                    "latency_ms": times[one],
                    "speedup": 1 / times[one]["ratio"],
                }
                for one, method in found.items()
            }
            recorder.add({**row, "methods": timed})
    recorder.finish(table(recorder.results))


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """One line a method."""
    rows = [
        {
            "system": TITLES[row["system"]],
            "batch": row["batch"],
            "dtype": row["dtype"],
            "method": name,
            "size": "x".join(map(str, method["size"])),
            "G multiply-adds": method["gflops"],
            "ms": method["latency_ms"]["median"],
            "speed-up": method["speedup"],
        }
        for row in results
        for name, method in row["methods"].items()
    ]
    return tabulate(rows, headers="keys", floatfmt=".4g")


if __name__ == "__main__":
    main()

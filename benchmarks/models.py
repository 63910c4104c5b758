"""Times backbones and whole models up to their logits: baseline against expedited, in one run.

    python -m benchmarks.models --part backbone --systems panoptic --sizes 1152x1152
    python -m benchmarks.models --part model --dtype bfloat16 --modes eager compiled --batch 1 8
    python -m benchmarks.models --systems panoptic_half --maps

Weights are random: they do not change the work. Baseline, expedited and, of a whole Mask2Former,
transformers' own implementation run in turn, so that drifting clocks hit all alike. Before that
ours are compared with transformers' outputs, and what was compiled with what was not.
Efficiency is the measured speed-up divided by the ratio of the multiply-adds. Of a backbone that
is not compiled the profiler tells how long its calls reduce, group and reconstruct tokens, after
the clock has stopped.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from benchmarks.common import DTYPES, Call, Recorder, compiled, difference, measure, parser
from benchmarks.overhead import overhead
from benchmarks.systems import (
    SYSTEMS,
    TITLES,
    WITH_DETAIL,
    add_detail_maps,
    config,
    outside,
    pair,
    run,
    sizes,
)
from expedite_d2.d2.comparison.cost import count_gflops
from expedite_d2.errors import cli
from expedite_d2.tools.latency import PeakMemory

# Of a compiled output from the eager one in float32: sums in another order. In half types rounding
# alone is more than that, and may be twice the eager output's own.
TOLERANCE = 1e-3


def flattened(value: Any) -> list[Tensor]:
    """All float tensors of an output."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for part in value or () for tensor in flattened(part)]


@torch.inference_mode()
def calls_of(
    models: Mapping[str, Any], job: Mapping[str, Any], images: Tensor
) -> tuple[dict[str, Call], dict[str, float | None]]:
    """A call of each model, and its peak memory; what was compiled is compared with the eager call.

    Raises:
        ValueError: a compiled model gives something else, or an output is not finite.
    """
    calls: dict[str, Call] = {}
    peaks: dict[str, float | None] = {}
    part, dtype = job["part"], DTYPES[job["dtype"]]
    torch._dynamo.reset()  # the number of shapes that it keeps is limited
    for name, model in models.items():
        calls[name] = run(model, part, dtype, images)
        with PeakMemory(images.device) as memory:
            plain = flattened(calls[name]())
        if not all(tensor.isfinite().all() for tensor in plain):
            raise ValueError(f"an output of {name} is not finite")
        if job["mode"] == "compiled":
            exact = flattened(run(model, part, torch.float32, images)())
            # A backbone must be one graph; the heads around it are not all ours.
            wrap = partial(compiled, fullgraph=part == "backbone")
            calls[name] = run(model, part, dtype, images, wrap)
            calls[name]()  # compiles, and has memory of its own for that
            with PeakMemory(images.device) as memory:
                outputs = flattened(calls[name]())
            error = max(map(difference, outputs, exact))
            allowed = TOLERANCE + 2 * max(map(difference, plain, exact))
            if not error <= allowed:
                raise ValueError(
                    f"compiled and eager outputs of {name} differ by {error:.2g}, more than "
                    f"{allowed:.2g}"
                )
        peaks[name] = memory.mib
    return calls, peaks


def measure_job(
    models: Mapping[str, Any],
    gflops: Mapping[str, float],
    job: Mapping[str, Any],
    args: Any,
) -> dict[str, Any]:
    """Latency and peak memory of each model, and what follows from them."""
    height, width = job["size"]
    images = torch.randn(job["batch"], 3, height, width, device=args.device)
    calls, peaks = calls_of(models, job, images)
    warmup = 0 if args.device == "cpu" else 2  # a CPU has nothing to warm up but what has run
    times = measure(calls, args.device, args.rounds, warmup=warmup, quick=args.quick)
    runs = {
        name: {"latency_ms": times[name], "peak_memory_mb": peaks[name], "gflops": gflops.get(name)}
        for name in calls
    }
    speedup = 1 / times["expedited"]["ratio"]
    ratio = gflops["baseline"] / gflops["expedited"]
    if job["part"] == "backbone" and job["mode"] == "eager":
        spent = overhead(calls["expedited"])
        share = spent / times["baseline"]["median"]
        runs["operators"] = {"milliseconds": spent, "share_of_baseline": share}
    return {
        **job,
        **runs,
        "speedup": speedup,
        "ratio_of_multiplyadds": ratio,
        "efficiency": speedup / ratio,
    }


def jobs(args: Any, name: str) -> list[dict[str, Any]]:
    """What is measured of a system; what is compiled comes last, since it takes longest."""
    wanted = args.sizes and {tuple(map(int, size.split("x"))) for size in args.sizes}
    chosen = [s for s in sizes(SYSTEMS[name], args.quick) if not wanted or s in wanted]
    axes = (args.modes, chosen, args.batch, args.dtype)
    return [
        {
            "system": name,
            "part": args.part,
            "size": list(size),
            "batch": batch,
            "dtype": dtype,
            "mode": mode,
            **({"maps": True} if args.maps else {}),
        }
        for mode, size, batch, dtype in itertools.product(*axes)
    ]


@cli
def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--part", choices=["backbone", "model"], default="backbone")
    arguments.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    arguments.add_argument("--sizes", nargs="+", metavar="HxW", help="default: all of a system's")
    arguments.add_argument("--batch", nargs="+", type=int, default=[1])
    arguments.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    arguments.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager"])
    arguments.add_argument(
        "--maps", action="store_true", help="with detail maps (random), reconstruction residual"
    )
    args = arguments.parse_args(argv)
    # Random weights are meant, and operators that are not counted are named once elsewhere.
    logging.getLogger("expedite_d2").setLevel(logging.ERROR)
    recorder = Recorder("models", args)
    failed: list[str] = []
    for name in args.systems:
        todo = [job for job in jobs(args, name) if not recorder.late(label(job))]
        if not todo:
            continue
        cfg = config(SYSTEMS[name], args.device, args.quick, WITH_DETAIL if args.maps else [])
        models = pair(cfg)
        if args.part == "model" and "mask2former" in SYSTEMS[name].config:
            models["transformers"] = outside(cfg, models["baseline"])
        if args.maps:
            add_detail_maps(models["expedited"].backbone, todo[0]["size"])
        gflops = {
            size: {
                one: count_gflops(models[one], *size)[args.part]
                for one in ("baseline", "expedited")
            }
            for size in {tuple(job["size"]) for job in todo}
        }
        for job in todo:
            if recorder.late(label(job)):
                continue
            try:
                row = measure_job(models, gflops[tuple(job["size"])], job, args)
            except (RuntimeError, ValueError) as error:  # too large, not compiled, or wrong
                failed.append(f"{label(job)}: {str(error).splitlines()[0]}")
                recorder.skipped.append(failed[-1])
                if args.device != "cpu":
                    torch.cuda.empty_cache()
                continue
            recorder.add(row)
            print(f"{label(job)}: {row['speedup']:.3f}, {row['efficiency']:.3f}", flush=True)
    recorder.finish(table(recorder.results))
    if failed:
        raise ValueError("; ".join(failed))


def label(job: Mapping[str, Any]) -> str:
    """A job in one line."""
    height, width = job["size"]
    what = f"{job['system']} {job['part']} {height}x{width} batch {job['batch']}"
    maps = " with detail maps" if job.get("maps") else ""
    return f"{what} {job['dtype']} {job['mode']}{maps}"


def operators_share(row: Mapping[str, Any]) -> float | None:
    """Percent of the baseline's time that our operators take in the expedited backbone."""
    return 100 * row["operators"]["share_of_baseline"] if "operators" in row else None


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """One line a result."""
    names = ("baseline", "expedited", "transformers")
    rows = [
        {
            "system": TITLES[row["system"]] + (", detail maps" if row.get("maps") else ""),
            "part": row["part"],
            "size": "x".join(map(str, row["size"])),
            "batch": row["batch"],
            "dtype": row["dtype"],
            "mode": row["mode"],
            **{f"{n} ms": row[n]["latency_ms"]["median"] if n in row else None for n in names},
            "speed-up": row["speedup"],
            "multiply-adds": row["ratio_of_multiplyadds"],
            "efficiency": row["efficiency"],
            "operators, % of the baseline": operators_share(row),
        }
        for row in results
    ]
    return tabulate(rows, headers="keys", floatfmt=".4g")


if __name__ == "__main__":
    main()

"""Times whole models, or their backbones alone: baseline against expedited, in one run.

    python benchmarks/models.py --part backbone --size 1152 1152 --dtype bfloat16
    python benchmarks/models.py --part model --batch 4 --output models.json

Weights are random unless MODEL.WEIGHTS is among the overrides: they do not change the work. The
model part ends at the logits. Baseline and expedited alternate, so that drifting clocks hit both.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from common import environment, write_json
from tabulate import tabulate
from torch import Tensor, nn

from expedite_d2.config import cli, load_config
from expedite_d2.evaluation.compare import build_pair
from expedite_d2.evaluation.cost import count_gflops
from expedite_d2.evaluation.latency import PeakMemory, measure_interleaved

CONFIGS = [
    "configs/coco/panoptic/mask2former_swin_large_expedited.yaml",
    "configs/ade20k/semantic/mask2former_swin_large_expedited.yaml",
    "configs/coco/instance/mask2former_swin_large_expedited.yaml",
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def forward(model: Any, part: str, images: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    """One call of the part that is timed."""
    function = model.backbone if part == "backbone" else model.logits

    def call() -> object:
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            return function(images)

    return call


def measure(config: str, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """Latency, peak memory and multiply-adds of one config in one dtype."""
    height, width = args.size
    opts = ["MODEL.DEVICE", args.device, "TEST.DTYPE", dtype, *args.opts]
    if "MODEL.WEIGHTS" not in args.opts:
        opts += ["MODEL.WEIGHTS", ""]
    pair: tuple[nn.Module, nn.Module] = build_pair(load_config(config, opts))
    images = torch.randn(args.batch, 3, height, width, device=args.device)
    calls = [forward(model, args.part, images, DTYPES[dtype]) for model in pair]
    latencies = measure_interleaved(calls, args.device, repeats=args.repeats)
    peaks = []
    for call in calls:
        with torch.inference_mode(), PeakMemory(args.device) as memory:
            call()
        peaks.append(memory.mib)
    gflops = [count_gflops(model, height, width)[args.part] for model in pair]
    runs = [
        {"latency_ms": asdict(latency), "peak_memory_mb": peak, "gflops": cost}
        for latency, peak, cost in zip(latencies, peaks, gflops, strict=True)
    ]
    return {
        "config": config,
        "part": args.part,
        "dtype": dtype,
        "size": [height, width],
        "batch": args.batch,
        "baseline": runs[0],
        "expedited": runs[1],
        "speedup": latencies[0].median / latencies[1].median,
        "gflops_ratio": gflops[1] / gflops[0],
    }


@cli
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=["backbone", "model"], default="backbone")
    parser.add_argument("--config-files", nargs="+", default=CONFIGS, metavar="FILE")
    parser.add_argument("--size", nargs=2, type=int, default=[1152, 1152], metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", metavar="FILE", help="write the results as JSON")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    args = parser.parse_args()
    facts = environment(args.device)
    print(json.dumps(facts))
    results = [measure(config, dtype, args) for config in args.config_files for dtype in args.dtype]
    rows = [
        {
            "config": result["config"].removeprefix("configs/"),
            "dtype": result["dtype"],
            "baseline ms": result["baseline"]["latency_ms"]["median"],
            "expedited ms": result["expedited"]["latency_ms"]["median"],
            "speed-up": result["speedup"],
            "1 / gflops ratio": 1 / result["gflops_ratio"],
        }
        for result in results
    ]
    print(tabulate(rows, headers="keys", floatfmt=".4g"))
    if args.output:
        write_json(args.output, {**facts, "results": results})


if __name__ == "__main__":
    main()

"""Times each operator's kernel against other ways to the same result, side by side in one run.

    python benchmarks/operators.py                     # what this machine has: GPU, else CPU
    python benchmarks/operators.py --device cpu --dtype float32 --cases small_windows small_image

Compared are the kernel, its PyTorch twin, the twin under torch.compile, and the dense formulation
of the method's released code (benchmarks/released.py). Results are compared first: a case where
they differ is an error, not a row. `floor` is the time that the bytes or the multiply-adds of the
operator alone would take at the bandwidth and the rate that this run measured with a copy and a
matrix product.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import released
import torch
from common import environment, write_json
from tabulate import tabulate
from torch import Tensor

from expedite_d2 import _ext
from expedite_d2.ops import reference

KERNELS = torch.ops.expedite_d2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# A sample lasts at least this long, so that the clock and the synchronisation do not count.
SAMPLE_SECONDS = 0.02
# Automatic temperature: the largest relative difference of results is that of rounding the output.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}


class Case(NamedTuple):
    """Tokens (B, H, W, C), the cells of a window or image, the window, topk, sharpness."""

    shape: tuple[int, int, int, int]
    clusters: tuple[int, int]
    window: tuple[int, int] | None
    topk: int = 4
    iterations: int = 5
    neighbourhood: int = 5

    @property
    def temperature(self) -> float:
        return 8.0 if self.window is None else 32.0


CASES = {
    # Stage 3 of Swin-L at 1152 x 1152; stage 2 of Swin-T at 1024 x 2048.
    "swin_l_1152": Case((1, 72, 72, 768), (8, 8), (12, 12)),
    "swin_l_1152_batch4": Case((4, 72, 72, 768), (8, 8), (12, 12)),
    "swin_t_1024x2048": Case((1, 126, 252, 192), (5, 5), (7, 7)),
    # Segmenter ViT-L at 640 x 640, and a ViT-H at 1024 x 1024 with more clusters.
    "vit_l_640": Case((1, 40, 40, 1024), (28, 28), None),
    "vit_h_1024": Case((1, 64, 64, 1280), (44, 44), None),
    "small_windows": Case((1, 24, 24, 96), (8, 8), (12, 12)),
    "small_image": Case((1, 20, 20, 96), (10, 10), None),
}


class Work(NamedTuple):
    """What an operator must at least do: bytes moved, multiply-adds."""

    bytes: float
    operations: float


class Inputs(NamedTuple):
    case: Case
    tokens: Tensor
    spread: Tensor
    centres: Tensor
    indices: Tensor
    weights: Tensor
    refined: Tensor
    dense: Tensor  # the released code's weights


def make_inputs(case: Case, device: str, dtype: torch.dtype) -> Inputs:
    """Tokens that vary smoothly, as a network's do, with detail on top."""
    generator = torch.Generator().manual_seed(0)
    batch, height, width, channels = case.shape
    smooth = torch.randn(batch, channels, -(-height // 4), -(-width // 4), generator=generator)
    smooth = torch.nn.functional.interpolate(smooth, size=(height, width), mode="bilinear")
    detail = torch.randn(batch, height, width, channels, generator=generator)
    tokens = (smooth.permute(0, 2, 3, 1) + 0.3 * detail).to(device, dtype).contiguous()
    grid = (list(case.clusters), list(case.window) if case.window else None)
    spread = reference.token_spread_ref(tokens, *grid, case.neighbourhood)
    centres = reference.token_cluster_ref(
        tokens, *grid, case.iterations, case.neighbourhood, case.temperature, spread
    )
    match = (*grid, case.topk, case.temperature, spread)
    indices, weights = reference.token_match_ref(tokens, centres, *match)
    refined = centres + 0.1 * torch.randn(centres.shape, generator=generator).to(centres)
    dense = released.dense_weights(
        tokens, centres, case.clusters, case.window, case.topk, case.temperature, spread
    )
    return Inputs(case, tokens, spread, centres, indices, weights, refined, dense)


def work(x: Inputs) -> dict[str, Work]:
    """The least that each operator must do."""
    batch, height, width, channels = x.case.shape
    side = x.case.window or (height, width)
    size = x.tokens.element_size()
    count = batch * height * width
    cells = x.case.clusters[0] * x.case.clusters[1]
    candidates = 1.0
    for length, clusters in zip(side, x.case.clusters, strict=True):
        radius = x.case.neighbourhood // 2
        homes = [y * clusters // length for y in range(length)]
        found = [min(i + radius, clusters - 1) - max(i - radius, 0) + 1 for i in homes]
        candidates *= sum(found) / length
    tokens, centres = count * channels * size, x.centres.numel() * size
    matches = count * x.case.topk
    pairs = count * candidates * channels
    return {
        "token_spread": Work(tokens, pairs),
        "token_cluster": Work(tokens + centres, 2 * x.case.iterations * pairs),
        "token_match": Work(tokens + centres + 8 * matches, count * cells * channels),
        "token_reconstruct": Work(2 * (tokens + centres) + 8 * matches, matches * channels),
    }


def variants(x: Inputs, compiled: bool) -> dict[str, dict[str, Callable[[], Any]]]:
    """Operator -> variant -> call. The kernel stands first: the others are compared to it."""
    case = x.case
    grid = (list(case.clusters), list(case.window) if case.window else None)
    arguments: dict[str, tuple[Any, ...]] = {
        "token_spread": (x.tokens, *grid, case.neighbourhood),
        "token_cluster": (
            *(x.tokens, *grid, case.iterations, case.neighbourhood),
            *(case.temperature, x.spread),
        ),
        "token_match": (x.tokens, x.centres, *grid, case.topk, case.temperature, x.spread),
        "token_reconstruct": (x.refined, x.indices, x.weights, x.tokens, x.centres),
    }
    calls: dict[str, dict[str, Callable[[], Any]]] = {}
    for name, args in arguments.items():
        kernel, twin = getattr(KERNELS, name).default, getattr(reference, f"{name}_ref")
        calls[name] = {
            "kernel": partial(kernel, *args),
            "twin": partial(twin, *args),
        }
        if compiled:
            torch._dynamo.reset()
            fast = torch.compile(twin, dynamic=False)
            calls[name]["compiled"] = partial(fast, *args)
    shape = (case.clusters, case.window)
    last = (case.topk, case.temperature, x.spread)
    calls["token_cluster"]["released"] = lambda: released.cluster(
        *(x.tokens, *shape, case.iterations, case.neighbourhood, case.temperature, x.spread)
    )
    calls["token_match"]["released"] = lambda: released.dense_weights(
        *(x.tokens, x.centres, *shape, *last)
    )
    calls["token_reconstruct"]["released"] = lambda: released.reconstruct(
        *(x.refined, x.dense, *shape, x.tokens, x.centres)
    )
    return calls


def error(name: str, x: Inputs, result: Any, expected: Any) -> float:
    """Largest difference, relative to the largest value."""
    if name == "token_match":
        # Indices may differ where two centres are equally far; then the weights are the same.
        expected = expected[1]
        result = result[1] if isinstance(result, tuple) else result.topk(x.case.topk, 2).values
        if result.shape != expected.shape:  # the released code's order is by windows
            expected = released._windows(expected, x.case.window or x.case.shape[1:3])
        expected, result = expected.sort(-1).values, result.sort(-1).values
    difference = (result.double() - expected.double()).abs().max()
    return (difference / expected.double().abs().max()).item()


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def sample(call: Callable[[], Any], device: str, calls: int) -> float:
    """Seconds a call, over `calls` of them."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronise(device)
    return (time.perf_counter() - start) / calls


def measure(calls: dict[str, Callable[[], Any]], device: str, rounds: int) -> dict[str, Any]:
    """Seconds of each variant in alternation, and the ratios to the first one, round by round."""
    counts = {}
    for name, call in calls.items():
        sample(call, device, 3)
        counts[name] = max(1, int(SAMPLE_SECONDS / sample(call, device, 1)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(sample(call, device, counts[name]))
    first = next(iter(calls))
    return {
        name: {
            "milliseconds": 1e3 * statistics.median(values),
            "least": 1e3 * min(values),
            "most": 1e3 * max(values),
            "ratio": statistics.median(v / k for v, k in zip(values, times[first], strict=True)),
        }
        for name, values in times.items()
    }


def machine_rates(device: str) -> tuple[float, float]:
    """Bytes and float32 multiply-adds a second, as a copy and a matrix product reach them."""
    on_cpu = device == "cpu"
    source = torch.zeros((1 << 24) if on_cpu else (1 << 28), device=device)
    target = torch.empty_like(source)
    side = 1024 if on_cpu else 8192
    a = torch.zeros(side, side, device=device)
    copy, product = (lambda: target.copy_(source)), (lambda: a @ a)
    for call in (copy, product):
        sample(call, device, 3)
    copied = min(sample(copy, device, 3) for _ in range(5))
    multiplied = min(sample(product, device, 3) for _ in range(5))
    return 2 * source.numel() * 4 / copied, side**3 / multiplied


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds (default 10)")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--output", metavar="FILE", help="write the results as JSON")
    args = parser.parse_args()
    key = "CPU" if args.device == "cpu" else "CUDA"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("expedite_d2::token_spread", key):
        sys.exit(f"operators.py times the {key} kernels, and none are built ({_ext.ext_error()})")

    # Exact float32 products, for the rate as for what is compared.
    torch.set_float32_matmul_precision("highest")
    bandwidth, rate = machine_rates(args.device)
    facts = environment(args.device)
    facts |= {"gigabytes_per_second": bandwidth / 1e9, "gigamultiplyadds_per_second": rate / 1e9}
    print(json.dumps(facts))
    rows, results = [], []
    for case_name in args.cases:
        for dtype_name in args.dtype:
            with torch.inference_mode():
                x = make_inputs(CASES[case_name], args.device, DTYPES[dtype_name])
                for name, calls in variants(x, not args.no_compile).items():
                    expected = calls["twin"]()
                    errors = {v: error(name, x, call(), expected) for v, call in calls.items()}
                    wrong = {
                        v: e for v, e in errors.items() if not e <= TOLERANCE[DTYPES[dtype_name]]
                    }
                    if wrong:
                        sys.exit(f"{case_name} {dtype_name} {name}: results differ: {wrong}")
                    floor = work(x)[name]
                    floor_ms = 1e3 * max(floor.bytes / bandwidth, floor.operations / rate)
                    times = measure(calls, args.device, args.rounds)
                    share = floor_ms / times["kernel"]["milliseconds"]
                    results.append(
                        {
                            "case": case_name,
                            "dtype": dtype_name,
                            "operator": name,
                            "variants": times,
                            "errors": errors,
                            "floor_milliseconds": floor_ms,
                            "share_of_floor": share,
                        }
                    )
                    ratios = [times[v]["ratio"] if v in times else None for v in list(calls)[1:]]
                    others = dict(zip(list(calls)[1:], ratios, strict=True))
                    rows.append(
                        {
                            "case": case_name,
                            "dtype": dtype_name,
                            "operator": name,
                            "kernel ms": times["kernel"]["milliseconds"],
                            "floor": f"{100 * share:.0f} %",
                            **{f"{v} / kernel": others.get(v) for v in others},
                        }
                    )
    print(tabulate(rows, headers="keys", floatfmt=".3g"))
    if args.output:
        write_json(args.output, {**facts, "results": results})


if __name__ == "__main__":
    main()

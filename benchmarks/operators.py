"""Times each operator's kernel against other ways to the same result, side by side in one run.

    python -m benchmarks.operators                     # what this machine has: GPU, else CPU
    python -m benchmarks.operators --device cpu --dtype float32 --cases swin_l_1152 vit_l_640

Compared are the kernel (on a GPU also replayed in a CUDA graph, which is its time on the device),
its reference in plain PyTorch, the reference under torch.compile, and the dense formulation of the
method's released code (benchmarks/released.py). First all results are compared with the reference's
in float64: where one differs, nothing is timed, and the run ends with an error. The floor is the
time that the bytes or the multiply-adds of the operator alone would take at the bandwidth and the
rate that this run measured with a copy and a matrix product. Inputs rotate through more memory than
the cache holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from benchmarks.attention_table import ATTENTION
from benchmarks.common import (
    DTYPES,
    Call,
    Recorder,
    cache_bytes,
    ceilings,
    compiled,
    exact_products,
    graphed,
    measure,
    parser,
    rotating,
)
from benchmarks.merging_table import MERGING
from benchmarks.operator_table import TOKENS, Operator
from expedite_d2 import _ext
from expedite_d2.errors import cli

SUITES = (TOKENS, MERGING, ATTENTION)
# Relative to the norm of the float64 result: what rounding makes of sums and outputs. Of float32
# sums that is 1e-6, but rounds of sharp k-means let single tokens change sides.
TOLERANCE = {"float32": 5e-3, "bfloat16": 1e-2, "float16": 5e-3}
# Enough to turn over any cache, few enough for small machines.
MOST_SETS = 8


def tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A (named) tuple with its tensors changed, those in tuples within it, too."""
    if isinstance(value, Tensor):
        return change(value)
    if not isinstance(value, tuple):
        return value
    parts = [tensors(part, change) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)


def in_float64(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments for the oracle."""
    return tensors(arguments, lambda t: t.double() if t.is_floating_point() else t)


def input_sets(inputs: Any, device: str) -> list[Any]:
    """The inputs and copies of them, together more than twice the cache."""
    bytes_ = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal bytes_
        bytes_ += tensor.numel() * tensor.element_size()
        return tensor

    tensors(inputs, count)
    sets = min(-(-2 * cache_bytes(device) // bytes_), MOST_SETS)
    return [inputs, *(tensors(inputs, Tensor.clone) for _ in range(sets - 1))]


def variants(
    operator: Operator, sets: Sequence[Any], modes: Sequence[str]
) -> dict[str, list[Call]]:
    """Variant -> a call for each set of inputs. The kernel stands first."""
    arguments = [operator.arguments(inputs) for inputs in sets]
    calls: dict[str, list[Call]] = {}
    calls["kernel"] = [partial(operator.kernel, *args) for args in arguments]
    calls["reference"] = [partial(operator.reference, *args) for args in arguments]
    if "compiled" in modes:
        torch._dynamo.reset()  # the number of shapes that it keeps is limited
        fast = compiled(operator.reference)
        calls["compiled"] = [partial(fast, *args) for args in arguments]
    dense = [operator.dense(inputs) for inputs in sets]
    if "released" in modes and None not in dense:
        calls["released"] = [call for call in dense if call is not None]
    return {name: group for name, group in calls.items() if name == "kernel" or name in modes}


def check(
    label: str, operator: Operator, inputs: Any, calls: dict[str, list[Call]], dtype: str
) -> dict[str, float]:
    """Relative differences from the float64 result.

    Raises:
        ValueError: one is too large.
    """
    expected = operator.reference(*in_float64(operator.arguments(inputs)))
    errors = {name: operator.difference(group[0](), expected) for name, group in calls.items()}
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE[dtype]}
    if wrong:
        raise ValueError(f"{label}: results differ from the float64 one: {wrong}")
    return errors


def time_operator(
    calls: dict[str, list[Call]], device: str, rounds: int, quick: bool
) -> dict[str, dict[str, float]]:
    """Milliseconds of each variant, on a GPU also of the kernel in a CUDA graph."""
    timed = {name: rotating(group) for name, group in calls.items()}
    steps = {}
    if torch.device(device).type == "cuda":
        timed["kernel in a graph"] = graphed(calls["kernel"])
        steps["kernel in a graph"] = len(calls["kernel"])
    return measure(timed, device, rounds, steps=steps, quick=quick)


@cli
def main(argv: Sequence[str] | None = None) -> None:
    cases = [name for suite in SUITES for name in suite.cases]
    modes = ["reference", "compiled", "released"]
    arguments = parser(__doc__)
    arguments.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    arguments.add_argument("--cases", nargs="+", choices=cases)
    arguments.add_argument("--modes", nargs="+", choices=modes, default=modes)
    args = arguments.parse_args(argv)
    key = "CPU" if args.device == "cpu" else "CUDA"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("expedite_d2::token_spread", key):
        raise ValueError(f"no {key} kernels are built that could be timed ({_ext.ext_error()})")
    chosen = args.cases or [name for name in cases if name.startswith("quick") == args.quick]
    torch.manual_seed(0)
    failed: list[str] = []
    with exact_products(), torch.inference_mode():
        recorder = Recorder("operators", args, **ceilings(args.device, args.dtype, args.quick))
        for suite in SUITES:
            for case in (case for case in suite.cases if case in chosen):
                for dtype in args.dtype:
                    inputs = suite.inputs(suite.cases[case], args.device, DTYPES[dtype])
                    sets = input_sets(inputs, args.device)
                    for name, operator in suite.operators.items():
                        label = f"{name} {case} {dtype}"
                        if recorder.late(label):
                            continue
                        calls = variants(operator, sets, args.modes)
                        try:
                            errors = check(label, operator, inputs, calls, dtype)
                        except ValueError as error:
                            recorder.skipped.append(str(error))
                            failed.append(str(error))
                            continue
                        times = time_operator(calls, args.device, args.rounds, args.quick)
                        work = operator.work(inputs)
                        row = {
                            "case": case,
                            "dtype": dtype,
                            "operator": name,
                            "megabytes": work.bytes / 1e6,
                            "megamultiplyadds": work.operations / 1e6,
                            "variants": times,
                            "errors": errors,
                        }
                        recorder.add({**row, **floor(row, recorder.head)})
    recorder.finish(table(recorder.results))
    if failed:
        raise ValueError("; ".join(failed))


def floor(row: Mapping[str, Any], machine: Mapping[str, Any]) -> dict[str, Any]:
    """A result's floor, what bounds it, and the share of it that the kernel reaches.

    Sums are taken in float32, so that its products are open to 16-bit tokens too.
    """
    rates = machine["gigamultiplyadds_per_second"]
    memory = row["megabytes"] / machine["gigabytes_per_second"]
    products = row["megamultiplyadds"] / max(rates[row["dtype"]], rates.get("float32", 0))
    times = row["variants"]
    kernel = times.get("kernel in a graph", times["kernel"])["median"]
    return {
        "floor_ms": max(memory, products),
        "bound": "memory" if memory >= products else "products",
        "share_of_floor": max(memory, products) / kernel,
    }


def table(results: list[dict[str, Any]]) -> str:
    """One line per result: the kernel's time, its floor, and how much longer the others take."""
    rows = [
        {
            "case": row["case"],
            "dtype": row["dtype"],
            "operator": row["operator"],
            **{
                f"{name} ms" if name.startswith("kernel") else f"{name} / kernel": (
                    times["median"] if name.startswith("kernel") else times["ratio"]
                )
                for name, times in row["variants"].items()
            },
            "of the floor": f"{100 * row['share_of_floor']:.0f} %",
            "bound": row["bound"],
        }
        for row in results
    ]
    return tabulate(rows, headers="keys", floatfmt=".3g")


if __name__ == "__main__":
    main()

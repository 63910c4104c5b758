"""What the benchmarks share: the facts that numbers depend on, clocks, and how results are kept."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from expedite_d2 import _ext
from expedite_d2.d2.modeling.upcast import upcast_product
from expedite_d2.files import replacing

Call = Callable[[], Any]

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Milliseconds that a timing lasts at least, so that neither the clock nor one launch counts.
SAMPLE = 20.0
# torch.compile's backend. Tests have a cheaper one.
BACKEND = "inductor"


def environment(device: str) -> dict[str, Any]:
    """Device, threads, versions, the allocator's settings, commit and time of day."""
    names = sorted(n for n in os.environ if n.startswith("MALLOC_") or n == "GLIBC_TUNABLES")
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    with contextlib.suppress(FileNotFoundError):
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    on_gpu = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else _processor(),
        "device_type": torch.device(device).type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "python": platform.python_version(),
        "extension": _ext.build_info(),
        "allocator": {name: os.environ[name] for name in names},
        "commit": commit or None,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    """The CPU and its instructions: clouds call several generations by one name."""
    text = ""
    with contextlib.suppress(OSError):  # only Linux has it
        text = Path("/proc/cpuinfo").read_text()
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    name = found[1].strip() if found else platform.processor() or platform.machine()
    instructions = torch.backends.cpu.get_cpu_capability()
    if re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", text):
        instructions += " with bfloat16"
    return f"{name}, {instructions}"


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the arguments that every benchmark has."""
    result = argparse.ArgumentParser(description=description.strip().splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    result.add_argument("--device", default=default, help="default: the GPU, if there is one")
    result.add_argument("--output", metavar="FILE", help="write the results as JSON")
    result.add_argument("--rounds", type=int, default=10, help="timed rounds (default 10)")
    result.add_argument(
        "--seconds", type=float, help="begin nothing more after so many, and say what is left out"
    )
    result.add_argument(
        "--quick", action="store_true", help="tiny sizes, to prove that every path runs"
    )
    return result


class Recorder:
    """The results of one run, written after each, so that a run cut short keeps what it has.

    Args:
        benchmark: name of the benchmark; with the run's facts the head of the file.
        args: of a `parser`.
        facts: what else was measured beside the results.
    """

    def __init__(self, benchmark: str, args: argparse.Namespace, **facts: Any) -> None:
        self.path: str | None = args.output
        self.seconds: float | None = args.seconds
        self.start = time.monotonic()
        self.head = {
            "benchmark": benchmark,
            "quick": args.quick,
            "rounds": args.rounds,
            **environment(args.device),
            **facts,
        }
        self.results: list[dict[str, Any]] = []
        self.skipped: list[str] = []
        if self.path:
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        print(json.dumps(self.head), flush=True)

    def late(self, what: str) -> bool:
        """Whether there is no time left to begin something; it is then noted as left out."""
        late = self.seconds is not None and time.monotonic() - self.start > self.seconds
        if late:
            self.skipped.append(what)
            self._write()
        return late

    def add(self, row: dict[str, Any]) -> None:
        """Keep one result."""
        self.results.append(row)
        self._write()

    def finish(self, table: str) -> None:
        """Print the results and what is left out, and write them a last time."""
        self._write()
        print(table)
        for what in self.skipped:
            print(f"left out: {what}")

    def _write(self) -> None:
        if self.path:
            whole = {**self.head, "results": self.results, "skipped": self.skipped}
            with replacing(self.path) as partial:
                partial.write_text(json.dumps(whole, indent=1) + "\n")


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """torch.compile for one fixed shape."""
    return torch.compile(function, backend=BACKEND, dynamic=False, **options)


def rotating(calls: Sequence[Call]) -> Call:
    """The calls in turn, so that none finds its own inputs in the cache."""
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def graphed(calls: Sequence[Call]) -> Call:
    """Replays the calls, all of them captured in one CUDA graph: without the host's share."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is initialised once must not be captured
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]

    def replay() -> Any:
        graph.replay()
        return kept  # the graph writes to the results' memory as long as it is replayed

    return replay


def elapsed(call: Call, device: str, calls: int) -> float:
    """Milliseconds per call, over `calls` of them: by events on a GPU, else by the clock."""
    if torch.device(device).type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return 1e3 * (time.perf_counter() - start) / calls
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    for _ in range(calls):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / calls


@torch.inference_mode()
def measure(
    calls: Mapping[str, Call],
    device: str,
    rounds: int,
    *,
    quick: bool = False,
    warmup: int = 2,
    steps: Mapping[str, int] | None = None,
) -> dict[str, dict[str, float]]:
    """Times calls in alternation, so that drifting clocks hit all of them alike.

    Args:
        calls: what to compare, by name; the first is what the others are compared with.
        device: where their work runs.
        rounds: timings of each.
        quick: whether a timing may be a single call; else it lasts `SAMPLE` at least.
        warmup: calls of each before; 0 where they have run already, and last longer than `SAMPLE`.
        steps: how many pieces of work one call holds, where it holds several.

    Returns:
        Of each its median, least and greatest milliseconds, and the median of the ratios to the
        first one, round by round.
    """
    counts = {}
    for name, call in calls.items():
        once = SAMPLE
        for _ in range(warmup):
            once = elapsed(call, device, 1)
        counts[name] = 1 if quick else min(max(1, int(SAMPLE / max(once, 1e-3))), 2000)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            taken = elapsed(call, device, counts[name])
            times[name].append(taken / (steps or {}).get(name, 1))
    first = times[next(iter(times))]
    return {
        name: {
            "median": statistics.median(values),
            "min": min(values),
            "max": max(values),
            "ratio": statistics.median(v / f for v, f in zip(values, first, strict=True)),
        }
        for name, values in times.items()
    }


@torch.inference_mode()
def ceilings(device: str, dtypes: Sequence[str], quick: bool = False) -> dict[str, Any]:
    """What this machine reaches: bytes per second of a copy, multiply-adds per second of a product.

    On random data: products of zeros run faster than any real one. A product is taken as layers
    take it, in float32 where a CPU is slow in the dtype.
    """
    on_gpu = torch.device(device).type == "cuda"
    count, side = (2**28, 8192) if on_gpu else (2**26, 2048)
    if quick:
        count, side = 2**16, 64
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    copied = _least(lambda: target.copy_(source), device, quick)
    rates = {}
    for name in dtypes:
        a, b = (torch.randn(side, side, device=device).to(DTYPES[name]) for _ in range(2))
        rates[name] = side**3 / _least(partial(upcast_product, F.linear, a, b, None), device, quick)
    return {
        "gigabytes_per_second": 2 * source.numel() * source.element_size() / copied / 1e6,
        "gigamultiplyadds_per_second": {name: rate / 1e6 for name, rate in rates.items()},
    }


def _least(call: Call, device: str, quick: bool) -> float:
    """Milliseconds of the best of a few timings."""
    return measure({"call": call}, device, rounds=5, quick=quick)["call"]["min"]


def difference(result: Tensor, expected: Tensor) -> float:
    """‖result − expected‖ / ‖expected‖, infinite where anything is not finite."""
    if result.shape != expected.shape or not result.isfinite().all():
        return float("inf")
    expected = expected.double()
    return ((result.double() - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def cache_bytes(device: str) -> int:
    """Size of the last cache before the device's memory."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [64 * 2**20]  # where the system does not tell
    with contextlib.suppress(OSError, ValueError):
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        sizes = [int(text.removesuffix("K")) * 2**10]
    return sizes[0]


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Float32 products in float32, for ceilings as for what is compared."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def short(path: str | os.PathLike) -> str:
    """A file's name below the repository."""
    return os.path.relpath(path, ROOT)

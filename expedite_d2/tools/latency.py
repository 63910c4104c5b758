"""Wall-clock latency and peak memory of a callable, on any device."""

from __future__ import annotations

import ctypes
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")

_STATM = Path("/proc/self/statm")
# A forward pass takes tens of milliseconds and more; 1 ms sees its peaks and costs no throughput.
_SAMPLE_SECONDS = 1e-3
_MIB = 2**20


@dataclass(frozen=True)
class Latency:
    """Spread of repeated timings, in milliseconds."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Latency:
        """Summarise timings; at least one."""
        if not milliseconds:
            raise ValueError("latency: expected at least one timing, got none")
        return cls(min(milliseconds), statistics.median(milliseconds), max(milliseconds))


def time_call(function: Callable[[], Result], device: torch.device | str) -> tuple[Result, float]:
    """Call once and time it.

    The device is synchronised before the clock starts, so that earlier work is not charged to this
    call, and before it stops, so that all of this call's work is. What is timed is what a user
    waits for: launches and host work included, unlike the span between two CUDA events.

    Args:
        function: what to time.
        device: where its work runs.

    Returns:
        The call's result and the milliseconds it took.
    """
    _synchronise(device)
    start = time.perf_counter()
    result = function()
    _synchronise(device)
    return result, 1e3 * (time.perf_counter() - start)


def measure_interleaved(
    functions: Sequence[Callable[[], object]],
    device: torch.device | str,
    *,
    warmup: int = 3,
    repeats: int = 10,
) -> list[Latency]:
    """Time several callables in turn (A B A B …), so that drifting clocks hit all alike.

    Args:
        functions: what to compare.
        device: where their work runs.
        warmup: untimed rounds first: caches, autotuning, lazy initialisation.
        repeats: timed rounds, at least one.

    Returns:
        A latency for each callable, in the same order.
    """
    if repeats < 1:
        raise ValueError(f"latency: repeats must be at least 1, got {repeats}")
    timings: list[list[float]] = [[] for _ in functions]
    with torch.inference_mode():
        for round_index in range(warmup + repeats):
            for times, function in zip(timings, functions, strict=True):
                _, milliseconds = time_call(function, device)
                if round_index >= warmup:
                    times.append(milliseconds)
    return [Latency.of(times) for times in timings]


def measure_latency(
    function: Callable[[], object],
    device: torch.device | str,
    *,
    warmup: int = 3,
    repeats: int = 10,
) -> Latency:
    """Time one callable: see ``measure_interleaved``."""
    return measure_interleaved([function], device, warmup=warmup, repeats=repeats)[0]


class PeakMemory:
    """Context that measures the peak memory of what runs inside, in MiB, as ``.mib`` afterwards.

    On CUDA: the most that tensors held at one moment on this device (weights included), from the
    caching allocator. On a CPU under Linux: how far the resident set grew above its size at the
    start (so without the weights), sampled every millisecond by a thread: freed memory is handed
    back to the system first, because what the allocator had kept would hide the growth. Pages
    that live shorter than a sample are missed. Elsewhere None: nothing honest can be read there.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.mib: float | None = None
        self._sampler: _ResidentSampler | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.device.type == "cpu" and _STATM.exists():
            self._sampler = _ResidentSampler()
            self._sampler.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.mib = torch.cuda.max_memory_allocated(self.device) / _MIB
        elif self._sampler is not None:
            self.mib = self._sampler.stop() / _MIB


class _ResidentSampler(threading.Thread):
    """Follows this process's resident set until stopped."""

    def __init__(self) -> None:
        super().__init__(name="resident-set-sampler", daemon=True)
        self._done = threading.Event()
        _trim_heap()
        self._first = self._peak = _resident_bytes()

    def run(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            self._peak = max(self._peak, _resident_bytes())

    def stop(self) -> int:
        """Bytes between the start and the peak."""
        self._done.set()
        self.join()
        return max(self._peak, _resident_bytes()) - self._first


def _resident_bytes() -> int:
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _trim_heap() -> None:
    """Give freed heap memory back to the system, where the C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _synchronise(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)

"""Timing and memory of callables whose cost is known."""

from __future__ import annotations

import sys
import time

import pytest
import torch

from expedite_d2.tools.latency import (
    Latency,
    PeakMemory,
    measure_interleaved,
    measure_latency,
    time_call,
)


def test_latency_summarises():
    assert Latency.of([3.0, 1.0, 8.0, 2.0]) == Latency(min=1.0, median=2.5, max=8.0)
    with pytest.raises(ValueError, match="at least one timing"):
        Latency.of([])


def test_time_call_returns_the_result_and_its_milliseconds():
    result, milliseconds = time_call(lambda: time.sleep(0.02) or "done", "cpu")
    assert result == "done"
    assert 20 <= milliseconds < 2000


def test_callables_are_timed_in_turn_after_the_warm_up():
    calls: list[str] = []
    latencies = measure_interleaved(
        [lambda: calls.append("a"), lambda: calls.append("b")], "cpu", warmup=1, repeats=2
    )
    assert calls == ["a", "b"] * 3
    assert len(latencies) == 2


def test_first_call_is_not_counted():
    pauses = iter([0.2, 0.0, 0.0])
    assert measure_latency(lambda: time.sleep(next(pauses)), "cpu", warmup=1, repeats=2).max < 100


def test_repeats_below_one_are_refused():
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        measure_latency(lambda: None, "cpu", repeats=0)


@pytest.mark.skipif(sys.platform != "linux", reason="the resident set is read from /proc")
def test_peak_memory_on_cpu_sees_what_was_freed_again():
    with PeakMemory("cpu") as memory:
        block = torch.ones(64 * 2**18)  # 64 MiB
        time.sleep(0.02)
        del block
    assert memory.mib == pytest.approx(64, abs=8)
    with PeakMemory("cpu") as memory:
        pass
    assert 0 <= memory.mib < 8


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_memory_and_latency_on_cuda():
    with PeakMemory("cuda") as memory:
        block = torch.ones(64 * 2**18, device="cuda")
        del block
    assert memory.mib >= 64
    matrix = torch.rand(4096, 4096, device="cuda")
    # 137 G multiply-adds cannot be done in 0.1 ms: without synchronisation this would be faster.
    assert measure_latency(lambda: matrix @ matrix @ matrix, "cuda", repeats=3).min > 0.1

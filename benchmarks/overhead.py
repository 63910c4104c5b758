"""What reducing tokens and undoing it takes of a call: the part of the time that saves nothing."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.common import Call

# Clustering, or merging and grouping; undoing them, with the products of detail maps.
_RANGES = ("expedite_d2.reduce", "expedite_d2.reconstruct")
# Outside of these: the means that grouped attention sees, and what each token reads of it.
_OPERATORS = "expedite_d2::token_"


@torch.inference_mode()
def overhead(call: Call, calls: int = 3) -> float:
    """Milliseconds of a call in which tokens are reduced, grouped and reconstructed.

    They are the profiler's: of the GPU where work runs there, else of the CPU.

    Args:
        call: not compiled, since ranges end where the compiler begins.
        calls: how many are profiled; their median counts, as the first pays for the profiler.
    """
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        for _ in range(calls):
            with record_function("call"):
                call()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
    events = [e for e in profiler.events() or () if e.device_type == DeviceType.CPU]
    on_gpu = any(event.device_time_total for event in events)
    spent: defaultdict[Any, float] = defaultdict(float)
    for event in events:
        around = list(_ancestors(event))
        if around and _is_ours(event) and not any(map(_is_ours, around)):
            spent[around[-1].id] += event.device_time_total if on_gpu else event.cpu_time_total
    return statistics.median(spent.values()) / 1e3 if spent else 0.0


def _is_ours(event: Any) -> bool:
    return event.name in _RANGES or event.name.startswith(_OPERATORS)


def _ancestors(event: Any) -> Iterator[Any]:
    """The events around an event, the innermost first."""
    while (event := event.cpu_parent) is not None:
        yield event

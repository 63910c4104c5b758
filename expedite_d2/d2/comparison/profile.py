"""Where the time of an evaluation goes: a torch.profiler trace, and its named ranges as a table.

The ranges are those that `profiler_range` opens in the models, which Nsight Systems sees, too.
"""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function

from expedite_d2.d2.checkpoint import load_weights
from expedite_d2.d2.comparison.compare import build_models
from expedite_d2.d2.data import build_test_loader
from expedite_d2.d2.modeling.build import build_model
from expedite_d2.d2.progress import progress
from expedite_d2.d2.provider import CfgNode, comm
from expedite_d2.files import replacing

logger = logging.getLogger(__name__)

_PREFIX = "expedite_d2."
_ROOT = f"{_PREFIX}model"
_ITERATIONS = 3
# The first passes pay for lazy initialisation, the choice of kernels and the profiler itself.
_WARMUP = 2
_OPERATORS = 15  # rows of the table of operators

Names = tuple[str, ...]


@dataclass(frozen=True)
class Cost:
    """How often something ran and how long it took, per image.

    Attributes:
        calls: of it.
        milliseconds: on the GPU where there is one (the kernels that were launched inside), else
            on the CPU.
        host_milliseconds: on the CPU, waiting for the GPU included.
    """

    calls: float
    milliseconds: float
    host_milliseconds: float


@dataclass(frozen=True)
class Profile:
    """One model's profile.

    Attributes:
        ranges: by the names from the outermost range inwards, without "expedite_d2.", in the order
            of their first appearance.
        operators: by name, time without that of operators inside, the longest first.
    """

    ranges: Mapping[Names, Cost]
    operators: Mapping[str, Cost]


def profile(cfg: CfgNode, iterations: int = _ITERATIONS) -> str:
    """Profile the first images of ``DATASETS.TEST[0]``, one per iteration.

    The baseline is profiled and, with ``MODEL.EXPEDITE.ENABLED``, the expedited model. Written are
    ``OUTPUT_DIR/profile_baseline.json`` and ``profile_expedited.json`` (traces for Perfetto or
    chrome://tracing) and ``profile.txt``, which is printed, too. The main process works alone.

    Args:
        cfg: The config, from ``load_config``.
        iterations: Images that are profiled; the first ones come again if there are fewer.

    Returns:
        What ``profile.txt`` holds, "" in other processes than the main one.

    Raises:
        ValueError: no data set, one without images, or weights of another model.
        FileNotFoundError: weights or data are not where they should be.
    """
    if not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST is empty: expected the data set to profile on")
    if not comm.is_main_process():
        return ""
    batches = _batches(cfg, iterations)
    models = _models(cfg)
    output = Path(cfg.OUTPUT_DIR)
    output.mkdir(parents=True, exist_ok=True)
    device = torch.device(cfg.MODEL.DEVICE)
    with ExitStack() as stack:
        profiles = {}
        for name, model in models.items():
            trace = stack.enter_context(replacing(output / f"profile_{name}.json"))
            profiles[name] = profile_model(model, batches, device, trace)
        text = profile_text(profiles, device)
        print(text, flush=True)
        stack.enter_context(replacing(output / "profile.txt")).write_text(text, encoding="utf-8")
    logger.info("wrote %s", output / "profile{_baseline.json,_expedited.json,.txt}")
    return text


@torch.inference_mode()
def profile_model(
    model: nn.Module, batches: Sequence[Any], device: torch.device, trace: Path
) -> Profile:
    """Run a model on batches of one image each, write the trace, and sum it up."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    schedule = torch.profiler.schedule(wait=0, warmup=_WARMUP, active=len(batches), repeat=1)
    with torch.profiler.profile(activities=activities, schedule=schedule) as profiler:
        passes = [*itertools.islice(itertools.cycle(batches), _WARMUP), *batches]
        with progress(passes, "profiling", unit="image") as shown:
            for batch in shown:
                with record_function(_ROOT):
                    model(batch)
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)
                profiler.step()
    profiler.export_chrome_trace(str(trace))
    return summarise(profiler.events() or [], len(batches))


def summarise(events: Iterable[Any], images: int) -> Profile:
    """Sum up a profiler's events by range and by operator.

    Args:
        events: torch's ``FunctionEvent``; those of the GPU are counted where they were launched.
        images: how many were profiled.
    """
    events = [event for event in events if event.device_type == DeviceType.CPU]
    on_gpu = any(event.device_time_total for event in events)
    ranges: defaultdict[Names, list[Any]] = defaultdict(list)
    operators: defaultdict[str, list[Any]] = defaultdict(list)
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.name.startswith(_PREFIX):
            ranges[_names(event)].append(event)
        elif _within_ranges(event):
            operators[event.name].append(event)

    def total(group: Sequence[Any]) -> Cost:
        host = sum(event.cpu_time_total for event in group) / images / 1e3
        own = sum(event.device_time_total for event in group) / images / 1e3
        return Cost(len(group) / images, own if on_gpu else host, host)

    def alone(group: Sequence[Any]) -> Cost:
        host = sum(event.self_cpu_time_total for event in group) / images / 1e3
        own = sum(event.self_device_time_total for event in group) / images / 1e3
        return Cost(len(group) / images, own if on_gpu else host, host)

    costs = {name: alone(group) for name, group in operators.items()}
    longest = sorted(costs, key=lambda name: costs[name].milliseconds, reverse=True)
    return Profile(
        {names: total(group) for names, group in ranges.items()},
        {name: costs[name] for name in longest},
    )


def profile_text(profiles: Mapping[str, Profile], device: torch.device) -> str:
    """Ranges of all models in one table, then each one's longest operators."""
    gpu = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if gpu else "CPU"
    count = torch.get_num_threads()
    threads = "" if gpu else f", {count} thread{'s' if count > 1 else ''}"
    tables = [
        f"{where}{threads}, torch {torch.__version__}; milliseconds per image"
        + (" of the GPU, and of the host" if gpu else ""),
        _range_table(profiles, gpu),
    ]
    for name, one in profiles.items():
        tables += [f"Operators of the {name} model, without those that they call", _top(one)]
    return "\n\n".join(tables) + "\n"


def _range_table(profiles: Mapping[str, Profile], gpu: bool) -> str:
    # The expedited model has all ranges of the baseline and more; an order that suits both.
    names = max((one.ranges for one in profiles.values()), key=len)
    rows = []
    for path in [*names, *(p for one in profiles.values() for p in one.ranges if p not in names)]:
        row: dict[str, Any] = {"range": "· " * (len(path) - 1) + path[-1]}
        for name, one in profiles.items():
            cost, whole = one.ranges.get(path), one.ranges[(_ROOT.removeprefix(_PREFIX),)]
            row[f"{name} ms"] = cost and cost.milliseconds
            if gpu:
                row[f"{name} host ms"] = cost and cost.host_milliseconds
            share = cost and f"{100 * cost.milliseconds / whole.milliseconds:.1f} %"
            row[f"of {name}"] = share
        rows.append(row)
    return _table(rows)


def _top(one: Profile) -> str:
    whole = one.ranges[(_ROOT.removeprefix(_PREFIX),)].milliseconds
    rows = [
        {
            "operator": name,
            "calls per image": f"{cost.calls:.0f}",
            "ms": cost.milliseconds,
            "of the model": f"{100 * cost.milliseconds / whole:.1f} %",
        }
        for name, cost in itertools.islice(one.operators.items(), _OPERATORS)
    ]
    return _table(rows)


def _table(rows: list[dict[str, Any]]) -> str:
    align = ["left", *["right"] * (len(rows[0]) - 1)] if rows else None
    return tabulate(rows, headers="keys", floatfmt=".2f", colalign=align)


def _ancestors(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _names(event: Any) -> Names:
    """Names of the ranges around an event, its own last."""
    names = [e.name.removeprefix(_PREFIX) for e in _ancestors(event) if e.name.startswith(_PREFIX)]
    return tuple(reversed(names))


def _within_ranges(event: Any) -> bool:
    return any(ancestor.name.startswith(_PREFIX) for ancestor in _ancestors(event))


def _models(cfg: CfgNode) -> dict[str, nn.Module]:
    if cfg.MODEL.EXPEDITE.ENABLED:
        return dict(zip(("baseline", "expedited"), build_models(cfg), strict=True))
    model = build_model(cfg).eval()
    load_weights(model, cfg.MODEL.WEIGHTS)
    return {"baseline": model}


def _batches(cfg: CfgNode, count: int) -> list[Any]:
    """The first images; read before the clock runs, in this process."""
    changed = cfg.clone()
    changed.defrost()
    changed.DATALOADER.NUM_WORKERS = 0
    name = cfg.DATASETS.TEST[0]
    images = list(itertools.islice(build_test_loader(changed, name), count))
    return list(itertools.islice(itertools.cycle(images), count))

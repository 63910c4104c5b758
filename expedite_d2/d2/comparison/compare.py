"""A model and its expedited selves, evaluated side by side on the same images in one run."""

from __future__ import annotations

import logging
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expedite_d2._ext import build_info
from expedite_d2.d2.checkpoint import load_weights
from expedite_d2.d2.comparison.cost import count_gflops
from expedite_d2.d2.comparison.examples import (
    Example,
    choose_examples,
    run_example,
    write_examples,
)
from expedite_d2.d2.comparison.figure import draw_comparison
from expedite_d2.d2.comparison.report import (
    Measurement,
    Subject,
    build_comparison,
    comparison_table,
    markdown,
    to_json,
)
from expedite_d2.d2.comparison.settings import BASELINE, EXPEDITED, expedite_settings, switched
from expedite_d2.d2.data import build_test_loader
from expedite_d2.d2.evaluation import build_evaluators
from expedite_d2.d2.evaluation.evaluator import DatasetEvaluator, Results
from expedite_d2.d2.modeling.build import build_model
from expedite_d2.d2.progress import progress
from expedite_d2.d2.provider import CfgNode, DatasetCatalog, MetadataCatalog, comm
from expedite_d2.files import replacing, written
from expedite_d2.tools.latency import PeakMemory, time_call

__all__ = ["build_models", "compare"]

logger = logging.getLogger(__name__)

_PARTS = ("backbone", "model")
# The first passes pay for lazy initialisation, allocator growth and the choice of kernels.
_WARMUP = 2


def compare(
    cfg: CfgNode, further: Mapping[str, CfgNode] | None = None, command: str | None = None
) -> dict[str, Any]:
    """Evaluate the baseline and the expedited models on ``DATASETS.TEST[0]``, image by image.

    The model runs with ``MODEL.EXPEDITE.ENABLED`` off and on, from one set of weights, whatever the
    config says, and once more for each further setting. With several ranks each one takes its
    share. The main rank writes ``OUTPUT_DIR/comparison.json``, ``.md``, ``.png`` and the single
    pictures below ``examples/`` once all is measured, and prints the table.

    Args:
        cfg: The config, from ``load_config``.
        further: Configs of the same model by the names of their settings, from
            ``further_configs``.
        command: The command line that ``comparison.md`` repeats; this process's own by default.

    Returns:
        What ``comparison.json`` holds on the main rank, {} on the others.

    Raises:
        ValueError: settings that do not fit the model, no data set or no images, weights of
            another model.
        FileNotFoundError: weights or data are not where they should be.
    """
    if not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST is empty: expected the data set to compare on")
    dataset = cfg.DATASETS.TEST[0]
    output = Path(cfg.OUTPUT_DIR)
    if comm.is_main_process():
        output.mkdir(parents=True, exist_ok=True)
    device = torch.device(cfg.MODEL.DEVICE)
    expedited = {EXPEDITED: cfg, **(further or {})}
    models = dict(zip((BASELINE, *expedited), build_models(*expedited.values()), strict=True))
    settings = {name: expedite_settings(one) for name, one in expedited.items()}
    loader = build_test_loader(_undisturbed(cfg, device), dataset)
    runs = {
        name: _ModelRun(model, device, build_evaluators(cfg, dataset))
        for name, model in models.items()
    }
    _alternate(list(runs.values()), loader)
    measured = {name: run.gather(settings.get(name)) for name, run in runs.items()}
    if not comm.is_main_process():
        return {}
    subject = Subject(
        model=_describe_model(cfg),
        dataset=dataset,
        images=len(measured[BASELINE].latency_ms["model"]),
        device=_describe_device(device),
        dtype=cfg.TEST.DTYPE,
        torch=torch.__version__,
        extension=build_info(),
    )
    comparison = build_comparison(subject, measured)
    baseline = models.pop(BASELINE)
    seen = {name: (model, settings[name]) for name, model in models.items()}
    chosen = choose_examples(DatasetCatalog.get(dataset))
    with progress(chosen, "predicting examples", unit="image") as indices:
        examples = [
            run_example(baseline, seen, loader.dataset[index], cfg.INPUT.FORMAT)
            for index in indices
        ]
    text = markdown(comparison, cfg.MODEL.WEIGHTS, command or _command_line())
    # First of all: what has been measured is not lost to a disk that is full.
    print(comparison_table(comparison), flush=True)
    _write(output, comparison, text, examples, MetadataCatalog.get(dataset))
    logger.info("wrote %s", output / "comparison.{json,md,png}")
    return comparison


def build_models(*cfgs: CfgNode) -> list[nn.Module]:
    """A model in evaluation mode: the baseline, then expedited as each config says.

    All hold the same parameter tensors, so that they take the memory of one.

    Args:
        cfgs: Configs that differ in ``MODEL.EXPEDITE`` alone.
    """
    first = cfgs[0]
    models = [
        build_model(cfg).eval()
        for cfg in (switched(first, False), *(switched(cfg, True) for cfg in cfgs))
    ]
    baseline, expedited, *others = models
    load_weights(expedited, first.MODEL.WEIGHTS)
    for model in (baseline, *others):
        model.load_state_dict(expedited.state_dict(), assign=True)
    return models


@dataclass
class _ModelRun:
    """One of the models and what this rank has measured of it so far."""

    model: nn.Module
    device: torch.device
    evaluators: Sequence[DatasetEvaluator]
    gflops: dict[tuple[int, int], dict[str, float]] = field(default_factory=dict)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    latency_ms: dict[str, list[float]] = field(default_factory=lambda: {p: [] for p in _PARTS})
    peak_memory_mb: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        for evaluator in self.evaluators:
            evaluator.reset()

    def prepare(self, batch: list[dict[str, Any]], size: tuple[int, int]) -> None:
        """What an image size that has not been seen yet needs: warm-up, memory, multiply-adds."""
        if size in self.gflops:
            return
        for _ in range(0 if self.gflops else _WARMUP):
            self.model(batch)
        with PeakMemory(self.device) as memory:
            self.model(batch)
        if memory.mib is not None:
            self.peak_memory_mb.append(memory.mib)
        self.gflops[size] = count_gflops(self.model, *size)

    def measure(self, batch: list[dict[str, Any]], size: tuple[int, int]) -> None:
        """Time one batch of one image, and evaluate what came out."""
        with _BackboneClock(self.model.get_submodule("backbone"), self.device) as clock:
            outputs, milliseconds = time_call(lambda: self.model(batch), self.device)
        self.latency_ms["model"].append(milliseconds)
        self.latency_ms["backbone"].append(clock.milliseconds())
        self.sizes.append(size)
        for evaluator in self.evaluators:
            evaluator.process(batch, outputs)

    def gather(self, settings: Mapping[str, Any] | None) -> Measurement:
        """All ranks' images together; metrics are only there on the main rank."""
        shares = comm.all_gather((self.latency_ms, self._gflops(), self.peak_memory_mb))
        if not any(latency["model"] for latency, _, _ in shares):
            raise ValueError("the data set is empty: expected at least one image to compare on")
        metrics: Results = {}
        for evaluator in self.evaluators:
            metrics.update(evaluator.evaluate() or {})
        peaks = [peak for _, _, share in shares for peak in share]
        return Measurement(
            metrics=metrics,
            gflops={p: [v for _, share, _ in shares for v in share[p]] for p in _PARTS},
            latency_ms={p: [v for share, _, _ in shares for v in share[p]] for p in _PARTS},
            peak_memory_mb=max(peaks, default=None),
            settings=settings,
        )

    def _gflops(self) -> dict[str, list[float]]:
        return {part: [self.gflops[size][part] for size in self.sizes] for part in _PARTS}


class _BackboneClock:
    """Context that times the backbone inside the model's own forward pass.

    On CUDA by events on the stream: a synchronisation there would slow the model that is timed
    around it.
    """

    def __init__(self, backbone: nn.Module, device: torch.device) -> None:
        self.backbone = backbone
        self.device = device
        self.marks: list[Any] = []

    def __enter__(self) -> _BackboneClock:
        self.hooks = (
            self.backbone.register_forward_pre_hook(self._mark),
            self.backbone.register_forward_hook(self._mark),
        )
        return self

    def __exit__(self, *exc_info: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def milliseconds(self) -> float:
        """Time of the passes inside, one for each crop; the device has been synchronised since."""
        return sum(
            start.elapsed_time(stop) if self.device.type == "cuda" else 1e3 * (stop - start)
            for start, stop in zip(self.marks[::2], self.marks[1::2], strict=True)
        )

    def _mark(self, *hook_args: Any) -> None:
        if self.device.type != "cuda":
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        self.marks.append(event)


@torch.inference_mode()
def _alternate(runs: Sequence[_ModelRun], loader: Iterable[list[dict[str, Any]]]) -> None:
    """Let every image pass through all models, another one first each time."""
    with progress(loader, "comparing", unit="image", shown=comm.is_main_process()) as batches:
        for number, batch in enumerate(batches):
            step = max(int(getattr(runs[0].model, "size_divisibility", 1)), 1)
            height, width = (math.ceil(side / step) * step for side in batch[0]["image"].shape[-2:])
            for run in runs:
                run.prepare(batch, (height, width))
            # Clocks drift and caches are warm for whoever comes later: none may always be first.
            first = number % len(runs)
            for run in (*runs[first:], *runs[:first]):
                run.measure(batch, (height, width))


def _undisturbed(cfg: CfgNode, device: torch.device) -> CfgNode:
    """On a CPU, read images between the passes: workers would share the cores that are timed."""
    if device.type != "cpu":
        return cfg
    changed = cfg.clone()
    changed.defrost()
    changed.DATALOADER.NUM_WORKERS = 0
    return changed


def _write(
    output: Path,
    comparison: Mapping[str, Any],
    text: str,
    examples: Sequence[Example],
    metadata: Any,
) -> None:
    """Write the files; none is replaced before words and numbers are complete.

    A picture that cannot be written is told, and costs nothing else.
    """
    with ExitStack() as stack:
        words, numbers = (
            stack.enter_context(replacing(output / f"comparison.{suffix}"))
            for suffix in ("md", "json")
        )
        numbers.write_text(to_json(comparison), encoding="utf-8")
        words.write_text(text, encoding="utf-8")
        draw = partial(draw_comparison, comparison, examples, metadata)
        written(output / "comparison.png", draw, logger.warning)
        write_examples(examples, metadata, output / "examples")


def _command_line() -> str:
    """How this process was started, with the script as it is found from here."""
    script = os.path.relpath(sys.argv[0]) if os.path.isabs(sys.argv[0]) else sys.argv[0]
    return shlex.join(["python", script, *sys.argv[1:]])


def _describe_model(cfg: CfgNode) -> str:
    words = [cfg.MODEL.META_ARCHITECTURE]
    if "Swin" in cfg.MODEL.BACKBONE.NAME:
        swin = cfg.MODEL.SWIN
        depths = "-".join(map(str, swin.DEPTHS))
        words.append(f"Swin {swin.EMBED_DIM} ({depths}, window {swin.WINDOW_SIZE})")
    elif cfg.MODEL.BACKBONE.NAME == "ExpeditedViT":
        words.append(cfg.MODEL.VIT.NAME)
    else:
        words.append(cfg.MODEL.BACKBONE.NAME)
    return ", ".join(words)


def _describe_device(device: torch.device) -> str:
    ranks = comm.get_world_size()
    prefix = f"{ranks} x " if ranks > 1 else ""
    if device.type == "cuda":
        return prefix + torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return prefix + device.type
    return f"{prefix}{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    """The CPU's name; only Linux tells it in a file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

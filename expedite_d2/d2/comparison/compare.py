"""A model and its expedited self, evaluated side by side on the same images in one run."""

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

import numpy as np
import torch
from PIL import Image
from torch import nn

from expedite_d2._ext import build_info
from expedite_d2.d2.checkpoint import load_weights
from expedite_d2.d2.comparison.cost import count_gflops, expedite_settings
from expedite_d2.d2.comparison.figure import Example, draw_comparison, write_examples
from expedite_d2.d2.comparison.report import (
    Measurement,
    Subject,
    build_comparison,
    comparison_table,
    markdown,
    to_json,
)
from expedite_d2.d2.data import build_test_loader
from expedite_d2.d2.evaluation import build_evaluators
from expedite_d2.d2.evaluation.evaluator import DatasetEvaluator, Results
from expedite_d2.d2.modeling.build import build_model
from expedite_d2.d2.progress import progress
from expedite_d2.d2.provider import CfgNode, DatasetCatalog, MetadataCatalog, comm
from expedite_d2.d2.visualize import prediction_of
from expedite_d2.files import replacing, written
from expedite_d2.ops import Reduced
from expedite_d2.ops.observe import ObservedOperator
from expedite_d2.tools.latency import PeakMemory, time_call

__all__ = ["build_pair", "choose_examples", "compare"]

logger = logging.getLogger(__name__)

_PARTS = ("backbone", "model")
# The first passes pay for lazy initialisation, allocator growth and the choice of kernels.
_WARMUP = 2
_EXAMPLES = 3


def compare(cfg: CfgNode, command: str | None = None) -> dict[str, Any]:
    """Evaluate baseline and expedited model on ``DATASETS.TEST[0]``, image by image in turn.

    The model runs with ``MODEL.EXPEDITE.ENABLED`` on and off, from one set of weights, whatever the
    config says. With several ranks each one takes its share. The main rank writes
    ``OUTPUT_DIR/comparison.json``, ``.md``, ``.png`` and the single pictures below ``examples/``
    once all is measured, and prints the table.

    Args:
        cfg: The config, from ``load_config``.
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
    name = cfg.DATASETS.TEST[0]
    output = Path(cfg.OUTPUT_DIR)
    if comm.is_main_process():
        output.mkdir(parents=True, exist_ok=True)
    device = torch.device(cfg.MODEL.DEVICE)
    models = build_pair(cfg)
    loader = build_test_loader(_undisturbed(cfg, device), name)
    runs = [_ModelRun(model, device, build_evaluators(cfg, name)) for model in models]
    _alternate(runs, loader)
    baseline, expedited = (run.gather() for run in runs)
    if not comm.is_main_process():
        return {}
    images = len(baseline.latency_ms["model"])
    subject = Subject(
        model=_describe_model(cfg),
        dataset=name,
        images=images,
        device=_describe_device(device),
        dtype=cfg.TEST.DTYPE,
        torch=torch.__version__,
        extension=build_info(),
    )
    comparison = build_comparison(subject, baseline, expedited, expedite_settings(cfg))
    chosen = choose_examples(DatasetCatalog.get(name))
    with progress(chosen, "predicting examples", unit="image") as indices:
        examples = [_example(models, loader.dataset[index], cfg.INPUT.FORMAT) for index in indices]
    text = markdown(comparison, cfg.MODEL.WEIGHTS, command or _command_line())
    # First of all: what has been measured is not lost to a disk that is full.
    print(comparison_table(comparison), flush=True)
    _write(output, comparison, text, examples, MetadataCatalog.get(name))
    logger.info("wrote %s", output / "comparison.{json,md,png}")
    return comparison


def build_pair(cfg: CfgNode) -> tuple[nn.Module, nn.Module]:
    """The config's model twice, in evaluation mode: baseline, then expedited.

    The two hold the same parameter tensors, so that a pair takes the memory of one.
    """
    models = []
    for enabled in (False, True):
        changed = cfg.clone()
        changed.defrost()
        changed.MODEL.EXPEDITE.ENABLED = enabled
        models.append(build_model(changed).eval())
    baseline, expedited = models
    load_weights(expedited, cfg.MODEL.WEIGHTS)
    baseline.load_state_dict(expedited.state_dict(), assign=True)
    return baseline, expedited


def choose_examples(records: Sequence[Mapping[str, Any]], count: int = _EXAMPLES) -> list[int]:
    """Indices of images to show: one from each part of the data set, rich but not the extreme.

    Args:
        records: The data set's dicts; what they tell of segments is counted.
        count: How many, at most.

    Returns:
        Increasing indices, the same for the same data set.
    """
    chosen = []
    for part in np.array_split(np.arange(len(records)), count):
        ranked = sorted(part.tolist(), key=lambda index: (_segments(records[index]), -index))
        # The richest picture of all is often a crowd in which nothing can be told apart.
        chosen += ranked[math.floor(0.95 * (len(ranked) - 1)) :][:1]
    return chosen


def _segments(record: Mapping[str, Any]) -> int:
    return len(record.get("segments_info") or record.get("annotations") or ())


@dataclass
class _ModelRun:
    """One of the two models and what this rank has measured of it so far."""

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

    def gather(self) -> Measurement:
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
            # Clocks drift and caches are warm for whoever comes second: neither may always be
            # first.
            for run in runs if number % 2 == 0 else runs[::-1]:
                run.measure(batch, (height, width))


def _undisturbed(cfg: CfgNode, device: torch.device) -> CfgNode:
    """On a CPU, read images between the passes: workers would share the cores that are timed."""
    if device.type != "cpu":
        return cfg
    changed = cfg.clone()
    changed.defrost()
    changed.DATALOADER.NUM_WORKERS = 0
    return changed


@torch.inference_mode()
def _example(
    models: tuple[nn.Module, nn.Module], item: dict[str, Any], image_format: str
) -> Example:
    """Run both models on one image, and look at what the expedited backbone clusters."""
    sizes: list[torch.Size] = []
    hook = (
        models[1]
        .get_submodule("backbone")
        .register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[-2:]))
    )
    # The first index is that of the nearest centre.
    observed = ObservedOperator(
        torch.ops.expedite_d2.token_reduce.default,
        lambda arguments, result: (arguments["window"], Reduced(*result).indices[0, ..., 0]),
    )
    with hook, observed:
        expedited = prediction_of(models[1]([item])[0])
    baseline = prediction_of(models[0]([item])[0])
    # None for an image that is too small to be reduced; crops are not put together.
    clusters = window = None
    rows, columns = sizes[0]
    if len(observed.kept) == 1:
        window, nearest = observed.kept[0]
        clusters = nearest.cpu().numpy()
        rows, columns = clusters.shape
    height, width = item["image"].shape[-2:]
    image = item["image"].permute(1, 2, 0).cpu().numpy().astype(np.uint8)
    if image_format == "BGR":
        image = image[..., ::-1]
    return Example(
        image=np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(baseline.size[::-1])),
        clusters=clusters,
        tokens=(
            height * rows / sizes[0][0],
            width * columns / sizes[0][1],
        ),
        window=None if window is None else tuple(window),
        baseline=baseline,
        expedited=expedited,
    )


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

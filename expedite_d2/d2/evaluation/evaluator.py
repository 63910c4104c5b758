"""The evaluators' common ground: per-image records, gathered over ranks, and the loop around them.

Every evaluator keeps one small record an image under the image's key. Gathering merges the ranks'
dictionaries, so an image that a sampler hands out twice is counted once, and the metrics are those
of a single process, whatever the shares are.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import nn

from expedite_d2.d2.progress import progress
from expedite_d2.d2.provider import MetadataCatalog, comm

Metrics = dict[str, float | None]
Results = dict[str, Metrics]
Record = TypeVar("Record")


@runtime_checkable
class DatasetEvaluator(Protocol):
    """Detectron2's interface of an evaluator."""

    def reset(self) -> None:
        """Forget everything seen so far."""

    def process(self, inputs: Sequence[Mapping], outputs: Sequence[Mapping]) -> None:
        """Take in one batch: dataset dicts and the model's outputs, in the same order."""

    def evaluate(self) -> Results | None:
        """The metrics of all images of all ranks on the main rank, None on the others."""


class ImageEvaluator(ABC, Generic[Record]):
    """An evaluator that reduces each image to a record and all records to metrics.

    What is wrong with a data set as a whole is found by ``reset``, before the first image.

    Args:
        dataset_name: the data set's name in the catalogs.
    """

    def __init__(self, dataset_name: str) -> None:
        self.dataset_name = dataset_name
        self.records: dict[Hashable, Record] = {}

    def reset(self) -> None:
        """Forget everything seen so far, and see that the data set can be evaluated.

        Raises:
            ValueError: metadata or annotations that the metrics cannot be computed from.
            FileNotFoundError: an annotation file is missing.
        """
        self.records = {}
        self.prepare()

    def prepare(self) -> None:
        """Read and check what this evaluator takes from the data set beside single images."""

    def process(self, inputs: Sequence[Mapping], outputs: Sequence[Mapping]) -> None:
        """Reduce one batch to records.

        Args:
            inputs: dataset dicts.
            outputs: the model's outputs for them, in the same order.

        Raises:
            KeyError: an output lacks what this evaluator reads.
        """
        for item, output in zip(inputs, outputs, strict=True):
            self.records[image_key(item)] = self.measure(item, output)

    def evaluate(self) -> Results | None:
        """Gather the records of all ranks; the metrics on the main rank, None on the others."""
        shares = comm.gather(self.records)
        if not comm.is_main_process():
            return None
        merged = {key: record for share in shares for key, record in share.items()}
        return self.summarise(merged)

    @abstractmethod
    def measure(self, item: Mapping, output: Mapping) -> Record:
        """One image's record from its dataset dict and the model's output."""

    @abstractmethod
    def summarise(self, records: Mapping[Hashable, Record]) -> Results:
        """The metrics of a whole data set from its records, by image key."""

    def metadata(self, field: str) -> Any:
        """A field of the data set's metadata, or a ValueError that names what lacks."""
        value = MetadataCatalog.get(self.dataset_name).get(field)
        if value is None:
            raise ValueError(f"data set {self.dataset_name!r}: its metadata lacks {field!r}")
        return value

    def needed(self, output: Mapping, key: str, switch: str) -> Any:
        """What the model put under ``key``, or a KeyError that names the config switch for it."""
        if key not in output:
            raise KeyError(
                f"{type(self).__name__} needs {key!r} in the model's output, got "
                f"{sorted(output)}: set {switch} True or evaluate without this task"
            )
        return output[key]


def image_key(item: Mapping) -> Hashable:
    """What identifies an image: its ``image_id``, or its file name where a data set has no ids."""
    return item["image_id"] if "image_id" in item else item["file_name"]


def picture_size(item: Mapping, predicted: Sequence[int]) -> tuple[int, int]:
    """(H, W) that an image's annotation must have: as the mapper tells it, or the prediction's."""
    height, width = item.get("height", predicted[0]), item.get("width", predicted[1])
    return height, width


def percent(value: float) -> float | None:
    """A fraction in percent; None where it is undefined."""
    return None if math.isnan(value) else 100.0 * float(value)


def inference_on_dataset(
    model: nn.Module,
    loader: Iterable[Sequence[Mapping]],
    evaluators: DatasetEvaluator | Sequence[DatasetEvaluator],
) -> Results:
    """Run a model over a data set and evaluate it.

    Args:
        model: takes a list of dataset dicts, returns a list of outputs. Evaluated in eval mode; the
            mode of each of its modules is restored afterwards.
        loader: batches of dataset dicts; this rank's share.
        evaluators: one or several; they are reset first.

    Returns:
        {task: {metric: value}} on the main rank, {} on the others.

    Raises:
        ValueError: no rank has any image.
    """
    if isinstance(evaluators, DatasetEvaluator):
        evaluators = [evaluators]
    for evaluator in evaluators:
        evaluator.reset()
    images = 0
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.inference_mode())
        batches = stack.enter_context(
            progress(loader, "evaluating", unit="batch", shown=comm.is_main_process())
        )
        for batch in batches:
            outputs = model(batch)
            images += len(batch)
            for evaluator in evaluators:
                evaluator.process(batch, outputs)
    # Also the barrier: the slowest rank may be minutes behind, and gathers have a time-out.
    if sum(comm.all_gather(images)) == 0:
        raise ValueError("the data set is empty: expected at least one image to evaluate, got 0")
    results: Results = {}
    for evaluator in evaluators:
        results.update(evaluator.evaluate() or {})
    return results


class evaluating:
    """Context in which a model is in eval mode; each module's own mode is restored afterwards.

    ``model.train(previous)`` would set every submodule alike and so thaw layers that were frozen
    in eval mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modes: list[tuple[nn.Module, bool]] = []

    def __enter__(self) -> nn.Module:
        self.modes = [(module, module.training) for module in self.model.modules()]
        return self.model.eval()

    def __exit__(self, *exc_info: object) -> None:
        for module, mode in self.modes:
            module.training = mode


def format_number(value: float | None, digits: int) -> str:
    """A metric in words: so many significant digits, never an exponent; "-" where it is None."""
    if value is None:
        return "-"
    whole = len(str(int(abs(value))))
    return f"{value:.{max(0, digits - whole)}f}"

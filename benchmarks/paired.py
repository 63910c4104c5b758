"""A model against the same model plain, on the same images: metrics, nearness and intervals."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from expedite_d2.d2.evaluation import InstanceEvaluator, inference_on_dataset
from expedite_d2.d2.evaluation.evaluator import ImageEvaluator, Metrics, Results, image_key

#: Resamples of the images behind an interval.
DRAWS = 1000
# Of errors the share that is kept is the inverse ratio.
ERRORS = ("RMSE", "AbsRel")
#: What `Nearness` measures. Of these nothing is "kept".
NEARNESS = ("distance", "relative", "agreement")


class Nearness(ImageEvaluator[tuple[float, ...]]):
    """How near a model's outputs are to those of the first model that it saw the images with.

    Of depth: "distance", the root mean square of the difference in metres, over all images, and
    "relative", the mean of the difference's share of the first model's depth, in percent. Of
    classes: "agreement", the percentage of pixels that have the same one.
    """

    def __init__(self, dataset_name: str) -> None:
        super().__init__(dataset_name)
        self.first: dict[Hashable, Tensor] = {}

    def measure(self, item: Mapping, output: Mapping) -> tuple[float, ...]:
        """Mean squared and mean relative difference of an image's depth, or share of classes."""
        if "depth" in output:
            depth = output["depth"].cpu()
            first = self.first.setdefault(image_key(item), depth)
            difference = depth - first
            return difference.square().mean().item(), (difference.abs() / first).mean().item()
        if "sem_seg" in output:
            classes = output["sem_seg"].argmax(0).to(torch.uint8).cpu()
            first = self.first.setdefault(image_key(item), classes)
            return ((classes == first).double().mean().item(),)
        return ()

    def summarise(self, records: Mapping[Hashable, tuple[float, ...]]) -> Results:
        """Means over the images."""
        means = np.mean(list(records.values()), axis=0).tolist()
        metrics: Metrics = {}
        if len(means) == 2:
            metrics = {"distance": means[0] ** 0.5, "relative": 100 * means[1]}
        elif means:
            metrics = {"agreement": 100 * means[0]}
        return {"plain": metrics}


def kept(metric: str, value: float, plain: float) -> float | None:
    """Percent of the plain model's metric; of an error the inverse ratio, of nearness None."""
    if metric in NEARNESS:
        return None
    return 100 * (plain / value if metric in ERRORS else value / plain)


class Judge:
    """Evaluates models on the same images; the first is the plain one.

    Args:
        evaluators: of the data set.
        metrics: task and name of those that count, beside nearness to the plain model.
    """

    def __init__(
        self, evaluators: Iterable[ImageEvaluator[Any]], metrics: Sequence[tuple[str, str]]
    ) -> None:
        self.evaluators = list(evaluators)
        self.evaluators.append(Nearness(self.evaluators[0].dataset_name))
        self.metrics = metrics
        self.plain: list[dict[str, float]] = []  # metrics of the plain model's resamples

    def __call__(self, model: nn.Module, images: Sequence[Any]) -> dict[str, dict[str, Any]]:
        """Evaluates a model.

        Args:
            model: takes the images.
            images: batches of the same images, at any size.

        Returns:
            "metrics", by name, and "intervals" of all but those of instances: from the 2.5th to the
            97.5th percentile, over resamples of the images, of the share that is kept, or of the
            nearness.
        """
        found = inference_on_dataset(model, images, self.evaluators)
        resamples = self._resamples()
        self.plain = self.plain or resamples
        return {"metrics": self._named(found), "intervals": self._intervals(resamples)}

    def _named(self, found: Results) -> dict[str, float]:
        wanted = {metric: found[task][metric] for task, metric in self.metrics if task in found}
        values = wanted | found["plain"]
        return {metric: value for metric, value in values.items() if value is not None}

    def _resamples(self) -> list[dict[str, float]]:
        """Metrics of what was evaluated last, on images drawn from its own, the same each time."""
        # That of instances matches anew over all images: too slow.
        evaluators = [one for one in self.evaluators if not isinstance(one, InstanceEvaluator)]
        keys = list(evaluators[0].records)
        generator = np.random.default_rng(0)
        resamples = []
        for _ in range(DRAWS):
            drawn = [keys[number] for number in generator.integers(len(keys), size=len(keys))]
            found: Results = {}
            for evaluator in evaluators:
                sample: dict[Hashable, Any] = dict(enumerate(map(evaluator.records.get, drawn)))
                found.update(evaluator.summarise(sample))
            resamples.append(self._named(found))
        return resamples

    def _intervals(self, resamples: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
        draws: dict[str, list[float]] = {}
        for plain, reduced in zip(self.plain, resamples, strict=True):
            for metric, value in reduced.items():
                share = kept(metric, value, plain[metric])
                draws.setdefault(metric, []).append(value if share is None else share)
        ends = (2.5, 97.5)
        return {metric: np.percentile(values, ends).tolist() for metric, values in draws.items()}

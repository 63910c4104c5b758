"""Models against the plain one on the same images: nearness, and intervals over the images."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks import paired
from expedite_d2.d2.evaluation.evaluator import ImageEvaluator, Results


class Given(nn.Module):
    """A model whose outputs are given, image by image."""

    def __init__(self, field: str, outputs: list[Tensor]) -> None:
        super().__init__()
        self.field, self.outputs = field, outputs

    def forward(self, batch: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        return [{self.field: self.outputs[item["image_id"]]} for item in batch]


class Mean(ImageEvaluator[float]):
    """The mean over the images of a model's mean depth, as if that were an error."""

    def measure(self, item: Mapping, output: Mapping) -> float:
        return output["depth"].mean().item()

    def summarise(self, records: Mapping[Hashable, float]) -> Results:
        return {"depth": {"RMSE": float(np.mean(list(records.values())))}}


def judged(*models: Given) -> list[dict[str, dict[str, Any]]]:
    judge = paired.Judge([Mean("none")], [("depth", "RMSE")])
    images = [[{"image_id": number}] for number in range(len(models[0].outputs))]
    return [judge(model, images) for model in models]


def test_nearness_of_depths_is_that_to_the_first_model() -> None:
    plain = [torch.full((2, 3), 2.0), torch.full((2, 3), 4.0)]
    moved = [depth + shift for depth, shift in zip(plain, (0.3, 0.4), strict=True)]
    first, second = judged(Given("depth", plain), Given("depth", moved))
    assert first["metrics"] == {"RMSE": 3, "distance": 0, "relative": 0}
    assert second["metrics"]["distance"] == pytest.approx(((0.09 + 0.16) / 2) ** 0.5, rel=1e-5)
    assert second["metrics"]["relative"] == pytest.approx(100 * (0.15 + 0.1) / 2, rel=1e-5)


def test_agreement_is_the_share_of_pixels_of_the_same_class() -> None:
    scores = torch.eye(3)[torch.tensor([[0, 1, 2, 0]])].permute(2, 0, 1)
    others = torch.eye(3)[torch.tensor([[0, 1, 1, 0]])].permute(2, 0, 1)
    nearness = paired.Nearness("none")
    for output in (scores, others):
        nearness.process([{"image_id": 1}], [{"sem_seg": output}])
    assert nearness.evaluate() == {"plain": {"agreement": 75.0}}


def test_intervals_are_paired() -> None:
    generator = torch.Generator().manual_seed(0)
    plain = [torch.rand(2, 2, generator=generator) + 0.5 for _ in range(40)]
    twice = [2 * depth for depth in plain]
    noisy = [depth + 0.1 * torch.rand((), generator=generator) for depth in plain]
    first, second, third = judged(*(Given("depth", outputs) for outputs in (plain, twice, noisy)))
    assert first["intervals"]["RMSE"] == [100, 100]
    # Drawn apart, images of different depth would give the two models' ratio a spread.
    assert second["intervals"]["RMSE"] == pytest.approx([50, 50], rel=1e-6)
    low, high = third["intervals"]["RMSE"]
    share = paired.kept("RMSE", third["metrics"]["RMSE"], first["metrics"]["RMSE"])
    assert share is not None and low < share < high < 100
    # The mean of 40 numbers, spread evenly over 0.1, is known to four standard errors of 0.0046.
    assert high - low == pytest.approx(4 * 100 * 0.1 / 12**0.5 / 40**0.5, rel=0.3)
    assert third["intervals"]["distance"][0] < third["metrics"]["distance"]


def test_a_second_run_draws_the_same_images() -> None:
    outputs = [torch.full((1, 1), float(value)) for value in (1, 2, 3, 5)]
    moved = [depth**2 for depth in outputs]
    runs = [judged(Given("depth", outputs), Given("depth", moved))[1] for _ in range(2)]
    assert runs[0] == runs[1]

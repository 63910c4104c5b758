"""Settings measured on a few images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from family_cases.plain import timm_vit
from settings_cases import clustered
from torch import Tensor, nn

from expedite_d2 import expedite, ops
from expedite_d2.ops.observe import ObservedOperator
from expedite_d2.reducers import Expeditable, Reduction, reconstruct, reduce
from expedite_d2.tools.calibrate import calibrate


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Backbone(Expeditable, nn.Module):
    """Clusters its input as it is, in windows or as a whole."""

    def __init__(self, reduction: Reduction | None, window: tuple[int, int] | None) -> None:
        super().__init__()
        self.reduction = reduction
        self.window = window

    def reducible_blocks(self) -> list[nn.Module]:
        return []

    def read_outs(self) -> list[int]:
        return []

    def forward(self, images: Tensor) -> Tensor:
        if not images.isfinite().all():
            raise RuntimeError("not finite")
        if self.reduction is None:
            return images
        assert self.reduction.cluster.temperature == 0
        low, clustering = reduce(images.permute(0, 2, 3, 1), self.reduction, self.window)
        return reconstruct(low, clustering).permute(0, 3, 1, 2)


class Model(nn.Module):
    """Takes a list of dicts, as Detectron2's do, and doubles the images before the backbone."""

    def __init__(
        self, reduction: Reduction | None, window: tuple[int, int] | None = (4, 4)
    ) -> None:
        super().__init__()
        self.backbone = Backbone(reduction, window)
        self.head = nn.Dropout(0.5)

    def forward(self, inputs: list[dict[str, Tensor]]) -> Tensor:
        assert not self.training and not torch.is_grad_enabled()
        return self.head(self.backbone(torch.stack([2 * x["image"] for x in inputs])))


def test_observing_an_operator_changes_nothing() -> None:
    operator = torch.ops.expedite_d2.token_spread.default
    observed = ObservedOperator(operator, lambda args, result: (args["clusters"], result))
    x, half = tokens(1, 8, 9, 3), torch.randn(1, 2, 3).bfloat16()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = torch.einsum("bqc,bhwc->bqhw", half, x)  # of two types, which autocast makes one
        with observed:
            found = torch.einsum("bqc,bhwc->bqhw", half, x)
            spread = ops.token_spread(x, (2, 2))
    assert torch.equal(found, expected)
    assert observed.kept == [([2, 2], spread)]


@pytest.mark.parametrize("window", [None, (4, 4)])
def test_calibrate_measures_what_the_backbone_receives(window: tuple[int, int] | None) -> None:
    model = Model(clustered(3, (2, 2), topk=2), window)
    model.train()
    model.head.eval()
    batches = [tokens(n, 3, 8, 9, seed=n) for n in (1, 2)]
    inputs: Iterator[Any] = ([{"image": x} for x in batch] for batch in batches)
    temperature = calibrate(model, inputs).cluster.temperature
    spread = torch.cat(
        [ops.token_spread(2 * x.permute(0, 2, 3, 1), (2, 2), window=window) for x in batches]
    )
    assert temperature == pytest.approx((32 if window else 8) / spread.mean().item(), rel=1e-5)
    assert model.backbone.reduction == clustered(3, (2, 2), topk=2, temperature=temperature)
    assert model.training and model.backbone.training and not model.head.training
    # Again, with a temperature that is already there.
    again = calibrate(model, [[{"image": x} for x in batch] for batch in batches])
    assert again == model.backbone.reduction and again.cluster.temperature == temperature


def test_calibrate_cleans_up_after_an_error() -> None:
    model = Model(clustered(3, (2, 2))).train()
    with pytest.raises(RuntimeError, match="not finite"):
        calibrate(model, [[{"image": torch.full((3, 8, 8), torch.inf)}]])
    assert model.training
    assert model.backbone.reduction == clustered(3, (2, 2))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Model(None), "one expedited encoder, got 0 in Model"),
        (nn.Linear(2, 2), "one expedited encoder, got 0 in Linear"),
        (nn.ModuleList([Model(clustered(3, (2, 2))) for _ in range(2)]), "got 2 in ModuleList"),
        (Model(clustered(3, (2, 2))), "at least one image, got none"),
    ],
)
def test_calibrate_refuses(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(model, [])


def test_calibrate_refuses_images_that_are_not_reduced() -> None:
    model = Model(clustered(3, (9, 9)), None)
    small = [[{"image": torch.randn(3, 8, 8)}]] * 2
    with (
        pytest.warns(UserWarning, match="runs unreduced"),
        pytest.raises(
            ValueError, match="an image with more tokens than clusters, got none among 2"
        ),
    ):
        calibrate(model, small)
    assert model.backbone.reduction == clustered(3, (9, 9))


def test_calibrate_refuses_images_that_are_not_finite() -> None:
    model = expedite(timm_vit(), alpha=1, clusters=(3, 3))
    before = model.reduction
    with pytest.raises(ValueError, match="images must give finite tokens, got NaN or infinity"):
        calibrate(model, [torch.full((1, 3, 32, 32), torch.nan)] * 4)
    assert model.reduction == before


def test_calibrate_sets_the_outermost_settings() -> None:
    class Outer(Expeditable, nn.Sequential):
        def reducible_blocks(self) -> list[nn.Module]:
            return []

        def read_outs(self) -> list[int]:
            return []

    model = Model(clustered(3, (2, 2)))
    outer = Outer(model)
    outer.reduction = clustered(1, (3, 3))
    found = calibrate(outer, [[{"image": torch.randn(3, 8, 8)}]])
    assert outer.reduction == found == clustered(1, (3, 3), temperature=found.cluster.temperature)
    assert model.backbone.reduction == clustered(3, (2, 2))

"""Settings, reduction and reconstruction, calibration."""

from __future__ import annotations

import dataclasses
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from expedite_d2 import ops
from expedite_d2.hourglass import (
    Clustering,
    ObservedOperator,
    Reduction,
    calibrate,
    reconstruct,
    reduce,
)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- settings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": -1}, "alpha must be an integer >= 0, got -1"),
        ({"alpha": 1.0}, "alpha must be an integer >= 0, got 1.0"),
        ({"alpha": True}, "alpha must be an integer >= 0, got True"),
        ({"iterations": -1}, "iterations must be an integer >= 0, got -1"),
        ({"neighbourhood": 4}, "neighbourhood must be odd, got 4"),
        ({"neighbourhood": -1}, "neighbourhood must be an integer >= 1, got -1"),
        ({"topk": 0}, "topk must be an integer >= 1, got 0"),
        ({"temperature": -0.5}, "temperature must be a finite number >= 0 .*, got -0.5"),
        ({"temperature": float("nan")}, "temperature must be a finite number .*, got nan"),
        ({"temperature": float("inf")}, "temperature must be a finite number .*, got inf"),
        ({"temperature": "auto"}, "temperature must be a finite number .*, got 'auto'"),
        (
            {"reconstruction": "mean"},
            "reconstruction must be 'residual' or 'replace', got 'mean'",
        ),
        ({"clusters": (8,)}, r"clusters must be two sizes >= 1.*, got \(8,\)"),
        ({"clusters": 8}, "clusters must be two sizes >= 1.*, got 8"),
        ({"clusters": (0, 8)}, r"clusters must be two sizes .*, got \(0, 8\)"),
        ({"clusters": (8, 0.5)}, r"clusters must be two sizes .*, got \(8, 0.5\)"),
        ({"clusters": (1.0, 0.5)}, r"two ratios between 0 and 1.*, got \(1.0, 0.5\)"),
        ({"clusters": (True, 8)}, r"clusters must be two sizes .*, got \(True, 8\)"),
        ({"clusters": "88"}, "clusters must be two sizes .*, got '88'"),
        ({"clusters": np.ones((2, 2))}, "clusters must be two sizes"),
        ({"alpha": np.float64(3)}, "alpha must be an integer >= 0, got .*3.0"),
        ({"alpha": np.bool_(True)}, "alpha must be an integer >= 0, got .*True"),
        ({"alpha": np.array(3)}, r"alpha must be an integer >= 0, got array\(3\)"),
        ({"topk": torch.tensor(3)}, r"topk must be an integer >= 1, got tensor\(3\)"),
        ({"temperature": np.float32("nan")}, "temperature must be a finite number .*nan"),
        ({"temperature": True}, "temperature must be a finite number .*, got True"),
    ],
)
def test_reduction_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reduction(**{"alpha": 3, "clusters": (8, 8), **changes})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("alpha", np.arange(4, 8)[2], 6),
        ("alpha", np.uint8(6), 6),
        ("iterations", np.int16(3), 3),
        ("neighbourhood", np.int32(3), 3),
        ("topk", np.int64(2), 2),
        ("temperature", np.float32(0.5), 0.5),
        ("temperature", np.float64(0.25), 0.25),
        ("temperature", np.int64(2), 2.0),
        ("clusters", tuple(np.array([8, 6])), (8, 6)),
        ("clusters", np.array([8, 6]), (8, 6)),
        ("clusters", torch.tensor([8, 6]), (8, 6)),
        ("clusters", tuple(np.linspace(0.25, 0.75, 2)), (0.25, 0.75)),
        ("clusters", tuple(np.float32([0.5, 0.25])), (0.5, 0.25)),
        ("clusters", (np.int64(8), 6), (8, 6)),
    ],
)
def test_reduction_takes_numbers_of_numpy_as_pythons_own(
    name: str, value: Any, expected: Any
) -> None:
    arguments: dict[str, Any] = {"alpha": 3, "clusters": (4, 4)}
    reduction = Reduction(**arguments | {name: value})
    assert reduction == Reduction(**arguments | {name: expected})
    # Also to the type, which numbers that are equal need not share.
    kept = getattr(reduction, name)
    assert repr(kept) == repr(expected)


def test_reduction_is_a_value() -> None:
    reduction = Reduction(3, [8, 6])  # type: ignore[arg-type]  # as a YAML gives it
    assert reduction == Reduction(3, (8, 6)) and hash(reduction) == hash(Reduction(3, (8, 6)))
    assert pickle.loads(pickle.dumps(reduction)) == reduction
    with pytest.raises(dataclasses.FrozenInstanceError):
        reduction.alpha = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("clusters", "size", "expected"),
    [
        ((8, 6), (12, 12), (8, 6)),
        ((0.5, 0.5), (12, 7), (6, 4)),
        ((0.66, 0.34), (12, 12), (8, 4)),
        ((0.1, 0.9), (4, 10), (1, 9)),
    ],
)
def test_reduction_grid(clusters: Any, size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert Reduction(0, clusters).grid(*size) == expected


# ---- reduce, reconstruct ---------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, (4, 4), (4, 6)])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("mode", ["residual", "replace"])
def test_reduce_calls_operators(
    window: tuple[int, int] | None, temperature: float, mode: Any
) -> None:
    z = tokens(2, 9, 11, 5)
    settings = Reduction(
        0, (2, 3), iterations=3, neighbourhood=3, topk=2, temperature=temperature,
        reconstruction=mode,
    )  # fmt: skip
    low, clustering = reduce(z, settings, window)
    spread = ops.token_spread(z, (2, 3), window=window, neighbourhood=3)
    c = 32.0 if window else 8.0
    tau: dict[str, Any] = {"temperature": temperature} if temperature else {"temperature": c}
    tau["spread"] = None if temperature else spread
    centres = ops.token_cluster(z, (2, 3), window=window, iterations=3, neighbourhood=3, **tau)
    indices, weights = ops.token_match(z, centres, (2, 3), window=window, topk=2, **tau)
    assert torch.equal(low, centres)
    assert torch.equal(clustering.indices, indices) and torch.equal(clustering.weights, weights)
    flat = torch.stack([(2 * low).flatten(1, 2)[b][indices[b].long()] for b in range(2)])
    expected = (weights[..., None] * flat).sum(3)
    if mode == "replace":
        assert clustering.tokens is None and clustering.centres is None
    else:
        assert clustering.tokens is z
        expected = z + expected / 2  # 2 * low - low is low
    torch.testing.assert_close(reconstruct(2 * low, clustering), expected)


def test_reduce_automatic_temperature_is_scale_free() -> None:
    z = tokens(2, 8, 8, 6)
    low, clustering = reduce(z, Reduction(0, (2, 2)), (4, 4))
    scaled, same = reduce(8 * z, Reduction(0, (2, 2)), (4, 4))
    torch.testing.assert_close(scaled, 8 * low)
    torch.testing.assert_close(same.weights, clustering.weights)


def test_reconstruct_residual_of_unchanged_clusters_is_identity() -> None:
    z = tokens(2, 8, 8, 6)
    low, clustering = reduce(z, Reduction(0, (2, 2)), (4, 4))
    assert torch.equal(reconstruct(low, clustering), z)


def test_reduce_leaves_small_images_with_one_warning() -> None:
    z = tokens(2, 4, 6, 3)
    reduction = Reduction(0, (5, 5))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            low, clustering = reduce(z, reduction)
    assert low is z and clustering == Clustering(None, None, None, None)
    assert reconstruct(low + 1, clustering).equal(z + 1)
    assert [str(w.message) for w in caught] == [
        "an image has no more tokens than the 5x5 cluster grid and runs unreduced"
    ]
    assert reduce(tokens(1, 6, 6, 3), reduction)[0].shape == (1, 5, 5, 3)


def test_reduce_passes_gradients() -> None:
    z = tokens(1, 8, 8, 4).requires_grad_()
    low, clustering = reduce(z, Reduction(0, (2, 2)), (4, 4))
    reconstruct(low.sin(), clustering).square().sum().backward()
    assert z.grad is not None and z.grad.isfinite().all() and z.grad.abs().sum() > 0


@pytest.mark.parametrize("window", [None, (4, 4)])
def test_hourglass_compiles_without_breaks(window: tuple[int, int] | None) -> None:
    torch.compiler.reset()

    def run(z: Tensor) -> Tensor:
        low, clustering = reduce(z, Reduction(0, (2, 2)), window)
        return reconstruct(low.sin(), clustering)

    z = tokens(2, 7, 8, 4)
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(z), run(z))


# ---- calibrate -------------------------------------------------------------------------------


class Backbone(nn.Module):
    """Clusters its input as it is, in windows or as a whole."""

    def __init__(self, reduction: Reduction | None, window: tuple[int, int] | None) -> None:
        super().__init__()
        self.reduction = reduction
        self.window = window

    def forward(self, images: Tensor) -> Tensor:
        if not images.isfinite().all():
            raise RuntimeError("not finite")
        if self.reduction is None:
            return images
        assert self.reduction.temperature == 0
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
    observed = ObservedOperator(operator, lambda named, result: (named["clusters"], result))
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
    model = Model(Reduction(3, (2, 2), topk=2), window)
    model.train()
    model.head.eval()
    batches = [tokens(n, 3, 8, 9, seed=n) for n in (1, 2)]
    inputs: Iterator[Any] = ([{"image": x} for x in batch] for batch in batches)
    temperature = calibrate(model, inputs)
    spread = torch.cat(
        [ops.token_spread(2 * x.permute(0, 2, 3, 1), (2, 2), window=window) for x in batches]
    )
    assert temperature == pytest.approx((32 if window else 8) / spread.mean().item(), rel=1e-5)
    assert model.backbone.reduction == Reduction(3, (2, 2), topk=2, temperature=temperature)
    assert model.training and model.backbone.training and not model.head.training
    # Again, with a temperature that is already there.
    assert calibrate(model, [[{"image": x} for x in batch] for batch in batches]) == temperature


def test_calibrate_cleans_up_after_an_error() -> None:
    model = Model(Reduction(3, (2, 2))).train()
    with pytest.raises(RuntimeError, match="not finite"):
        calibrate(model, [[{"image": torch.full((3, 8, 8), torch.inf)}]])
    assert model.training
    assert model.backbone.reduction == Reduction(3, (2, 2))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Model(None), "one expedited encoder, got 0 in Model"),
        (nn.Linear(2, 2), "one expedited encoder, got 0 in Linear"),
        (nn.ModuleList([Model(Reduction(3, (2, 2))) for _ in range(2)]), "got 2 in ModuleList"),
        (Model(Reduction(3, (2, 2))), "at least one image, got none"),
    ],
)
def test_calibrate_refuses(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(model, [])


def test_calibrate_refuses_images_that_are_not_reduced() -> None:
    model = Model(Reduction(3, (9, 9)), None)
    small = [[{"image": torch.randn(3, 8, 8)}]] * 2
    with (
        pytest.warns(UserWarning, match="runs unreduced"),
        pytest.raises(
            ValueError, match="an image with more tokens than clusters, got none among 2"
        ),
    ):
        calibrate(model, small)
    assert model.backbone.reduction == Reduction(3, (9, 9))


def test_calibrate_sets_the_outermost_settings() -> None:
    model = Model(Reduction(3, (2, 2)))
    outer = nn.Sequential(model)
    outer.reduction = Reduction(1, (3, 3))  # type: ignore[assignment]
    model.backbone.reduction = Reduction(3, (2, 2))
    temperature = calibrate(outer, [[{"image": torch.randn(3, 8, 8)}]])
    assert outer.reduction == Reduction(1, (3, 3), temperature=temperature)
    assert model.backbone.reduction == Reduction(3, (2, 2))


def test_reduction_tells_what_is_left_of_an_image() -> None:
    assert Reduction(1, (5, 6)).reduced(6, 6) == (5, 6)
    assert Reduction(1, (5, 6)).reduced(3, 11) == (5, 6)
    assert Reduction(1, (5, 6)).reduced(3, 10) == (3, 10)
    assert Reduction(1, (0.5, 0.25)).reduced(6, 8) == (3, 2)

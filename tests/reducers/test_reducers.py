"""A list of steps: how tokens are reduced, and how that is undone."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import pytest
import torch
from settings_cases import clustered
from torch import Tensor

from expedite_d2 import ops
from expedite_d2.reducers import (
    Cluster,
    Clustering,
    DetailMap,
    Grid,
    Points,
    Reduction,
    State,
    reconstruct,
    reduce,
)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- reduce, reconstruct ---------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, (4, 4), (4, 6)])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("mode", ["residual", "replace"])
def test_reduce_calls_operators(
    window: tuple[int, int] | None, temperature: float, mode: Any
) -> None:
    z = tokens(2, 9, 11, 5)
    settings = clustered(
        0, (2, 3), mode, iterations=3, neighbourhood=3, topk=2, temperature=temperature
    )
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
    low, clustering = reduce(z, clustered(0, (2, 2)), (4, 4))
    scaled, same = reduce(8 * z, clustered(0, (2, 2)), (4, 4))
    torch.testing.assert_close(scaled, 8 * low)
    torch.testing.assert_close(same.weights, clustering.weights)


def test_reconstruct_residual_of_unchanged_clusters_is_identity() -> None:
    z = tokens(2, 8, 8, 6)
    low, clustering = reduce(z, clustered(0, (2, 2)), (4, 4))
    assert torch.equal(reconstruct(low, clustering), z)


def test_reduce_leaves_small_images_with_one_warning() -> None:
    z = tokens(2, 4, 6, 3)
    reduction = clustered(0, (5, 5))
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
    low, clustering = reduce(z, clustered(0, (2, 2)), (4, 4))
    reconstruct(low.sin(), clustering).square().sum().backward()
    assert z.grad is not None and z.grad.isfinite().all() and z.grad.abs().sum() > 0


@pytest.mark.parametrize("window", [None, (4, 4)])
def test_hourglass_compiles_without_breaks(window: tuple[int, int] | None) -> None:
    torch.compiler.reset()

    reduction = clustered(0, (2, 2))

    def run(z: Tensor) -> Tensor:
        low, clustering = reduce(z, reduction, window)
        return reconstruct(low.sin(), clustering)

    z = tokens(2, 7, 8, 4)
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(z), run(z))


# ---- several steps ---------------------------------------------------------------------------


class Halved(NamedTuple):
    """The way back from pairs of neighbours in a sequence."""

    tokens: Tensor
    means: Tensor

    def reconstruct(self, low: Tensor, detail: DetailMap | None = None) -> Tensor:
        gained = (low - self.means).repeat_interleave(2, 1)
        return self.tokens + gained.view(self.tokens.shape)


class Halve(NamedTuple):
    """A step that makes one token of two neighbours, whatever the layout was."""

    at: int

    def reduce(
        self, tokens: Tensor, layout: Any, window: Any, residual: bool
    ) -> tuple[Tensor, Points, Halved]:
        means = tokens.flatten(1, -2).unflatten(1, (-1, 2)).mean(2)
        return means, Points(torch.full(means.shape[:2], 2.0)), Halved(tokens, means)


def test_steps_are_taken_before_their_blocks_and_undone_in_reverse() -> None:
    reduction = Reduction((Halve(1), Halve(3)))
    z = tokens(2, 4, 6, 3)
    x, state = reduction.enter(z, State.of_image(4, 6), 0, None)
    assert x is z and state.layout == Grid(4, 6) and not state.steps
    x, state = reduction.enter(x, state, 1, None)
    assert x.shape == (2, 12, 3) and isinstance(state.layout, Points) and len(state.steps) == 1
    same, state = reduction.enter(x, state, 2, None)
    assert same is x
    x, state = reduction.enter(x, state, 3, None)
    assert x.shape == (2, 6, 3) and len(state.steps) == 2 and state.grid == (4, 6)
    # Four tokens in a row share what their mean gained.
    torch.testing.assert_close(state.reconstruct(x + 1), z + 1)
    gain = tokens(2, 6, 3, seed=1)
    expected = z + gain.repeat_interleave(4, 1).view(z.shape)
    torch.testing.assert_close(state.reconstruct(x + gain), expected)


def test_one_cluster_is_a_list_of_one_step() -> None:
    z, reduction = tokens(2, 8, 8, 6), clustered(3, (2, 2))
    low, clustering = reduce(z, reduction, (4, 4))
    x, state = reduction.enter(z, State.of_image(8, 8), 3, (4, 4))
    assert torch.equal(x, low) and state.layout == Grid(4, 4)
    assert torch.equal(state.reconstruct(x.sin()), reconstruct(low.sin(), clustering))


def test_cluster_refuses_tokens_without_a_grid() -> None:
    with pytest.raises(ValueError, match=r"a map of tokens \(B, H, W, C\), got \(2, 12, 3\)"):
        Cluster(0, (2, 2)).reduce(tokens(2, 12, 3), Grid(3, 4), None, True)

"""Soft k-means clustering of tokens around the cells of a grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from expedite_d2.ops._checks import (
    check_clusters,
    check_int,
    check_map,
    check_spread,
    check_temperature,
    map_size,
)
from expedite_d2.ops._registration import define, for_type_of
from expedite_d2.ops.pairs import candidate_values
from expedite_d2.ops.reference import token_cluster_backward_ref, token_cluster_ref

_SETTINGS = (
    "Tensor tokens, int[] clusters, int[]? window, int iterations, int neighbourhood, "
    "float temperature, Tensor? spread"
)

_token_cluster = define("token_cluster", f"({_SETTINGS}) -> Tensor", token_cluster_ref)
# A separate operator, so that compilers do not trace through all iterations. It has no kernel:
# models are expedited for evaluation, and training through them need not be fast.
_token_cluster_backward = define(
    "_token_cluster_backward",
    f"(Tensor grad, {_SETTINGS}) -> Tensor",
    token_cluster_backward_ref,
)


@torch.library.register_fake(_token_cluster)
def _fake(
    tokens: Tensor,
    clusters: Sequence[int],
    window: Sequence[int] | None,
    iterations: int,
    neighbourhood: int,
    temperature: float,
    spread: Tensor | None,
) -> Tensor:
    batch, _, _, channels = tokens.shape
    return tokens.new_empty((batch, *map_size(tokens, clusters, window), channels))


@torch.library.register_fake(_token_cluster_backward)
def _backward_fake(grad: Tensor, tokens: Tensor, *settings: object) -> Tensor:
    return tokens.new_empty(tokens.shape)


@register_flop_formula(torch.ops.expedite_d2.token_cluster)
def token_cluster_flops(
    tokens: Sequence[int],
    clusters: Sequence[int],
    window: Sequence[int] | None,
    iterations: int,
    neighbourhood: int,
    *_: object,
    **__: object,
) -> int:
    """Twice the multiply-adds: pooling, then distances and weighted sums in each iteration."""
    near = candidate_values(tokens, clusters, window, neighbourhood)
    return 2 * (math.prod(tokens) + 2 * iterations * near)


@register_flop_formula(torch.ops.expedite_d2._token_cluster_backward)
def _backward_flops(grad: Sequence[int], *arguments: Any, **_: object) -> int:
    """As many as the forward: it runs again, with sums for the gradient as the last."""
    return token_cluster_flops(*arguments)


def _setup_context(ctx, inputs, output) -> None:
    tokens, *settings, spread = inputs
    if ctx.needs_input_grad[0]:
        ctx.save_for_backward(tokens, spread)
        ctx.settings = settings


def _backward(ctx, grad: Tensor):
    grad_tokens = None
    if ctx.needs_input_grad[0]:
        tokens, spread = ctx.saved_tensors
        grad_tokens = _token_cluster_backward(grad, tokens, *ctx.settings, spread)
    return grad_tokens, None, None, None, None, None, None


torch.library.register_autograd(_token_cluster, _backward, setup_context=_setup_context)


def token_cluster(
    tokens: Tensor,
    clusters: Sequence[int],
    *,
    window: Sequence[int] | None = None,
    iterations: int = 5,
    neighbourhood: int = 5,
    temperature: float,
    spread: Tensor | None = None,
) -> Tensor:
    """Clusters the tokens of a grid, or of each of its windows, to a smaller grid of centres.

    Centres start as the average of their cell's tokens. In each iteration every token distributes
    a mass of 1 over the candidate cells around its home cell, by the softmax of -tau * ||z - s||^2,
    and a centre becomes the mean of the tokens weighted by the mass that it received (arXiv
    2210.01035, section 3.2). A centre that receives nothing keeps its value.

    Args:
        tokens: (B, H, W, C), z, float32, bfloat16, float16 or float64, of any stride.
        clusters: (h, w), the cells of the grid, or of one window.
        window: (M_h, M_w), the tokens of one window. Windows tile from the top left; the last ones
            may be ragged, and then have only the cells that hold a real token. None: one grid.
        iterations: Rounds of soft k-means, kappa; 0 is average pooling.
        neighbourhood: Side length, in cells, of the square of candidate cells around a token's
            home cell; odd, clipped to its window.
        temperature: tau, the factor of squared distances, positive.
        spread: (B,), float32, from :func:`token_spread`: tau of image b is then temperature /
            spread[b].

    Returns:
        centres: (B, h', w', C) with h' = ceil(H * h / M_h) and w' = ceil(W * w / M_w), of the type
        of ``tokens``. Differentiable in ``tokens`` with the responsibilities as constants.

    Raises:
        ValueError, TypeError: For an argument of wrong shape, value or type.

    Note:
        Distances and sums are float32 (float64 for float64 tokens), also under autocast;
        deterministic. With ``window``, a token that is not finite makes all centres of its window
        NaN, and no others. Without, it spreads from its cell to those that share tokens with it, in
        each iteration.
    """
    op = "token_cluster"
    check_map(op, "tokens", tokens)
    cells, side = check_clusters(op, tokens, clusters, window)
    iterations = check_int(op, "iterations", iterations, 0)
    neighbourhood = check_int(op, "neighbourhood", neighbourhood, 1, odd=True)
    tau = check_temperature(op, temperature)
    check_spread(op, spread, tokens)
    run = for_type_of(tokens, _token_cluster, token_cluster_ref)
    return run(tokens, cells, side, iterations, neighbourhood, tau, spread)

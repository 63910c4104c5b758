"""Spread, centres and matches in one operator: all that precedes the low-resolution blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from expedite_d2.ops._checks import (
    check_clusters,
    check_int,
    check_map,
    check_temperature,
    map_size,
)
from expedite_d2.ops._registration import define, for_type_of
from expedite_d2.ops.reference import token_reduce_ref
from expedite_d2.ops.token_cluster import token_cluster_flops
from expedite_d2.ops.token_match import token_match_flops
from expedite_d2.ops.token_spread import token_spread_flops


class Reduced(NamedTuple):
    """Results of :func:`token_reduce`; the operator returns them as a tuple in this order."""

    spread: Tensor
    centres: Tensor
    indices: Tensor
    weights: Tensor


_token_reduce = define(
    "token_reduce",
    "(Tensor tokens, int[] clusters, int[]? window, int iterations, int neighbourhood, int topk, "
    "float temperature, bool automatic) -> (Tensor, Tensor, Tensor, Tensor)",
    token_reduce_ref,
)


@torch.library.register_fake(_token_reduce)
def _fake(
    tokens: Tensor,
    clusters: Sequence[int],
    window: Sequence[int] | None,
    iterations: int,
    neighbourhood: int,
    topk: int,
    temperature: float,
    automatic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, height, width, channels = tokens.shape
    shape = (batch, height, width, topk)
    return (
        tokens.new_empty(batch, dtype=torch.float32),
        tokens.new_empty((batch, *map_size(tokens, clusters, window), channels)),
        tokens.new_empty(shape, dtype=torch.int32),
        tokens.new_empty(shape, dtype=torch.float32),
    )


@register_flop_formula(torch.ops.expedite_d2.token_reduce)
def _flops(
    tokens: Sequence[int],
    clusters: Sequence[int],
    window: Sequence[int] | None,
    iterations: int,
    neighbourhood: int,
    topk: int,
    temperature: float,
    automatic: bool,
    *,
    out_shape: Sequence[Sequence[int]],
) -> int:
    """Sum over the three operators; a fixed temperature needs no spread."""
    spread = token_spread_flops(tokens, clusters, window, neighbourhood) if automatic else 0
    cluster = token_cluster_flops(tokens, clusters, window, iterations, neighbourhood)
    return spread + cluster + token_match_flops(tokens, out_shape[1], clusters, window)


def _setup_context(ctx, inputs, output) -> None:
    spread, _, indices, weights = output
    ctx.mark_non_differentiable(spread, indices, weights)
    if ctx.needs_input_grad[0]:
        tokens, clusters, window, iterations, neighbourhood, _, temperature, _ = inputs
        ctx.save_for_backward(tokens, spread)
        ctx.settings = (clusters, window, iterations, neighbourhood, temperature)


def _backward(ctx, *grads: Tensor):
    grad_tokens = None
    if ctx.needs_input_grad[0]:
        tokens, spread = ctx.saved_tensors
        backward = torch.ops.expedite_d2._token_cluster_backward.default
        grad_tokens = backward(grads[1], tokens, *ctx.settings, spread)
    return grad_tokens, None, None, None, None, None, None, None


torch.library.register_autograd(_token_reduce, _backward, setup_context=_setup_context)


def token_reduce(
    tokens: Tensor,
    clusters: Sequence[int],
    *,
    window: Sequence[int] | None = None,
    iterations: int = 5,
    neighbourhood: int = 5,
    topk: int = 4,
    temperature: float,
    automatic: bool = False,
) -> Reduced:
    """Clusters the tokens of a grid or of its windows, and matches every token to the centres.

    :func:`token_spread` (where ``automatic``), :func:`token_cluster` and :func:`token_match` one
    after the other, which describe the details; but tokens are matched to the centres before those
    are rounded to the type of ``tokens``. On CUDA, small windows share what the three have in
    common: the distances between the tokens of a window.

    Args:
        tokens: (B, H, W, C), float32, bfloat16, float16 or float64, of any stride.
        clusters: (h, w), the cells of the grid, or of one window.
        window: (M_h, M_w), the tokens of one window; None: one grid.
        iterations: Rounds of soft k-means, kappa; 0 is average pooling.
        neighbourhood: Side length, in cells, of the square of candidate cells around a token's
            home cell; odd, clipped to its window.
        topk: Number of nearest centres kept per token. Where a window has fewer, the nearest one is
            repeated with weight 0.
        temperature: tau, the factor of squared distances, positive.
        automatic: Divides the temperature by the spread of each image.

    Returns:
        spread: (B,), float32, from :func:`token_spread`; ones if not ``automatic``. Not
            differentiable.
        centres: (B, h', w', C), of the type of ``tokens``. Differentiable in ``tokens``, as those
            of :func:`token_cluster`.
        indices: (B, H, W, topk), int32, linear in the h' * w' map, nearest first; always in range.
            Not differentiable.
        weights: (B, H, W, topk), float32. Not differentiable.

    Raises:
        ValueError, TypeError: For an argument of wrong shape, value or type.

    Note:
        Distances, sums and the centres that tokens are matched to are float32 (float64 for float64
        tokens), also under autocast; deterministic. With ``window``, a token that is not finite
        makes all centres and weights of its window NaN, and the indices there the window's first
        cells. With ``automatic``, it makes the spread of its image NaN, and thereby all of the
        image's weights.
    """
    op = "token_reduce"
    check_map(op, "tokens", tokens)
    cells, side = check_clusters(op, tokens, clusters, window)
    iterations = check_int(op, "iterations", iterations, 0)
    neighbourhood = check_int(op, "neighbourhood", neighbourhood, 1, odd=True)
    topk = check_int(op, "topk", topk, 1)
    tau = check_temperature(op, temperature)
    run = for_type_of(tokens, _token_reduce, token_reduce_ref)
    return Reduced(*run(tokens, cells, side, iterations, neighbourhood, topk, tau, bool(automatic)))

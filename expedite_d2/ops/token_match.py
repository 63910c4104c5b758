"""The nearest centres of every token, and their weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from expedite_d2.ops._checks import (
    check_clusters,
    check_int,
    check_like,
    check_map,
    check_spread,
    check_temperature,
    map_size,
)
from expedite_d2.ops._registration import define, for_type_of, nondifferentiable
from expedite_d2.ops.pairs import match_pairs
from expedite_d2.ops.reference import token_match_ref

_token_match = define(
    "token_match",
    "(Tensor tokens, Tensor centres, int[] clusters, int[]? window, int topk, float temperature, "
    "Tensor? spread) -> (Tensor, Tensor)",
    token_match_ref,
)
nondifferentiable(_token_match)


@torch.library.register_fake(_token_match)
def _fake(
    tokens: Tensor,
    centres: Tensor,
    clusters: Sequence[int],
    window: Sequence[int] | None,
    topk: int,
    temperature: float,
    spread: Tensor | None,
) -> tuple[Tensor, Tensor]:
    shape = (*tokens.shape[:3], topk)
    indices = tokens.new_empty(shape, dtype=torch.int32)
    return indices, tokens.new_empty(shape, dtype=torch.float32)


@register_flop_formula(torch.ops.expedite_d2.token_match)
def token_match_flops(
    tokens: Sequence[int],
    centres: Sequence[int],
    clusters: Sequence[int],
    window: Sequence[int] | None,
    *_: object,
    **__: object,
) -> int:
    """Twice the multiply-adds: a distance to each centre of the token's window."""
    batch, *grid, channels = tokens
    return 2 * batch * channels * match_pairs(grid, clusters, window or grid)


def token_match(
    tokens: Tensor,
    centres: Tensor,
    clusters: Sequence[int],
    *,
    window: Sequence[int] | None = None,
    topk: int = 4,
    temperature: float,
    spread: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Finds the ``topk`` nearest centres of each token in its image or window, and weights them.

    The weights are the softmax of -tau * ||z - s||^2 over those centres, and sum to 1. All
    centres of the window compete, not only the neighbourhood that :func:`token_cluster` used.

    Args:
        tokens: (B, H, W, C), z, as they were before clustering; float32, bfloat16, float16 or
            float64, of any stride.
        centres: (B, h', w', C), s, from :func:`token_cluster`, of the type of ``tokens``.
        clusters: (h, w), as given to :func:`token_cluster`.
        window: (M_h, M_w) or None, as given to :func:`token_cluster`.
        topk: Number of nearest centres kept per token. Where a window has fewer, the nearest one is
            repeated with weight 0.
        temperature: tau, the factor of squared distances, positive.
        spread: (B,), float32: tau of image b is then temperature / spread[b].

    Returns:
        indices: (B, H, W, topk), int32, linear in the h' * w' map, nearest first; always in range.
            Not differentiable.
        weights: (B, H, W, topk), float32. Not differentiable.

    Raises:
        ValueError, TypeError: For an argument of wrong shape, value or type.

    Note:
        Of centres at the same distance the lower index comes first. Centres at NaN or infinitely
        far come last. A token that is not finite has NaN weights, and so has a token matched to a
        centre at NaN; an infinite centre has weight 0 beside a finite one. Computed in float32
        (float64 for float64 tokens), also under autocast; deterministic.
    """
    op = "token_match"
    check_map(op, "tokens", tokens)
    cells, side = check_clusters(op, tokens, clusters, window)
    shape = (tokens.shape[0], *map_size(tokens, cells, side), tokens.shape[3])
    check_like(op, "centres", centres, shape, tokens, "tokens")
    topk = check_int(op, "topk", topk, 1)
    tau = check_temperature(op, temperature)
    check_spread(op, spread, tokens)
    run = for_type_of(tokens, _token_match, token_match_ref)
    return run(tokens, centres, cells, side, topk, tau, spread)

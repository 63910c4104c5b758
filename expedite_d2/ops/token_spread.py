"""Mean squared distance of tokens to their nearest initial centre: the scale of distances."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from expedite_d2.ops._checks import check_clusters, check_int, check_map
from expedite_d2.ops._registration import define, for_type_of, nondifferentiable
from expedite_d2.ops.pairs import candidate_values
from expedite_d2.ops.reference import token_spread_ref

_token_spread = define(
    "token_spread",
    "(Tensor tokens, int[] clusters, int[]? window, int neighbourhood) -> Tensor",
    token_spread_ref,
)
nondifferentiable(_token_spread)


@torch.library.register_fake(_token_spread)
def _fake(
    tokens: Tensor, clusters: Sequence[int], window: Sequence[int] | None, neighbourhood: int
) -> Tensor:
    return tokens.new_empty(tokens.shape[0], dtype=torch.float32)


@register_flop_formula(torch.ops.expedite_d2.token_spread)
def token_spread_flops(
    tokens: Sequence[int],
    clusters: Sequence[int],
    window: Sequence[int] | None,
    neighbourhood: int,
    **_: object,
) -> int:
    """Twice the multiply-adds: pooling, one per value, and a distance to each candidate."""
    return 2 * (math.prod(tokens) + candidate_values(tokens, clusters, window, neighbourhood))


def token_spread(
    tokens: Tensor,
    clusters: Sequence[int],
    *,
    window: Sequence[int] | None = None,
    neighbourhood: int = 5,
) -> Tensor:
    """Measures the mean squared distance of an image's tokens to their nearest initial centre.

    The initial centres are those of :func:`token_cluster`; the candidates of a token are the cells
    within ``neighbourhood // 2`` rows and columns of its home cell. A temperature of c / spread
    makes clustering and matching independent of the scale of the features (the automatic
    temperature).

    Args:
        tokens: (B, H, W, C), float32, bfloat16, float16 or float64, of any stride.
        clusters: (h, w), the cells of the grid, or of one window.
        window: (M_h, M_w), the tokens of one window; None clusters the whole grid at once.
        neighbourhood: Side length, in cells, of the square of candidate cells around a token's
            home cell; odd.

    Returns:
        spread: (B,), float32, one value per image over all its windows; at least 1e-6 of the mean
        squared distance to the image's mean token, and never 0. Not differentiable.

    Raises:
        ValueError, TypeError: For an argument of wrong shape, value or type.

    Note:
        Computed in float32 (float64 for float64 tokens), also under autocast; deterministic.
    """
    op = "token_spread"
    check_map(op, "tokens", tokens)
    cells, side = check_clusters(op, tokens, clusters, window)
    neighbourhood = check_int(op, "neighbourhood", neighbourhood, 1, odd=True)
    run = for_type_of(tokens, _token_spread, token_spread_ref)
    return run(tokens, cells, side, neighbourhood)

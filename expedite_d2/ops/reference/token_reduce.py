"""Reference of token_reduce."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from expedite_d2.ops.reference.token_cluster import precise_centres
from expedite_d2.ops.reference.token_match import token_match_ref
from expedite_d2.ops.reference.token_spread import token_spread_ref


def token_reduce_ref(
    tokens: Tensor,
    clusters: Sequence[int],
    window: Sequence[int] | None,
    iterations: int,
    neighbourhood: int,
    topk: int,
    temperature: float,
    automatic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reference of :func:`expedite_d2.ops.token_reduce`.

    The references of its three parts, one after the other, but for one step: tokens are matched to
    centres in float32 (float64 for float64 tokens), and only then are these rounded to the type of
    the tokens.

    What is not finite goes where the parts take it. With ``window``, a token that is NaN or
    infinite makes all centres of its window NaN, so that all weights of the window's tokens are NaN
    and their indices the window's first cells in order, the first repeated where there are fewer
    than ``topk``: distances at NaN are all alike. Without, it is the composition of the parts.
    """
    grid = (clusters, window)
    if automatic:
        spread = token_spread_ref(tokens, *grid, neighbourhood)
    else:
        spread = tokens.new_ones(tokens.shape[0], dtype=torch.float32)
    centres = precise_centres(tokens, *grid, iterations, neighbourhood, temperature, spread)
    indices, weights = token_match_ref(tokens, centres, *grid, topk, temperature, spread)
    return spread, centres.to(tokens.dtype), indices, weights

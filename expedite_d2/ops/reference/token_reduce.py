"""Reference of token_reduce: the references of its three parts, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from expedite_d2.ops.reference.token_cluster import token_cluster_ref
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
    """Reference of :func:`expedite_d2.ops.token_reduce`."""
    grid = (clusters, window)
    if automatic:
        spread = token_spread_ref(tokens, *grid, neighbourhood)
    else:
        spread = tokens.new_ones(tokens.shape[0], dtype=torch.float32)
    centres = token_cluster_ref(tokens, *grid, iterations, neighbourhood, temperature, spread)
    indices, weights = token_match_ref(tokens, centres, *grid, topk, temperature, spread)
    return spread, centres, indices, weights

"""Reference of token_spread."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from expedite_d2.ops.reference._windows import (
    centred,
    no_autocast,
    pooling_rows,
    precise,
    squared_distances,
    unfold_tokens,
    window_grid,
)


def token_spread_ref(
    tokens: Tensor, clusters: Sequence[int], window: Sequence[int] | None, neighbourhood: int
) -> Tensor:
    """Reference of :func:`expedite_d2.ops.token_spread`."""
    with torch.no_grad(), no_autocast(tokens):
        height, width = tokens.shape[1:3]
        grid = window_grid(tokens, clusters, window, neighbourhood)
        z = centred(unfold_tokens(tokens, grid), grid)
        distances = squared_distances(z, pooling_rows(grid, z) @ z)
        distances = torch.where(grid.candidate, distances, torch.full_like(distances, torch.inf))
        nearest = distances.amin(3)
        nearest = torch.where(grid.real, nearest, torch.zeros_like(nearest))
        spread = nearest.sum((1, 2)) / (height * width)
        flat = precise(tokens).flatten(1, 2)
        variance = (flat - flat.mean(1, keepdim=True)).square().sum(2).mean(1)
        floor = 1e-6 * variance + torch.finfo(torch.float32).tiny
        return torch.maximum(spread, floor).float()

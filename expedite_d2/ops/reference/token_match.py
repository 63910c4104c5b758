"""Reference of token_match."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from expedite_d2.ops.reference._windows import (
    fold,
    masked_softmax,
    mean_token,
    no_autocast,
    precise,
    scaled_temperature,
    squared_distances,
    unfold,
    unfold_tokens,
    window_grid,
)


def token_match_ref(
    tokens: Tensor,
    centres: Tensor,
    clusters: Sequence[int],
    window: Sequence[int] | None,
    topk: int,
    temperature: float,
    spread: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Reference of :func:`expedite_d2.ops.token_match`."""
    with torch.no_grad(), no_autocast(tokens):
        grid = window_grid(tokens, clusters, window, neighbourhood=1)
        windows = (grid.rows.windows, grid.columns.windows)
        z = unfold_tokens(tokens, grid)
        side = (clusters[0], clusters[1])
        mean = mean_token(z, grid.real)
        s = unfold(precise(centres), *windows, side) - mean
        distances = squared_distances(z - mean, s)
        # An infinite token or centre is infinitely far, also where the product of the two is NaN.
        norms = (z - mean).square().sum(3)[..., None] + s.square().sum(3)[:, :, None]
        distances = torch.where(norms.isinf(), norms, distances)
        # The order puts NaN behind every number, and cells that do not exist behind NaN.
        order = distances.nan_to_num(nan=torch.finfo(distances.dtype).max)
        order = order.clamp_max(torch.finfo(distances.dtype).max)
        order = torch.where(grid.exists[:, None], order, torch.full_like(order, torch.inf))
        found = min(topk, distances.shape[3])
        nearest = _least(order, found)
        count = grid.exists.sum(1)[:, None, None]  # (W, 1, 1)
        rank = torch.arange(topk, device=tokens.device)
        nearest = torch.nn.functional.pad(nearest, (0, topk - found))
        nearest = torch.where(rank < count, nearest, nearest[..., :1])
        tau = scaled_temperature(temperature, spread, z)
        weights = masked_softmax(distances.gather(3, nearest), tau, rank < count)
        # Position in the window -> linear index in the map of all windows.
        row, column = nearest // clusters[1], nearest % clusters[1]
        at = torch.arange(z.shape[1], device=tokens.device)[:, None, None]
        row = row + at // grid.columns.windows * clusters[0]
        column = column + at % grid.columns.windows * clusters[1]
        indices = (row * grid.columns.cells + column).to(torch.int32)
        window_side = (grid.rows.real.shape[1], grid.columns.real.shape[1])
        size = (tokens.shape[1], tokens.shape[2])
        return (
            fold(indices, *windows, window_side, size).contiguous(),
            fold(weights.float(), *windows, window_side, size).contiguous(),
        )


def _least(values: Tensor, count: int) -> Tensor:
    """Returns the places of the least values along the last axis, in order, of equals the first.

    That is the beginning of a stable sort, for which exporters know no operator.
    """
    places = []
    for _ in range(count):
        place = values.argmin(-1, keepdim=True)  # the first of equals
        places.append(place)
        values = values.scatter(-1, place, torch.inf)
    return torch.cat(places, -1)

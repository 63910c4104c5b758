"""Reference of token_cluster and of its gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from expedite_d2.ops.reference._windows import (
    WindowGrid,
    centred,
    fold,
    masked_softmax,
    no_autocast,
    pooling_rows,
    precise,
    scaled_temperature,
    squared_distances,
    unfold,
    unfold_tokens,
    window_grid,
)


def token_cluster_ref(
    tokens: Tensor,
    clusters: Sequence[int],
    window: Sequence[int] | None,
    iterations: int,
    neighbourhood: int,
    temperature: float,
    spread: Tensor | None,
) -> Tensor:
    """Reference of :func:`expedite_d2.ops.token_cluster`; responsibilities count as constants."""
    centres = precise_centres(
        tokens, clusters, window, iterations, neighbourhood, temperature, spread
    )
    return centres.to(tokens.dtype)


def precise_centres(
    tokens: Tensor,
    clusters: Sequence[int],
    window: Sequence[int] | None,
    iterations: int,
    neighbourhood: int,
    temperature: float,
    spread: Tensor | None,
) -> Tensor:
    """Centres (B, h', w', C) in float32 or float64, before they are rounded to the tokens' type.

    With ``window``, one token that is not finite makes all centres of its window NaN.
    """
    with no_autocast(tokens):
        rows, grid = _assignments(
            tokens, clusters, window, iterations, neighbourhood, temperature, spread
        )
        z = unfold_tokens(tokens, grid)
        centres = rows @ z  # (B, W, K, C)
        if window is not None:
            # Adds 0, or NaN where a token is not finite.
            centres = centres + (0 * z).sum((2, 3), keepdim=True)
        size = (grid.rows.cells, grid.columns.cells)
        side = (clusters[0], clusters[1])
        return fold(centres, grid.rows.windows, grid.columns.windows, side, size).contiguous()


def token_cluster_backward_ref(
    grad: Tensor,
    tokens: Tensor,
    clusters: Sequence[int],
    window: Sequence[int] | None,
    iterations: int,
    neighbourhood: int,
    temperature: float,
    spread: Tensor | None,
) -> Tensor:
    """Gradient of the tokens (B, H, W, C) for ``grad`` of the centres (B, h', w', C)."""
    with no_autocast(tokens):
        rows, grid = _assignments(
            tokens, clusters, window, iterations, neighbourhood, temperature, spread
        )
        windows = (grid.rows.windows, grid.columns.windows)
        unfolded = unfold(precise(grad), *windows, (clusters[0], clusters[1]))
        side = (grid.rows.real.shape[1], grid.columns.real.shape[1])
        out = fold(
            rows.transpose(2, 3) @ unfolded, *windows, side, (tokens.shape[1], tokens.shape[2])
        )
        return out.to(tokens.dtype).contiguous()


def _assignments(
    tokens: Tensor,
    clusters: Sequence[int],
    window: Sequence[int] | None,
    iterations: int,
    neighbourhood: int,
    temperature: float,
    spread: Tensor | None,
) -> tuple[Tensor, WindowGrid]:
    """Rows A (B, W, K, N), constants for autograd, with centres = A z in every window."""
    with torch.no_grad():
        grid = window_grid(tokens, clusters, window, neighbourhood)
        z = centred(unfold_tokens(tokens, grid), grid)
        return _k_means(z, grid, scaled_temperature(temperature, spread, z), iterations), grid


def _k_means(z: Tensor, grid: WindowGrid, tau: Tensor, iterations: int) -> Tensor:
    """Rows A (B, W, K, N) with centres = A z after ``iterations`` rounds of soft k-means.

    Args:
        z: (B, W, N, C) with each window's mean token subtracted, zero where there is no token.
    """
    rows = pooling_rows(grid, z).expand(z.shape[0], -1, -1, -1)
    for _ in range(iterations):
        q = masked_softmax(squared_distances(z, rows @ z), tau, grid.candidate)
        q = torch.where(grid.real[:, :, None], q, torch.zeros_like(q)).transpose(2, 3)
        mass = q.sum(3, keepdim=True)
        # A centre without any mass keeps its value. NaN is not zero, so it reaches the output.
        rows = torch.where(mass == 0, rows, q / mass)
    return rows

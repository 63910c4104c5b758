"""The operators in plain PyTorch: oracle of the kernels, and fallback where none is built.

All windows of all images are worked on at once. Tokens are unfolded to ``(B, W, N, C)``: W windows
of N = M_h * M_w positions, of which ragged windows use only a part; K = m_h * m_w cells a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# exp(x) counts as 0 below this, about the smallest normal float32, in every type and kernel alike:
# whether a centre keeps its value depends on whether its responsibilities are exactly zero.
_LEAST_EXPONENT = -87.0


class _Axis(NamedTuple):
    """Windows and cells along rows or columns; all tensors boolean."""

    windows: int  # n
    cells: int  # along the whole map
    real: Tensor  # (n, M): the position holds a token
    exists: Tensor  # (n, m): the cell holds a token
    member: Tensor  # (m, M): the position lies in the cell, for the initial pooling
    near: Tensor  # (M, m): the cell is within `neighbourhood // 2` of the position's home cell


class _Grid(NamedTuple):
    """Windows and cells of a whole token grid."""

    rows: _Axis
    columns: _Axis
    real: Tensor  # (W, N)
    exists: Tensor  # (W, K)
    member: Tensor  # (W, K, N)
    candidate: Tensor  # (W, N, K)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _axis(size: int, window: int, clusters: int, neighbourhood: int, device: torch.device) -> _Axis:
    windows, cells = _ceil_div(size, window), _ceil_div(size * clusters, window)
    y = torch.arange(window, device=device)
    i = torch.arange(clusters, device=device)
    w = torch.arange(windows, device=device)[:, None]
    begin, end = i * window // clusters, ((i + 1) * window + clusters - 1) // clusters
    home = y * clusters // window
    return _Axis(
        windows,
        cells,
        real=w * window + y < size,
        exists=w * clusters + i < cells,
        member=(begin[:, None] <= y) & (y < end[:, None]),
        near=(home[:, None] - i).abs() <= neighbourhood // 2,
    )


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """Combines masks of rows (..., p, q) and columns (..., r, s) to (..., p * r, q * s)."""
    both = a[..., :, None, :, None] & b[..., None, :, None, :]
    return both.flatten(-4, -3).flatten(-2, -1)


def _grid(
    tokens: Tensor, clusters: Sequence[int], window: Sequence[int] | None, neighbourhood: int
) -> _Grid:
    """Lays out the windows of ``tokens`` (B, H, W, C)."""
    height, width = tokens.shape[1:3]
    m_h, m_w = window if window is not None else (height, width)
    rows = _axis(height, m_h, clusters[0], neighbourhood, tokens.device)
    columns = _axis(width, m_w, clusters[1], neighbourhood, tokens.device)
    real = _outer(rows.real, columns.real).flatten()
    real = real.view(rows.windows * columns.windows, m_h * m_w)
    exists = _outer(rows.exists, columns.exists).view(real.shape[0], clusters[0] * clusters[1])
    return _Grid(
        rows,
        columns,
        real,
        exists,
        member=_outer(rows.member, columns.member) & real[:, None],
        candidate=_outer(rows.near, columns.near) & exists[:, None],
    )


def _unfold(x: Tensor, rows: int, columns: int, side: tuple[int, int]) -> Tensor:
    """(B, H, W, C) -> (B, rows * columns, side_h * side_w, C); what a ragged window lacks is 0."""
    pad_h, pad_w = rows * side[0] - x.shape[1], columns * side[1] - x.shape[2]
    if pad_h or pad_w:
        x = torch.nn.functional.pad(x, (0, 0, 0, pad_w, 0, pad_h))
    x = x.unflatten(2, (columns, side[1])).unflatten(1, (rows, side[0]))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _fold(
    x: Tensor, rows: int, columns: int, side: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """(B, rows * columns, side_h * side_w, C) -> (B, *size, C), the inverse of :func:`_unfold`."""
    x = x.unflatten(1, (rows, columns)).unflatten(3, side)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, : size[0], : size[1]]


def precise(x: Tensor) -> Tensor:
    """Float32 or better, the type of all distances and weights."""
    return x if x.dtype == torch.float64 else x.float()


def no_autocast(x: Tensor) -> torch.autocast:
    """Distances must not be computed in low precision when an operator is called under autocast."""
    return torch.autocast(x.device.type, enabled=False)


def _unfold_tokens(tokens: Tensor, grid: _Grid) -> Tensor:
    side = (grid.rows.real.shape[1], grid.columns.real.shape[1])
    return _unfold(precise(tokens), grid.rows.windows, grid.columns.windows, side)


def _mean_token(z: Tensor, real: Tensor) -> Tensor:
    """Each window's mean token (B, W, 1, C), the origin of its distances.

    Expanded squared distances cancel badly around a large common offset. A component that is not
    finite is replaced: one bad token must not spoil distances that do not involve it.
    """
    mean = z.sum(2, keepdim=True) / real.sum(1)[:, None, None]
    return torch.where(mean.isfinite(), mean, torch.zeros_like(mean))


def _squared_distances(z: Tensor, s: Tensor) -> Tensor:
    """(B, W, N, C), (B, W, K, C) -> (B, W, N, K), never negative."""
    cross = z @ s.transpose(2, 3)
    return (z.square().sum(3)[..., None] + s.square().sum(3)[:, :, None] - 2 * cross).clamp_min(0)


def _tau(temperature: float, spread: Tensor | None, like: Tensor) -> Tensor:
    """The factor of squared distances, (B, 1, 1, 1) or a scalar.

    Positive and finite even for a tiny or infinite spread: infinity times a distance of 0 would be
    NaN, as 0 times an infinite distance would be.
    """
    if spread is None:
        return like.new_tensor(temperature)
    tau = temperature / spread.to(like.dtype)
    tiny, most = torch.finfo(torch.float32).tiny, torch.finfo(like.dtype).max
    return tau.clamp(tiny, most).view(-1, 1, 1, 1)


def _softmax(distances: Tensor, tau: Tensor, allowed: Tensor) -> Tensor:
    """Softmax of -tau * distances over the last axis among ``allowed``.

    The least distance is subtracted before it is multiplied: with the largest tau, 0 * tau is still
    0, while subtracting after the product could leave infinity minus infinity.
    """
    infinity = torch.full_like(distances, torch.inf)
    least = torch.where(allowed, distances, infinity).amin(-1, keepdim=True)
    # A finite stand-in for what is not allowed: least - infinity would make NaN of a product by 0.
    logits = -tau * (torch.where(allowed, distances, least) - least)
    return torch.where(allowed & ~(logits < _LEAST_EXPONENT), logits, -infinity).softmax(-1)


def _pool(grid: _Grid, like: Tensor) -> Tensor:
    """Rows (W, K, N) that average each cell's real tokens; zero for cells that do not exist."""
    member = grid.member.to(like.dtype)
    return member / member.sum(2, keepdim=True).clamp_min(1)


def _assignments(z: Tensor, grid: _Grid, tau: Tensor, iterations: int) -> Tensor:
    """Rows A (B, W, K, N) with centres = A z after ``iterations`` rounds of soft k-means.

    Args:
        z: (B, W, N, C) with each window's mean token subtracted, zero where there is no token.
    """
    rows = _pool(grid, z).expand(z.shape[0], -1, -1, -1)
    for _ in range(iterations):
        q = _softmax(_squared_distances(z, rows @ z), tau, grid.candidate)
        q = torch.where(grid.real[:, :, None], q, torch.zeros_like(q)).transpose(2, 3)
        mass = q.sum(3, keepdim=True)
        # A centre that nobody wants keeps its value. NaN is not zero, so it goes on to the output.
        rows = torch.where(mass == 0, rows, q / mass)
    return rows


def _centred(z: Tensor, grid: _Grid) -> Tensor:
    z = z - _mean_token(z, grid.real)
    return torch.where(grid.real[:, :, None], z, torch.zeros_like(z))


def token_spread_ref(
    tokens: Tensor, clusters: Sequence[int], window: Sequence[int] | None, neighbourhood: int
) -> Tensor:
    """Reference of :func:`expedite_d2.ops.token_spread`."""
    with torch.no_grad(), no_autocast(tokens):
        height, width = tokens.shape[1:3]
        grid = _grid(tokens, clusters, window, neighbourhood)
        z = _centred(_unfold_tokens(tokens, grid), grid)
        distances = _squared_distances(z, _pool(grid, z) @ z)
        distances = torch.where(grid.candidate, distances, torch.full_like(distances, torch.inf))
        nearest = distances.amin(3)
        nearest = torch.where(grid.real, nearest, torch.zeros_like(nearest))
        spread = nearest.sum((1, 2)) / (height * width)
        flat = precise(tokens).flatten(1, 2)
        variance = (flat - flat.mean(1, keepdim=True)).square().sum(2).mean(1)
        floor = 1e-6 * variance + torch.finfo(torch.float32).tiny
        return torch.maximum(spread, floor).float()


def token_cluster_assignments(
    tokens: Tensor,
    clusters: Sequence[int],
    window: Sequence[int] | None,
    iterations: int,
    neighbourhood: int,
    temperature: float,
    spread: Tensor | None,
) -> tuple[Tensor, _Grid]:
    """Rows A (B, W, K, N), constants for autograd, with centres = A z in every window."""
    with torch.no_grad():
        grid = _grid(tokens, clusters, window, neighbourhood)
        z = _centred(_unfold_tokens(tokens, grid), grid)
        return _assignments(z, grid, _tau(temperature, spread, z), iterations), grid


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
    with no_autocast(tokens):
        rows, grid = token_cluster_assignments(
            tokens, clusters, window, iterations, neighbourhood, temperature, spread
        )
        centres = rows @ _unfold_tokens(tokens, grid)  # (B, W, K, C)
        size = (grid.rows.cells, grid.columns.cells)
        side = (clusters[0], clusters[1])
        centres = _fold(centres, grid.rows.windows, grid.columns.windows, side, size)
        return centres.to(tokens.dtype).contiguous()


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
        rows, grid = token_cluster_assignments(
            tokens, clusters, window, iterations, neighbourhood, temperature, spread
        )
        windows = (grid.rows.windows, grid.columns.windows)
        unfolded = _unfold(precise(grad), *windows, (clusters[0], clusters[1]))
        side = (grid.rows.real.shape[1], grid.columns.real.shape[1])
        out = _fold(
            rows.transpose(2, 3) @ unfolded, *windows, side, (tokens.shape[1], tokens.shape[2])
        )
        return out.to(tokens.dtype).contiguous()


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
        grid = _grid(tokens, clusters, window, neighbourhood=1)
        windows = (grid.rows.windows, grid.columns.windows)
        z = _unfold_tokens(tokens, grid)
        side = (clusters[0], clusters[1])
        mean = _mean_token(z, grid.real)
        s = _unfold(precise(centres), *windows, side) - mean
        distances = _squared_distances(z - mean, s)
        # What is infinite is infinitely far, also where its product with the other is NaN.
        norms = (z - mean).square().sum(3)[..., None] + s.square().sum(3)[:, :, None]
        distances = torch.where(norms.isinf(), norms, distances)
        # The order puts NaN behind every number, and cells that do not exist behind NaN.
        order = distances.nan_to_num(nan=torch.finfo(distances.dtype).max)
        order = order.clamp_max(torch.finfo(distances.dtype).max)
        order = torch.where(grid.exists[:, None], order, torch.full_like(order, torch.inf))
        found = min(topk, distances.shape[3])
        nearest = order.sort(dim=3, stable=True).indices[..., :found]
        count = grid.exists.sum(1)[:, None, None]  # (W, 1, 1)
        rank = torch.arange(topk, device=tokens.device)
        nearest = torch.nn.functional.pad(nearest, (0, topk - found))
        nearest = torch.where(rank < count, nearest, nearest[..., :1])
        weights = _softmax(distances.gather(3, nearest), _tau(temperature, spread, z), rank < count)
        # Position in the window -> linear index in the map of all windows.
        row, column = nearest // clusters[1], nearest % clusters[1]
        at = torch.arange(z.shape[1], device=tokens.device)[:, None, None]
        row = row + at // grid.columns.windows * clusters[0]
        column = column + at % grid.columns.windows * clusters[1]
        indices = (row * grid.columns.cells + column).to(torch.int32)
        window_side = (grid.rows.real.shape[1], grid.columns.real.shape[1])
        size = (tokens.shape[1], tokens.shape[2])
        return (
            _fold(indices, *windows, window_side, size).contiguous(),
            _fold(weights.float(), *windows, window_side, size).contiguous(),
        )


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


def token_reconstruct_ref(
    refined: Tensor,
    indices: Tensor,
    weights: Tensor,
    tokens: Tensor | None,
    centres: Tensor | None,
) -> Tensor:
    """Reference of :func:`expedite_d2.ops.token_reconstruct`."""
    with no_autocast(refined):
        batch, channels = refined.shape[0], refined.shape[3]
        delta = precise(refined)
        if centres is not None:
            delta = delta - precise(centres)
        # One flat table for all images, so that each of the topk steps is a single lookup.
        table = delta.reshape(-1, channels)
        first = torch.arange(batch, device=refined.device) * (refined.shape[1] * refined.shape[2])
        at = indices.to(torch.int64) + first.view(-1, 1, 1, 1)
        weights = weights.detach().to(table.dtype)
        out = torch.zeros((*indices.shape[:3], channels), dtype=table.dtype, device=refined.device)
        if tokens is not None:
            out = precise(tokens)
        for k in range(indices.shape[3]):
            out = out + weights[..., k, None] * table[at[..., k]]
        return out.to(refined.dtype if tokens is None else tokens.dtype)


def token_reconstruct_backward_ref(
    grad: Tensor, indices: Tensor, weights: Tensor, cells: Sequence[int]
) -> Tensor:
    """Gradient of ``refined`` (B, *cells, C) for ``grad`` of the output (B, H, W, C)."""
    with no_autocast(grad):
        dtype, grad = grad.dtype, precise(grad)
        batch, channels = grad.shape[0], grad.shape[3]
        total = cells[0] * cells[1]
        first = torch.arange(batch, device=grad.device) * total
        at = indices.to(torch.int64) + first.view(-1, 1, 1, 1)
        out = grad.new_zeros(batch * total, channels)
        for k in range(indices.shape[3]):
            part = (grad * weights[..., k, None].to(grad.dtype)).reshape(-1, channels)
            # index_put, not index_add: with accumulate it adds in a fixed order on CUDA, too.
            out = out.index_put((at[..., k].reshape(-1),), part, accumulate=True)
        return out.view(batch, cells[0], cells[1], channels).to(dtype)

"""What the references share: windows of a grid of tokens, and distances and weights within them.

All windows of all images are processed at once. Tokens are unfolded to ``(B, W, N, C)``: W windows
of N = M_h * M_w positions, of which ragged windows use only a part; K = m_h * m_w cells per window.
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


class WindowGrid(NamedTuple):
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


def window_grid(
    tokens: Tensor, clusters: Sequence[int], window: Sequence[int] | None, neighbourhood: int
) -> WindowGrid:
    """Lays out the windows of ``tokens`` (B, H, W, C)."""
    height, width = tokens.shape[1:3]
    m_h, m_w = window if window is not None else (height, width)
    rows = _axis(height, m_h, clusters[0], neighbourhood, tokens.device)
    columns = _axis(width, m_w, clusters[1], neighbourhood, tokens.device)
    real = _outer(rows.real, columns.real).flatten()
    real = real.view(rows.windows * columns.windows, m_h * m_w)
    exists = _outer(rows.exists, columns.exists).view(real.shape[0], clusters[0] * clusters[1])
    return WindowGrid(
        rows,
        columns,
        real,
        exists,
        member=_outer(rows.member, columns.member) & real[:, None],
        candidate=_outer(rows.near, columns.near) & exists[:, None],
    )


def unfold(x: Tensor, rows: int, columns: int, side: tuple[int, int]) -> Tensor:
    """(B, H, W, C) -> (B, rows * columns, side_h * side_w, C), ragged windows filled up with 0."""
    pad_h, pad_w = rows * side[0] - x.shape[1], columns * side[1] - x.shape[2]
    if pad_h or pad_w:
        x = torch.nn.functional.pad(x, (0, 0, 0, pad_w, 0, pad_h))
    x = x.unflatten(2, (columns, side[1])).unflatten(1, (rows, side[0]))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def fold(
    x: Tensor, rows: int, columns: int, side: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """(B, rows * columns, side_h * side_w, C) -> (B, *size, C), the inverse of :func:`unfold`."""
    x = x.unflatten(1, (rows, columns)).unflatten(3, side)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, : size[0], : size[1]]


def precise(x: Tensor) -> Tensor:
    """Converts to float32, or keeps float64: the type of all distances and weights."""
    return x if x.dtype == torch.float64 else x.float()


def no_autocast(x: Tensor) -> torch.autocast:
    """Switches autocast off: distances must not be computed in low precision."""
    return torch.autocast(x.device.type, enabled=False)


def unfold_tokens(tokens: Tensor, grid: WindowGrid) -> Tensor:
    side = (grid.rows.real.shape[1], grid.columns.real.shape[1])
    return unfold(precise(tokens), grid.rows.windows, grid.columns.windows, side)


def mean_token(z: Tensor, real: Tensor) -> Tensor:
    """Each window's mean token (B, W, 1, C), the origin of its distances.

    Expanded squared distances cancel badly around a large common offset. A component that is not
    finite is replaced: one bad token must not spoil distances that do not involve it.
    """
    mean = z.sum(2, keepdim=True) / real.sum(1)[:, None, None]
    return torch.where(mean.isfinite(), mean, torch.zeros_like(mean))


def squared_distances(z: Tensor, s: Tensor) -> Tensor:
    """(B, W, N, C), (B, W, K, C) -> (B, W, N, K), never negative."""
    cross = z @ s.transpose(2, 3)
    return (z.square().sum(3)[..., None] + s.square().sum(3)[:, :, None] - 2 * cross).clamp_min(0)


def scaled_temperature(temperature: float, spread: Tensor | None, like: Tensor) -> Tensor:
    """The factor of squared distances, (B, 1, 1, 1) or a scalar.

    Positive and finite even for a tiny or infinite spread: infinity times a distance of 0 would be
    NaN, as 0 times an infinite distance would be.
    """
    if spread is None:
        return like.new_tensor(temperature)
    tau = temperature / spread.to(like.dtype)
    tiny, most = torch.finfo(torch.float32).tiny, torch.finfo(like.dtype).max
    return tau.clamp(tiny, most).view(-1, 1, 1, 1)


def masked_softmax(distances: Tensor, tau: Tensor, allowed: Tensor) -> Tensor:
    """Softmax of -tau * distances over the last axis among ``allowed``.

    The least distance is subtracted before it is multiplied: with the largest tau, 0 * tau is still
    0, while subtracting after the product could leave infinity minus infinity.
    """
    infinity = torch.full_like(distances, torch.inf)
    least = torch.where(allowed, distances, infinity).amin(-1, keepdim=True)
    # A finite value in place of what is not allowed, as 0 times an infinite one would be NaN.
    logits = -tau * (torch.where(allowed, distances, least) - least)
    return torch.where(allowed & ~(logits < _LEAST_EXPONENT), logits, -infinity).softmax(-1)


def pooling_rows(grid: WindowGrid, like: Tensor) -> Tensor:
    """Rows (W, K, N) that average each cell's real tokens; zero for cells that do not exist."""
    member = grid.member.to(like.dtype)
    return member / member.sum(2, keepdim=True).clamp_min(1)


def centred(z: Tensor, grid: WindowGrid) -> Tensor:
    z = z - mean_token(z, grid.real)
    return torch.where(grid.real[:, :, None], z, torch.zeros_like(z))

"""Average pooling in the place of clustering: the plainest way to fewer tokens.

Everything else stays: the blocks that run at low resolution, their windows and positions, and the
residual reconstruction, here from the four nearest cells with weights of bilinear interpolation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

from expedite_d2.ops.token_cluster import token_cluster
from expedite_d2.reducers import Cluster, Clustering, Grid, Points


def average_pool(
    self: Cluster,
    tokens: Tensor,
    layout: Grid | Points,
    window: tuple[int, int] | None,
    residual: bool,
) -> tuple[Tensor, Grid, Clustering]:
    """What `Cluster.reduce` is replaced by; the same arguments and results."""
    height, width = tokens.shape[1:3]
    side = window or (height, width)
    clusters = self.cells(*side)
    # Without an iteration the centres are the cells' averages.
    low = token_cluster(tokens, clusters, window=window, iterations=0, temperature=1.0)
    axes = [
        _interpolation(length, cells, clusters[i] / side[i], tokens.device)
        for i, (length, cells) in enumerate(zip((height, width), low.shape[1:3], strict=True))
    ]
    (rows, row_weights), (columns, column_weights) = axes
    indices = rows[:, None, :, None] * low.shape[2] + columns[None, :, None, :]
    weights = row_weights[:, None, :, None] * column_weights[None, :, None, :]
    shape = (len(tokens), height, width, 4)
    indices = indices.reshape(1, height, width, 4).to(torch.int32).expand(shape)
    weights = weights.reshape(1, height, width, 4).expand(shape)
    return low, Grid(low.shape[1], low.shape[2]), Clustering(tokens, low, indices, weights)


def _interpolation(
    length: int, cells: int, scale: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The two nearest cells of each position along one axis, and their weights, (length, 2)."""
    at = (torch.arange(length, device=device) + 0.5) * scale - 0.5
    at = at.clamp(0, cells - 1)
    first = at.floor().long().clamp_max(max(cells - 2, 0))
    second = (first + 1).clamp_max(cells - 1)
    rest = at - first
    return torch.stack([first, second], 1), torch.stack([1 - rest, rest], 1)


@contextlib.contextmanager
def average_pooled() -> Iterator[None]:
    """Expedited backbones pool instead of clustering while this is entered."""
    with mock.patch.object(Cluster, "reduce", average_pool):
        yield

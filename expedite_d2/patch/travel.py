"""What travels with the tensor from one block of an expedited encoder to the next.

It is an attribute of the tensor: nothing of a forward pass is kept on a module, and passes may
nest, run in threads, be recomputed or be compiled. An operation on the tensor loses it.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from expedite_d2.hourglass import Clustering

_ATTRIBUTE = "_expedite_d2"


class Travel(NamedTuple):
    """Where a tensor between two blocks is in the hourglass.

    Attributes:
        grid: rows and columns of the image's tokens, (H, W).
        cells: rows and columns of its clusters, (h, w); None before the span.
        clustering: what the reconstruction needs; None before the span.
        low: the same block output on the clusters, in the block's layout, where the tensor itself
            was reconstructed; None where the tensor is that.
    """

    grid: tuple[int, int]
    cells: tuple[int, int] | None = None
    clustering: Clustering | None = None
    low: Tensor | None = None


def attach(x: Tensor, travel: Travel) -> Tensor:
    """Let it travel with the tensor, which is returned."""
    setattr(x, _ATTRIBUTE, travel)
    return x


def travel_of(x: Tensor) -> Travel | None:
    """What travels with a tensor, if anything does."""
    return getattr(x, _ATTRIBUTE, None)


def clustering_of(x: Tensor) -> tuple[Tensor, Clustering] | None:
    """The clusters behind the output of a block in the low-resolution span.

    Args:
        x: the very tensor that the block returned.

    Returns:
        The block's output on the clusters, (B, h, w, C) without prefix tokens, and the clustering,
        for `reconstruct`; None for any other tensor.
    """
    travel = travel_of(x)
    if travel is None or travel.cells is None or travel.clustering is None:
        return None
    low = x if travel.low is None else travel.low
    if low.dim() == 3:  # (B, P + h * w, C)
        prefixes = low.shape[1] - travel.cells[0] * travel.cells[1]
        low = low[:, prefixes:].unflatten(1, travel.cells)
    return low, travel.clustering

"""The U shape of an expedited encoder: many tokens -> few tokens -> many tokens.

A `Reduction` is a list of steps, each of which reduces the number of tokens before one block of the
encoder. The blocks after it run on the reduced tokens. Where the span of these blocks ends, and
where the output of a block inside it is read, the steps are undone, last to first. What is needed
to undo them accompanies the tensor (`State`); nothing is stored on a module.
"""

from __future__ import annotations

from torch import Tensor

from expedite_d2.reducers.cluster import Cluster, Clustering
from expedite_d2.reducers.correction import Correction, DetailMap
from expedite_d2.reducers.merge import Merge, Merging
from expedite_d2.reducers.reduction import Expeditable, Reconstruction, Reduction, Step
from expedite_d2.reducers.state import Grid, Groups, Points, State, Undo, attach, state_of

__all__ = [
    "Cluster",
    "Clustering",
    "Correction",
    "DetailMap",
    "Expeditable",
    "Grid",
    "Groups",
    "Merge",
    "Merging",
    "Points",
    "Reconstruction",
    "Reduction",
    "State",
    "Step",
    "Undo",
    "attach",
    "clustering_of",
    "reconstruct",
    "reduce",
    "state_of",
]


def reduce(
    tokens: Tensor, reduction: Reduction, window: tuple[int, int] | None = None
) -> tuple[Tensor, Clustering]:
    """Clusters a token map.

    An image with no more tokens than the cluster grid has cells is left as it is, with a warning.

    Args:
        tokens: (B, H, W, C).
        reduction: settings that hold one `Cluster`.
        window: rows and columns of the windows, each of which is clustered separately; None
            clusters the image as a whole.

    Returns:
        The centres, (B, h, w, C), and what `reconstruct` needs.
    """
    residual = reduction.reconstruction == "residual"
    grid = Grid(tokens.shape[1], tokens.shape[2])
    low, _, clustering = reduction.cluster.reduce(tokens, grid, window, residual)
    return low, clustering


def reconstruct(low: Tensor, clustering: Clustering, detail: DetailMap | None = None) -> Tensor:
    """Distributes the processed clusters to the tokens.

    Args:
        low: (B, h, w, C), the centres after the low-resolution blocks.
        clustering: the second result of `reduce`.
        detail: what becomes of the tokens' own detail; None: it stays as it is.

    Returns:
        (B, H, W, C).
    """
    return clustering.reconstruct(low, detail)


def clustering_of(x: Tensor) -> tuple[Tensor, Clustering] | None:
    """Returns the clusters behind the output of a block in the low-resolution span.

    Args:
        x: the tensor that the block returned, not a copy or a view of it.

    Returns:
        The block's output on the clusters, (B, h, w, C) without class tokens and the like, or
        (B * T, h, w, C) for T frames, and the clustering, for `reconstruct`; None for any other
        tensor.
    """
    state = state_of(x)
    if state is None or len(state.steps) != 1 or not isinstance(state.steps[0], Clustering):
        return None
    assert isinstance(state.layout, Grid)  # a Clustering produces one
    low = x if state.low is None else state.low
    if low.dim() == 3:  # (B, P + h * w + S, C)
        prefixes, suffixes = state.aside
        low = low[:, prefixes : low.shape[1] - suffixes].unflatten(1, state.layout)
    elif state.channels_first:
        low = low.permute(0, 2, 3, 1)
    elif low.dim() == 5:  # (B, T, h, w, C)
        low = low.flatten(0, 1)
    return low, state.steps[0]

"""Pairs of tokens and centres, of which the work of clustering is made."""

from __future__ import annotations

import math
from collections.abc import Sequence


def candidate_pairs(
    grid: Sequence[int], clusters: Sequence[int], window: Sequence[int], neighbourhood: int
) -> int:
    """How many (token, candidate centre) pairs an image has; the axes are independent.

    Args:
        grid: (H, W), the tokens of the image.
        clusters: (h, w), the cells of one window.
        window: (M_h, M_w), the tokens of one window; (H, W) for the image as a whole.
        neighbourhood: Candidate cells of a token a side, odd.
    """
    return math.prod(
        _candidates(*axis, neighbourhood) for axis in zip(grid, window, clusters, strict=True)
    )


def match_pairs(grid: Sequence[int], clusters: Sequence[int], window: Sequence[int]) -> int:
    """How many (token, centre of its window) pairs an image has."""
    return candidate_pairs(grid, clusters, window, 2 * max(clusters) + 1)


def candidate_values(
    tokens: Sequence[int],
    clusters: Sequence[int],
    window: Sequence[int] | None,
    neighbourhood: int,
) -> int:
    """Multiply-adds of a distance for each candidate pair of a batch, as many as of a weighted sum.

    Args:
        tokens: (B, H, W, C), the shape of the batch.
        clusters, window, neighbourhood: as the operators take them.
    """
    batch, *grid, channels = tokens
    return batch * channels * candidate_pairs(grid, clusters, window or grid, neighbourhood)


def _candidates(length: int, window: int, cells: int, neighbourhood: int) -> int:
    """Pairs of a position and a candidate cell along one axis, ragged last window included."""
    reach = neighbourhood // 2
    pairs = 0
    for start in range(0, length, window):
        real = min(window, length - start)
        existing = math.ceil(real * cells / window)
        for position in range(real):
            home = position * cells // window
            pairs += min(home + reach, existing - 1) - max(home - reach, 0) + 1
    return pairs

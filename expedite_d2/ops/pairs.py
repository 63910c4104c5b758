"""Numbers of pairs of tokens and centres, which determine the work of clustering."""

from __future__ import annotations

import math
from collections.abc import Sequence


def candidate_pairs(
    grid: Sequence[int], clusters: Sequence[int], window: Sequence[int], neighbourhood: int
) -> int:
    """Counts the (token, candidate centre) pairs of an image; the axes are independent.

    Args:
        grid: (H, W), the tokens of the image.
        clusters: (h, w), the cells of one window.
        window: (M_h, M_w), the tokens of one window; (H, W) for the image as a whole.
        neighbourhood: Side length, in cells, of the square of candidate cells around a token's
            home cell; odd.
    """
    return math.prod(
        _candidates(*axis, neighbourhood) for axis in zip(grid, window, clusters, strict=True)
    )


def match_pairs(grid: Sequence[int], clusters: Sequence[int], window: Sequence[int]) -> int:
    """Counts the (token, centre of its window) pairs of an image."""
    return candidate_pairs(grid, clusters, window, 2 * max(clusters) + 1)


def candidate_values(
    tokens: Sequence[int],
    clusters: Sequence[int],
    window: Sequence[int] | None,
    neighbourhood: int,
) -> int:
    """Counts the multiply-adds of one distance, or one weighted sum, per candidate pair of a batch.

    Args:
        tokens: (B, H, W, C), the shape of the batch.
        clusters, window, neighbourhood: as the operators take them.
    """
    batch, *grid, channels = tokens
    return batch * channels * candidate_pairs(grid, clusters, window or grid, neighbourhood)


def _candidates(length: int, window: int, cells: int, neighbourhood: int) -> int:
    """Counts pairs of a position and a candidate cell along one axis, with a ragged last window."""
    reach = neighbourhood // 2
    pairs = 0
    for start in range(0, length, window):
        real = min(window, length - start)
        existing = math.ceil(real * cells / window)
        for position in range(real):
            home = position * cells // window
            pairs += min(home + reach, existing - 1) - max(home - reach, 0) + 1
    return pairs

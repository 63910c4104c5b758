"""Settings that meet a budget: the share that is left of the multiply-adds of an encoder's blocks.

A recipe says how tokens are reduced, and leaves one quantity open that the budget decides. Which
recipe suits which encoder and budget was measured (docs/accuracy.md) and stands in `RECIPES`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import nn

from expedite_d2.adapters.core import prepare
from expedite_d2.adapters.registry import find_encoder
from expedite_d2.reducers import Cluster, Merge, Reduction
from expedite_d2.tools.cost import on_meta
from expedite_d2.tools.describe import Block, describe

# Shares of the tokens that merges may keep.
_KEEPS = [round(0.5 + 0.0025 * step, 4) for step in range(200)]


@dataclass(frozen=True)
class Clusters:
    """Clusters of a fixed share of the sides; the budget decides the block before which they start.

    Attributes:
        side: rows of clusters as a share of those of the window or image; likewise columns.
    """

    side: float

    def settings(self, blocks: Sequence[Block]) -> list[Reduction]:
        """Returns the possible settings of an encoder of these blocks, the cheapest first.

        Of several stages, the one that costs most is reduced.
        """
        stages = [list(stage) for _, stage in groupby(blocks, key=lambda block: block.tokens)]
        dearest = max(stages, key=lambda stage: sum(block.multiply_adds for block in stage))
        first = blocks.index(dearest[0])
        return [
            Reduction((Cluster(alpha, (self.side, self.side)),))
            for alpha in range(first, first + len(dearest))
        ]


@dataclass(frozen=True)
class Merges:
    """Merges before fixed blocks; the budget decides the share of tokens that each one keeps.

    Attributes:
        after: shares of the blocks that run before each merge.
        rounds: of grouped attention, see `Merge`.
    """

    after: tuple[float, ...]
    rounds: int = 0

    def settings(self, blocks: Sequence[Block]) -> list[Reduction]:
        """Returns the possible settings of an encoder of these blocks, the cheapest first."""
        at = tuple(round(share * len(blocks)) for share in self.after)
        return [Reduction((Merge(at, keep, self.rounds),)) for keep in _KEEPS]


Recipe = Clusters | Merges


# What did best on the images that choose (docs/accuracy.md), for each kind of encoder: recipes with
# the least budget that each one is for, the largest first. Detail maps add to all but grouped
# attention.
RECIPES: dict[str, tuple[tuple[float, Recipe], ...]] = {
    # Blocks take a sequence of tokens, without relative positions.
    "sequence": (
        (0.6, Merges((0.0, 0.25, 0.5, 0.75))),
        (0.0, Merges((0.0, 0.25, 0.5, 0.75), rounds=2)),
    ),
    # Blocks attend in windows.
    "windows": ((0.65, Clusters(0.6667)), (0.0, Clusters(0.5))),
}


def recipe_for(kind: str, budget: float) -> Recipe:
    """Returns the recipe of a kind of encoder, a key of `RECIPES`, at a budget."""
    return next(recipe for least, recipe in RECIPES[kind] if budget >= least)


def meet_budget(
    model: nn.Module, recipe: Recipe, budget: float, size: tuple[int, int] | None = None
) -> Reduction:
    """Finds the settings of a recipe that cost the most within a budget.

    Args:
        model: the encoder, or a model that holds it, expedited or not; it is not changed.
        recipe: how its tokens are reduced.
        budget: share of the blocks' multiply-adds that may be left, between 0 and 1.
        size: height and width in pixels of the image for which they are counted; by default as
            for `describe`.

    Returns:
        The settings.

    Raises:
        ValueError: no known encoder, a recipe that it does not take, or a budget that the recipe
            does not reach.
    """
    copied: Any = on_meta(find_encoder(model)[1])
    possible = recipe.settings(describe(copied, size).blocks)

    def share(reduction: Reduction) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of settings on the way that save next to nothing
            prepare(copied, reduction)
            return describe(copied, size).share

    least = share(possible[0])
    if not least <= budget < 1:
        raise ValueError(
            f"budget must be at least {least:.3f} and less than 1 for {type(copied).__name__} and "
            f"{recipe}, got {budget}"
        )
    low, high = 0, len(possible)  # possible[low] meets the budget, possible[high] does not
    while high - low > 1:
        middle = (low + high) // 2
        if share(possible[middle]) <= budget:
            low = middle
        else:
            high = middle
    return possible[low]

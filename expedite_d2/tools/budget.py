"""Settings that meet a budget: the share that is left of an encoder's multiply-adds.

A recipe says how tokens are reduced, and leaves one quantity open that the budget decides. Which
recipe suits which encoder and budget was measured (docs/accuracy.md) and stands in `MERGING` and
`OTHERS`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Any, NamedTuple

from torch import nn

from expedite_d2.adapters.core import prepare, restore
from expedite_d2.adapters.registry import find_encoder
from expedite_d2.reducers import Cluster, Merge, Reduction
from expedite_d2.tools.cost import on_meta
from expedite_d2.tools.describe import Block, count_blocks, describe

#: Share of the multiply-adds that is aimed at where nobody says another.
BUDGET = 0.7
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
        after: shares of the blocks that run before each merge; of those at the start that run on
            as many tokens.
        rounds: of grouped attention, see `Merge`.
    """

    after: tuple[float, ...]
    rounds: int = 0

    def settings(self, blocks: Sequence[Block]) -> list[Reduction]:
        """Returns the possible settings of an encoder of these blocks, the cheapest first."""
        # Not those that further tokens have joined, such as EoMT's queries.
        stage = list(takewhile(lambda block: block.tokens == blocks[0].tokens, blocks))
        at = tuple(sorted({round(share * len(stage)) for share in self.after}))
        return [Reduction((Merge(at, keep, self.rounds),)) for keep in _KEEPS]


Recipe = Clusters | Merges


class Advice(NamedTuple):
    """A recipe, and the least budget that it is for."""

    least: float
    recipe: Recipe


_QUARTERS = (0.0, 0.25, 0.5, 0.75)
# What did best on the images that choose: photographs of rooms for the encoders whose tokens can
# merge, because their blocks take a sequence without relative positions; scenes for the others. The
# first recipe counts that is for a budget, that the encoder takes, and that reaches the budget.
MERGING = (
    Advice(0.65, Clusters(0.5833)),
    Advice(0.45, Merges(_QUARTERS, rounds=1)),
    Advice(0.0, Merges(_QUARTERS, rounds=2)),
    Advice(0.0, Merges(_QUARTERS)),
    Advice(0.0, Clusters(0.5)),
)
OTHERS = (
    Advice(0.65, Clusters(0.6667)),
    Advice(0.0, Clusters(0.5)),
)


class OutOfReach(ValueError):
    """A budget that no settings meet.

    Attributes:
        least: the settings that cost the least.
        share: what they leave.
    """

    def __init__(self, message: str, least: Reduction, share: float) -> None:
        super().__init__(message)
        self.least, self.share = least, share


class Costs:
    """What settings leave of an encoder's multiply-adds, counted on a copy without memory.

    Args:
        model: the encoder, or a model that holds it, expedited or not; it is not changed.
        size: height and width in pixels of the image for which they are counted; by default as
            for `describe`.

    Raises:
        ValueError: no known encoder.
    """

    def __init__(self, model: nn.Module, size: tuple[int, int] | None = None) -> None:
        self._family, encoder = find_encoder(model)
        self._encoder: Any = restore(on_meta(encoder))
        self._plain = describe(self._encoder, size)
        self._shares: dict[Reduction, float] = {}

    def share(self, reduction: Reduction) -> float:
        """Returns the share that is left by settings.

        Raises:
            ValueError: settings that the encoder does not take.
        """
        if reduction not in self._shares:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of settings on the way that save next to nothing
                prepare(self._encoder, reduction)
            left = count_blocks(self._encoder, self._family, self._plain.size)[1]
            self._shares[reduction] = left / self._plain.multiply_adds
        return self._shares[reduction]

    def least(self, recipe: Recipe) -> float:
        """Returns the least share that settings of a recipe leave.

        Raises:
            ValueError: a recipe that the encoder does not take.
        """
        return self.share(recipe.settings(self._plain.blocks)[0])

    def meet(self, recipe: Recipe, budget: float) -> Reduction:
        """Returns the settings of a recipe that cost the most within a budget.

        Args:
            recipe: how tokens are reduced.
            budget: share of the encoder's multiply-adds that may be left, between 0 and 1.

        Raises:
            ValueError: a recipe that the encoder does not take.
            OutOfReach: a budget that the recipe does not reach.
        """
        possible = recipe.settings(self._plain.blocks)
        least = self.share(possible[0])
        if not least <= budget < 1:
            raise OutOfReach(
                f"budget must be at least {least:.3f} and less than 1 for "
                f"{type(self._encoder).__name__} and {recipe}, got {budget}",
                possible[0],
                least,
            )
        low, high = 0, len(possible)  # possible[low] meets the budget, possible[high] does not
        while high - low > 1:
            middle = (low + high) // 2
            try:
                fits = self.share(possible[middle]) <= budget
            except ValueError:  # so many tokens are kept that none of a small image's would merge
                fits = False
            low, high = (middle, high) if fits else (low, middle)
        return possible[low]

    def recipes(self) -> tuple[Advice, ...]:
        """Returns the recipes for the encoder, as `MERGING` or `OTHERS` has them."""
        try:
            self.least(Merges(_QUARTERS))
        except ValueError:
            return OTHERS
        return MERGING


def choose(
    model: nn.Module, budget: float | None = None, size: tuple[int, int] | None = None
) -> Reduction:
    """Finds settings for a budget, by the recipe that did best for such encoders.

    Args:
        model: the encoder, or a model that holds it; it is not changed.
        budget: share of the encoder's multiply-adds that may be left; by default 0.7 or, with a
            warning, the nearest above it that can be reached.
        size: see `Costs`.

    Returns:
        The settings.

    Raises:
        ValueError: no known encoder.
        OutOfReach: a budget that cannot be reached; the message has the least that can.
    """
    wanted = BUDGET if budget is None else budget
    costs = Costs(model, size)
    nearest: OutOfReach | None = None
    refused: ValueError | None = None
    for least, recipe in costs.recipes():
        if wanted < least:
            continue
        try:
            return costs.meet(recipe, wanted)
        except OutOfReach as error:
            if nearest is None or error.share < nearest.share:
                nearest = error
        except ValueError as error:  # the encoder does not take such steps
            refused = error
    if nearest is None:
        assert refused is not None
        raise refused
    if budget is not None:
        raise nearest
    warnings.warn(
        f"{type(model).__name__} runs at {nearest.share:.3f} of its encoder's multiply-adds, the "
        f"least that can be reached: {BUDGET} was aimed at",
        stacklevel=3,
    )
    return nearest.least

"""Merging: the most similar pairs of tokens become one token each, before a few of the blocks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expedite_d2.ops._checks import integer, real
from expedite_d2.ops.token_merge import token_merge
from expedite_d2.ops.token_pool import token_pool
from expedite_d2.ops.token_reconstruct import token_reconstruct
from expedite_d2.profiling import profiler_range
from expedite_d2.reducers.correction import DetailMap
from expedite_d2.reducers.state import Grid, Groups, Points, State

# Digits after the point of a number of tokens: 1 - 0.8 is a little less than 0.2 in binary.
_DIGITS = 6


@dataclass(frozen=True)
class Merge:
    """Merges the most similar tokens before one block; it and those after it run on fewer tokens.

    The tokens at even places are matched with those at odd places by the cosine of their features.
    The pairs of largest cosine become their means.

    Attributes:
        at: number of the block, counted from the first of the encoder, which is 0; or several in a
            tuple, for as many merges.
        keep: share of the tokens that is kept, at least a half and less than all.
        rounds: how often the kept tokens are matched again to form groups, of about 2 ** rounds
            tokens, whose means alone the attention of the blocks sees; 0: it sees all.
    """

    at: Any
    keep: float
    rounds: int = 0

    def __post_init__(self) -> None:
        several = self.at if isinstance(self.at, (tuple, list)) else (self.at,)
        places = [integer(place) for place in several]
        if not places or any(place is None or place < 0 for place in places):
            raise ValueError(f"at must be an integer >= 0, or several, got {self.at!r}")
        keep, rounds = real(self.keep), integer(self.rounds)
        if keep is None or not 0.5 <= keep < 1:
            raise ValueError(f"keep must be at least 0.5 and less than 1, got {self.keep!r}")
        if rounds is None or rounds < 0:
            raise ValueError(f"rounds must be an integer >= 0, got {self.rounds!r}")
        # The class is frozen. numpy's numbers and lists of files become Python's own.
        object.__setattr__(self, "at", places[0] if len(places) == 1 else tuple(places))
        object.__setattr__(self, "keep", keep)
        object.__setattr__(self, "rounds", rounds)

    def each(self) -> Iterator[Merge]:
        """Yields one merge for each block."""
        for place in self.at if isinstance(self.at, tuple) else (self.at,):
            yield replace(self, at=place)

    def merged(self, count: int) -> int:
        """Returns how many of so many tokens become part of another."""
        return min(int(round((1 - self.keep) * count, _DIGITS)), count // 2)

    def reduce(
        self,
        tokens: Tensor,
        layout: Grid | Points,
        window: tuple[int, int] | None,
        residual: bool,
    ) -> tuple[Tensor, Points, Merging]:
        """Merges tokens.

        An image with so few tokens that none is to be merged is left as it is, with a warning.

        Args:
            tokens: (B, H, W, C) or (B, N, C), without prefixes.
            layout: how they are laid out.
            window: must be None.
            residual: whether the tokens keep their own detail when they are reconstructed.

        Returns:
            The kept tokens (B, n, C), their layout, and what `Merging.reconstruct` needs.
        """
        if window is not None:
            raise ValueError("Merge takes encoders without windows alone")
        tokens = tokens.flatten(1, -2)
        if isinstance(layout, Points):
            sizes = layout.sizes
        else:
            sizes = tokens.new_ones(tokens.shape[:2], dtype=torch.float32)
        merged = self.merged(int(tokens.shape[1]))
        if merged == 0:
            if not torch.compiler.is_compiling():
                warnings.warn(
                    f"{tokens.shape[1]} tokens are too few to keep {self.keep} of them: they run "
                    "unreduced",
                    stacklevel=2,
                )
            return tokens, Points(sizes), Merging(None, None, None)
        with profiler_range("expedite_d2.reduce", tokens):
            kept, sizes, places = token_merge(tokens, sizes, merged)
            groups = self._group(kept)
        before, after = (tokens, kept) if residual else (None, None)
        return kept, Points(sizes, groups), Merging(before, after, places)

    def _group(self, tokens: Tensor) -> Groups | None:
        """Matches tokens, and then their means, as often as `rounds` says."""
        means, places = tokens, None
        sizes = tokens.new_ones(tokens.shape[:2], dtype=torch.float32)
        for _ in range(self.rounds):
            pairs = int(means.shape[1]) // 2 - 1
            if pairs < 1:
                break
            means, sizes, new = token_merge(means, sizes, pairs)
            places = new if places is None else new.gather(1, places.long())
        return None if places is None else Groups(places, int(means.shape[1]))


class Merging(NamedTuple):
    """What is needed to reconstruct the tokens from those that were kept.

    Attributes:
        tokens: (B, N, C) before the merge; None for "replace".
        merged: (B, n, C) after the merge; None for "replace".
        places: (B, N) int32, the place of each token among those that were kept; None if none was
            merged.
    """

    tokens: Tensor | None
    merged: Tensor | None
    places: Tensor | None

    def reconstruct(self, low: Tensor, detail: DetailMap | None = None) -> Tensor:
        """Distributes the processed tokens.

        Args:
            low: (B, n, C), the kept tokens after the blocks that ran on them.
            detail: what becomes of the tokens' own detail; None: it stays as it is.

        Returns:
            (B, N, C).
        """
        if self.places is None:
            return low
        tokens, merged = self.tokens, self.merged
        with profiler_range("expedite_d2.reconstruct", low):
            out = spread(low, self.places, tokens, merged)
            if detail is not None and tokens is not None and merged is not None:
                # The sum keeps the tokens' type where autocast multiplies in a half type.
                out = out + detail.of(tokens - spread(merged, self.places))
            return out


def means_of_members(values: Tensor, state: State) -> Tensor:
    """Returns the means over the image's tokens that each merged token stands for.

    Args:
        values: (B, H * W, C), for each of the image's tokens.
        state: the state of the merged tokens.

    Returns:
        (B, n, C).
    """
    places = None
    for step in state.steps:
        new: Tensor | None = getattr(step, "places", None)
        if new is not None:  # otherwise there were too few tokens to merge
            places = new if places is None else new.gather(1, places.long())
    if places is None:
        return values
    assert isinstance(state.layout, Points)  # a Merging produces one
    return token_pool(values, places, state.layout.sizes.shape[1])


def spread(
    values: Tensor, places: Tensor, tokens: Tensor | None = None, means: Tensor | None = None
) -> Tensor:
    """Returns each place's value or, where tokens are given, adds to each what its mean changed by.

    Args:
        values: (B, n, C).
        places: (B, N) int32, in 0 ... n - 1.
        tokens: (B, N, C).
        means: (B, n, C), what `values` was.

    Returns:
        (B, N, C): values[places], or tokens + (values - means)[places].
    """
    # A sequence is a map of one column, and each token has one centre, of weight 1.
    indices = places[:, :, None, None]
    out = token_reconstruct(
        values.unsqueeze(2),
        indices,
        torch.ones((), device=values.device).expand(indices.shape),
        tokens=None if tokens is None else tokens.unsqueeze(2),
        centres=None if means is None else means.unsqueeze(2),
    )
    return out.squeeze(2)

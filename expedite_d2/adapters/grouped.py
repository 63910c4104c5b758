"""Grouped attention: it runs on means of groups of tokens, while all else in a block sees each.

x <- x + attention(norm(P x))[group], P x being the means over the groups. The norm before the
attention is given the means, and the attention's output is read at each token's group; the block's
own forward, with what it has around them, stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from expedite_d2.adapters.family import Family
from expedite_d2.adapters.override import Override, first_of, with_first
from expedite_d2.ops.token_pool import token_pool
from expedite_d2.reducers import Groups, Points
from expedite_d2.reducers.merge import spread
from expedite_d2.reducers.state import attach, state_of


def group_attention(family: Family, blocks: Sequence[nn.Module], number: int) -> list[Override]:
    """Returns the changes to one block's norm and attention.

    Raises:
        ValueError: the block has no norm of its own before the attention.
    """
    try:
        place = family.attention(blocks[number])
    except AttributeError:  # somebody has wrapped the block
        place = None
    if place is None:
        raise ValueError(
            f"rounds must be 0 for {family.name}: block {number}, {type(blocks[number]).__name__}, "
            "has no norm of its own before the attention, or runs attention and MLP in parallel"
        )
    norm, attention = place
    return [_OfMeans(norm, "forward"), _AtGroups(attention, "forward")]


def _groups(x: Tensor) -> Groups | None:
    state = state_of(x)
    layout = None if state is None else state.layout
    return layout.groups if isinstance(layout, Points) else None


class _OfMeans(Override):
    """The norm before the attention: takes the means over the groups."""

    def call(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        groups = _groups(x)
        if groups is None:
            return self.original(x, *args, **kwargs)
        means = token_pool(x, groups.places, groups.total)
        return attach(self.original(means, *args, **kwargs), state_of(x))  # type: ignore[arg-type]


class _AtGroups(Override):
    """The attention: returns to each token what its group received."""

    def call(self, *args: Any, **kwargs: Any) -> Any:
        out = self.original(*args, **kwargs)
        # Some of transformers' blocks pass their tokens by name.
        groups = _groups(args[0] if args else kwargs["hidden_states"])
        if groups is None:
            return out
        return with_first(out, spread(first_of(out), groups.places))

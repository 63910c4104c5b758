"""State that accompanies a tensor between the blocks of an expedited encoder.

It is an attribute of the tensor, so that no module holds anything of a forward pass: passes may
nest, run in threads, be recomputed or be compiled. The result of an operation does not have it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from expedite_d2.reducers.correction import DetailMap

_ATTRIBUTE = "_expedite_d2"


class Grid(NamedTuple):
    """Layout of tokens on a grid, row by row: those of the image, or clusters laid over them."""

    rows: int
    columns: int


class Groups(NamedTuple):
    """Groups of tokens, whose means alone the attention of the blocks sees.

    Attributes:
        places: (B, N) int32, the group of each token.
        total: number of groups.
    """

    places: Tensor
    total: int

    def between(self, prefixes: int, suffixes: int) -> Groups:
        """Returns the groups of a sequence with other tokens around, each its own group."""
        batch = self.places.shape[0]
        total = prefixes + self.total + suffixes
        each = torch.arange(total, dtype=torch.int32, device=self.places.device).expand(batch, -1)
        first, last = each[:, :prefixes], each[:, total - suffixes :]
        return Groups(torch.cat([first, self.places + prefixes, last], dim=1), total)


class Points(NamedTuple):
    """Layout of tokens in a sequence without a grid, each for one or more tokens of the image.

    Attributes:
        sizes: (B, N) float32, the number of tokens of the image that each stands for.
        groups: the groups that attention sees; None if it sees each token.
    """

    sizes: Tensor
    groups: Groups | None = None


class Undo(Protocol):
    """Undoes one step, and holds the tensors that this needs."""

    def reconstruct(self, low: Tensor, detail: DetailMap | None = None) -> Tensor:
        """Distributes the processed reduced tokens to the tokens before the step.

        Args:
            low: (B, h, w, C) on a grid or (B, n, C), after the blocks that ran on them.
            detail: what becomes of the tokens' own detail; None: it stays as it is.

        Returns:
            (B, H, W, C) or (B, N, C), in the layout before the step.
        """


class State(NamedTuple):
    """Where a tensor is in the hourglass.

    Attributes:
        grid: rows and columns of the image's tokens.
        layout: layout of the image's tokens in the tensor, or in `low` if it is not None.
        steps: how the steps so far are undone, in the order in which they ran; empty before the
            first step.
        low: the same block output before it was reconstructed, in the block's own form; None if
            the tensor was not reconstructed.
        aside: lengths of what the last step set aside: in a sequence, the numbers of tokens in
            front of the image's and behind them.
        channels_first: whether the blocks take maps (B, C, H, W).
        positions: what an adapter made of the blocks' positions for this layout, so that it need
            not do so again in the next block.
    """

    grid: Grid
    layout: Grid | Points
    steps: tuple[Undo, ...] = ()
    low: Tensor | None = None
    aside: tuple[int, ...] = ()
    channels_first: bool = False
    positions: Any = None

    @classmethod
    def of_image(cls, rows: int, columns: int) -> State:
        """Returns the state of an image's tokens before the first step."""
        return cls(Grid(rows, columns), Grid(rows, columns))

    def __reduce__(self) -> Any:
        """Leaves nothing of it in files of tensors, which `torch.load` then reads."""
        return OrderedDict, ()

    def reconstruct(self, low: Tensor, details: Sequence[DetailMap] | None = None) -> Tensor:
        """Undoes the steps, the last one first.

        Args:
            low: reduced tokens without prefixes, in `layout`.
            details: the detail maps of the steps, first to last; None without.

        Returns:
            (B, H, W, C), or (B, H * W, C) if the first step was given a sequence.
        """
        for place, step in reversed(list(enumerate(self.steps))):
            low = step.reconstruct(low, details[place] if details else None)
        return low


def attach(x: Tensor, state: State) -> Tensor:
    """Attaches a state to a tensor, and returns the tensor."""
    setattr(x, _ATTRIBUTE, state)
    return x


def state_of(x: Tensor) -> State | None:
    """Returns the state that accompanies a tensor, or None."""
    state = getattr(x, _ATTRIBUTE, None)
    return state if isinstance(state, State) else None  # not what a copied tensor has left of it

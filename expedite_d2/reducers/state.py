"""What accompanies a tensor between the blocks of an expedited encoder.

It is an attribute of the tensor: nothing of a forward pass is kept on a module, and passes may
nest, run in threads, be recomputed or be compiled. An operation on the tensor loses it.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

_ATTRIBUTE = "_expedite_d2"


class Grid(NamedTuple):
    """Tokens on a grid, row by row: those of the image, or the clusters that are laid over them."""

    rows: int
    columns: int


class Points(NamedTuple):
    """Tokens in a sequence that is no grid, each of which stands for one or more of the image's.

    Attributes:
        sizes: (B, N) float32, how many each stands for.
    """

    sizes: Tensor


class Undo(Protocol):
    """One step's way back, with the tensors that it takes."""

    def reconstruct(self, low: Tensor) -> Tensor:
        """What the reduced tokens have become, spread over the tokens that the step took in.

        Args:
            low: (B, h, w, C) on a grid or (B, n, C), after the blocks that ran on them.

        Returns:
            (B, H, W, C) or (B, N, C), as the step took them in.
        """


class State(NamedTuple):
    """Where in the hourglass a tensor is.

    Attributes:
        grid: rows and columns of the image's tokens.
        layout: how the tensor's tokens lie, prefix tokens aside, or those of `low` where there is
            one.
        steps: what was reduced before, in that order; empty before the first step.
        low: the same block output before it was reconstructed, in the block's own form; None where
            the tensor itself was not reconstructed.
    """

    grid: Grid
    layout: Grid | Points
    steps: tuple[Undo, ...] = ()
    low: Tensor | None = None

    @classmethod
    def of_image(cls, rows: int, columns: int) -> State:
        """That of an image's tokens before the first step."""
        return cls(Grid(rows, columns), Grid(rows, columns))

    def reconstruct(self, low: Tensor) -> Tensor:
        """Undoes the steps, the last one first.

        Args:
            low: reduced tokens without prefixes, in `layout`.

        Returns:
            (B, H, W, C), or (B, H * W, C) where the first step took in a sequence.
        """
        for step in reversed(self.steps):
            low = step.reconstruct(low)
        return low


def attach(x: Tensor, state: State) -> Tensor:
    """Lets a state accompany a tensor, which is returned."""
    setattr(x, _ATTRIBUTE, state)
    return x


def state_of(x: Tensor) -> State | None:
    """The state that accompanies a tensor, if one does."""
    return getattr(x, _ATTRIBUTE, None)

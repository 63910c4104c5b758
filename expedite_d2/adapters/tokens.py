"""The form in which blocks take their tokens, and where the grid of tokens becomes known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from expedite_d2.adapters.override import Override, Propagate, refuse_tracing
from expedite_d2.reducers.state import Grid, Points, State, attach, state_of

if TYPE_CHECKING:
    from expedite_d2.adapters.hourglass import Hourglass

Size = tuple[int, int]


@dataclass(frozen=True)
class TokenSequence:
    """Blocks take (B, P + N + S, C): P prefix tokens, those of the image, and S suffix tokens.

    Attributes:
        prefixes: number of tokens in front of the image's: class, distillation, register.
        suffixes: number of tokens behind the image's: detection.
    """

    prefixes: Callable[[Any], int] = lambda encoder: 1
    suffixes: Callable[[Any], int] = lambda encoder: 0

    def split(
        self, encoder: nn.Module, x: Tensor, layout: Grid | Points
    ) -> tuple[Sequence[Tensor], Tensor]:
        """Sets aside (B, P, C) and (B, S, C), and returns them and (B, H, W, C) or (B, N, C)."""
        first, last = self.prefixes(encoder), x.shape[1] - self.suffixes(encoder)
        tokens = x[:, first:last]
        aside = (x[:, :first], x[:, last:])
        return aside, tokens.unflatten(1, layout) if isinstance(layout, Grid) else tokens

    def join(self, aside: Sequence[Tensor], tokens: Tensor) -> Tensor:
        """The inverse of `split`."""
        prefix, suffix = aside
        parts = [part for part in (prefix, tokens.flatten(1, -2), suffix) if part.shape[1]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


@dataclass(frozen=True)
class TokenMap:
    """Blocks take (B, H, W, C) or (B, C, H, W).

    Attributes:
        channels_first: whether it is the latter.
    """

    channels_first: bool = False

    def split(
        self, encoder: nn.Module, x: Tensor, layout: Grid | Points
    ) -> tuple[Sequence[Tensor], Tensor]:
        """Sets nothing aside, and returns the map (B, H, W, C)."""
        return (), x.permute(0, 2, 3, 1) if self.channels_first else x

    def join(self, aside: Sequence[Tensor], tokens: Tensor) -> Tensor:
        """The inverse of `split`."""
        return tokens.permute(0, 3, 1, 2) if self.channels_first else tokens


@dataclass(frozen=True)
class TokenClip:
    """Blocks take (B, T, H, W, C): T frames, each with a map of its own."""

    def split(
        self, encoder: nn.Module, x: Tensor, layout: Grid | Points
    ) -> tuple[Sequence[Tensor], Tensor]:
        """Sets aside an empty (B, T, 0), for `join`, and returns maps (B * T, H, W, C)."""
        return (x[:, :, 0, 0, :0],), x.flatten(0, 1)

    def join(self, aside: Sequence[Tensor], tokens: Tensor) -> Tensor:
        """The inverse of `split`."""
        return tokens.unflatten(0, aside[0].shape[:2])


@dataclass(frozen=True)
class GridFromCall:
    """Reads the grid from one call within the encoder; it accompanies the tokens from there on.

    Attributes:
        place: a module and the name of its method, from an encoder and its span of reduced blocks.
        read: rows and columns of the image's tokens, from the encoder and the call's arguments.
        onto: the tensor of tokens, from the call's arguments and its result.
        onto_input: whether that tensor is the first argument rather than in the result.
        then: modules between there and the first block, which propagate the state.
        configured: rows and columns of tokens of the images that the encoder is configured for, or
            None.
        varies: whether images may be of another size.
    """

    place: Callable[[Any, range], tuple[nn.Module, str]]
    read: Callable[..., Size]
    onto: Callable[[Any], Tensor] = lambda out: out
    onto_input: bool = False
    then: Callable[[Any], Sequence[nn.Module]] = lambda encoder: ()
    configured: Callable[[Any], Size | None] = lambda encoder: None
    varies: Callable[[Any], bool] = lambda encoder: True

    def overrides(self, hourglass: Hourglass) -> list[Override]:
        """Returns the changes to the encoder that are needed to attach the state."""
        owner, method = self.place(hourglass.encoder, hourglass.span)
        after = [Propagate(module, "forward") for module in self.then(hourglass.encoder)]
        return [_ReadGrid(owner, method, hourglass), *after]

    def state(self, x: Tensor) -> State | None:
        """Returns the state of tokens that enter a block; None if it was lost."""
        return state_of(x)


@dataclass(frozen=True)
class GridFromShape:
    """Reads the grid from the shape of the blocks' maps, (B, H, W, C) or (B, T, H, W, C).

    Attributes:
        channels_first: whether these are (B, C, H, W).
        configured: rows and columns of tokens of the images that the encoder is configured for, or
            None.
    """

    channels_first: bool = False
    configured: Callable[[Any], Size | None] = lambda encoder: None

    def overrides(self, hourglass: Hourglass) -> list[Override]:
        """Returns no changes."""
        return []

    def varies(self, encoder: nn.Module) -> bool:
        """Whether images may be of another size: always."""
        return True

    def state(self, x: Tensor) -> State | None:
        """Returns the state of tokens that enter a block."""
        if (state := state_of(x)) is not None:
            return state
        rows, columns = x.shape[2:] if self.channels_first else x.shape[-3:-1]
        return State.of_image(rows, columns)._replace(channels_first=self.channels_first)


class _ReadGrid(Override):
    """Attaches the state to the tokens of a call."""

    def __init__(self, owner: nn.Module, name: str, hourglass: Hourglass) -> None:
        super().__init__(owner, name)
        self.hourglass = hourglass

    def call(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        source: Any = self.hourglass.family.grid
        rows, columns = source.read(self.hourglass.encoder, refuse_tracing(x), *args, **kwargs)
        state = State.of_image(rows, columns)
        if source.onto_input:
            return self.original(attach(x, state), *args, **kwargs)
        out = self.original(x, *args, **kwargs)
        attach(source.onto(out), state)
        return out

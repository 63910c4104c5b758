"""A family of encoders: how they are recognised, and which mechanisms they consist of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from expedite_d2.adapters.override import Override
from expedite_d2.adapters.tokens import (
    GridFromCall,
    GridFromShape,
    TokenClip,
    TokenMap,
    TokenSequence,
)
from expedite_d2.reducers import Grid, Reduction, State

if TYPE_CHECKING:
    from expedite_d2.adapters.hourglass import Hourglass

Size = tuple[int, int]
#: The norm before a block's attention and the attention itself.
Attention = tuple[nn.Module, nn.Module]


class BlockCall(NamedTuple):
    """A call of one block of the span.

    Attributes:
        hourglass: the changes to the encoder.
        encoder: the encoder that the block belongs to: the expedited one, or its running replica.
        block: `owner` is the block, `original` its forward.
        x: reduced tokens, in the form in which the block takes its tokens.
        state: the state of the tokens.
        args: positional arguments of the block after its tokens.
        kwargs: keyword arguments of the block.
    """

    hourglass: Hourglass
    encoder: Any
    block: Override
    x: Tensor
    state: State
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def cells(self) -> Grid:
        """Rows and columns of clusters; those of the image if it was too small to be reduced."""
        layout = self.state.layout
        if not isinstance(layout, Grid):
            family = self.hourglass.family.name
            raise ValueError(f"the positions of {family} take tokens on a grid alone")
        return layout

    def without_masks(self) -> BlockCall:
        """Returns the same call without further tensors, which are masks that have no effect."""
        args = tuple(None if isinstance(value, Tensor) else value for value in self.args)
        kwargs = {k: None if isinstance(v, Tensor) else v for k, v in self.kwargs.items()}
        return self._replace(args=args, kwargs=kwargs)

    @property
    def reduced(self) -> bool:
        """Whether there are fewer tokens than in the image."""
        layout = self.state.layout
        return not isinstance(layout, Grid) or layout != self.state.grid


class Positions:
    """How the blocks of a family know where a token is, and how they run on reduced tokens.

    By itself: positions that were added to the tokens before the first block. Others inherit.

    Attributes:
        kind: what they are, in a few words.
        needs_grid: whether reduced tokens must lie on a grid, as those of a Cluster do.
    """

    kind: str = "absolute"
    needs_grid: bool = False

    def check(self, encoder: Any, reduction: Reduction) -> None:
        """Raises ValueError for settings that these positions do not support."""

    def overrides(self, hourglass: Hourglass) -> list[Override]:
        """Returns the changes to the encoder that are needed beside those of the span's blocks."""
        return []

    def prepare(self, call: BlockCall) -> BlockCall:
        """Returns the call with positions for the layout, and in its state what later ones need."""
        return call

    def run(self, call: BlockCall) -> Any:
        """Runs one block on reduced tokens, and returns what it returns."""
        if call.reduced:
            refuse_masks(*call.args, call.kwargs.get("attn_mask"))
            call = call.without_masks()
        return call.block.original(call.x, *call.args, **call.kwargs)


def to_encoder_end(encoder: Any, blocks: Sequence[nn.Module], first: int) -> int:
    """Ends the span of a plain ViT, with its last block."""
    return len(blocks)


@dataclass(frozen=True, eq=False, repr=False)
class Family:
    """Encoders whose last blocks can run on fewer tokens.

    Every callable is given an encoder of the family. Where a model is copied or pickled, its family
    is found again by name.

    Attributes:
        name: library and class, for messages; unique.
        library: top-level package of the class; "" for a class whose file is copied from project
            to project.
        classes: names of the encoder's class, or of one that it inherits from.
        blocks: all blocks, from the first of the encoder on; tokens are their first argument, and
            what they return, or the first of it.
        tokens: the form in which blocks take their tokens.
        grid: where the rows and columns of tokens become known.
        positions: how the blocks know where a token is.
        span: the number of the block after the span, which runs at full resolution again; from the
            encoder, its blocks and the number of the first block that runs on fewer tokens.
        window: rows and columns of the windows, each of which is clustered separately; None for
            one grid per image; from the encoder and the number of the block where that happens.
        inside: whether the output of any block may be read; if not, only that of a span's last
            block.
        image_size: height and width of the images that an encoder is configured for, or None.
        run: calls an encoder on images (B, 3, H, W) of any size that it supports.
        attention: the norm before the attention of a block, and the attention; None if the block
            does not have these as separate modules.
        eager: whether the encoder's own attention writes out its matrix of pairs of tokens, rather
            than call a fused kernel.
        matches: further condition on an encoder, for classes whose name is ambiguous.
    """

    name: str
    library: str
    classes: tuple[str, ...]
    blocks: Callable[[Any], Sequence[nn.Module]]
    tokens: TokenSequence | TokenMap | TokenClip
    grid: GridFromCall | GridFromShape
    positions: Positions = Positions()
    span: Callable[[Any, Sequence[nn.Module], int], int] = to_encoder_end
    window: Callable[[Any, int], Size | None] = lambda encoder, first: None
    inside: bool = True
    image_size: Callable[[Any], Size | None] = lambda encoder: None
    run: Callable[[Any, Tensor], Any] = lambda encoder, images: encoder(images)
    attention: Callable[[Any], Attention | None] = lambda block: None
    eager: Callable[[Any], bool] = lambda encoder: False
    matches: Callable[[Any], bool] = lambda encoder: True

    def recognises(self, module: nn.Module) -> bool:
        """Whether a module is an encoder of this family, judged by the names of its classes."""
        return inherits(module, self.library, *self.classes) and self.matches(module)

    def __repr__(self) -> str:
        return f"Family({self.name!r})"

    def __reduce__(self) -> Any:
        from expedite_d2.adapters.registry import family_named

        return family_named, (self.name,)


def inherits(module: nn.Module, library: str, *names: str) -> bool:
    """Whether a module's class is, or inherits from, a class of a library with one of these names.

    Args:
        module: any module.
        library: a top-level package; "" for any.
        names: names of classes.
    """
    return any(
        kind.__name__ in names and library in ("", kind.__module__.partition(".")[0])
        for kind in type(module).__mro__
    )


def refuse_masks(*masks: Any) -> None:
    """Raises for attention masks that have an effect: their rows are for tokens, not clusters.

    Args:
        masks: tensors of any shape, added to the logits if they are floating point, else 0 for a
            masked token. Other values are ignored.

    Raises:
        ValueError: a mask that has an effect, or whose values are unknown because it is traced.
    """
    for mask in masks:
        if not isinstance(mask, Tensor):
            continue
        if torch.compiler.is_compiling():
            raise ValueError(
                "an expedited encoder takes no attention mask, got one while the model is traced, "
                "when it cannot be seen whether it has an effect"
            )
        if bool(mask.any() if mask.is_floating_point() else not mask.all()):
            raise ValueError(
                "an expedited encoder takes no attention mask with an effect, got one of shape "
                f"{list(mask.shape)}"
            )


def refuse_oblong(cells: Size, encoder: nn.Module) -> None:
    """Raises for oblong cluster grids, which encoders with square windows do not support."""
    rows, columns = cells
    if rows != columns:
        raise ValueError(
            f"clusters must have as many rows as columns in the square windows of "
            f"{type(encoder).__name__}, got {rows}x{columns}"
        )

"""A family of encoders: how they are recognised, and which mechanisms they are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from expedite_d2.adapters.override import Override
from expedite_d2.adapters.tokens import GridFromCall, GridFromShape, TokenMap, TokenSequence
from expedite_d2.reducers import Grid, Reduction, State

if TYPE_CHECKING:
    from expedite_d2.adapters.hourglass import Hourglass

Size = tuple[int, int]
#: The norm before a block's attention and the attention itself.
Attention = tuple[nn.Module, nn.Module]


class BlockCall(NamedTuple):
    """One block of the span, and what it is called with.

    Attributes:
        hourglass: what the encoder was expedited by.
        encoder: whose block it is: the expedited one, or the replica of it that runs.
        block: `owner` is the block, `original` its forward.
        x: reduced tokens, as the block takes its tokens.
        state: theirs.
        args: what the block was given beside its tokens.
        kwargs: the same by name.
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
        """Rows and columns of clusters; the image's own where it was too small to be reduced."""
        layout = self.state.layout
        if not isinstance(layout, Grid):
            family = self.hourglass.family.name
            raise ValueError(f"the positions of {family} take tokens on a grid alone")
        return layout

    def without_masks(self) -> BlockCall:
        """The same call without what is a tensor beside the tokens: masks that have no effect."""
        args = tuple(None if isinstance(value, Tensor) else value for value in self.args)
        kwargs = {k: None if isinstance(v, Tensor) else v for k, v in self.kwargs.items()}
        return self._replace(args=args, kwargs=kwargs)

    @property
    def reduced(self) -> bool:
        """Whether there are fewer tokens than the image has."""
        return self.state.layout != self.state.grid


class Positions(Protocol):
    """How the blocks of a family know where a token is, and how they run on reduced tokens."""

    def check(self, encoder: Any, reduction: Reduction) -> None:
        """Raises ValueError for settings that these positions do not take."""

    def overrides(self, hourglass: Hourglass) -> list[Override]:
        """What must change in the encoder, beside the blocks of the span."""

    def run(self, call: BlockCall) -> Tensor:
        """Runs one block on reduced tokens."""


class NoPositions:
    """None in the blocks: positions were added to the tokens before the first of them."""

    def check(self, encoder: Any, reduction: Reduction) -> None:
        """Accepts any settings."""

    def overrides(self, hourglass: Hourglass) -> list[Override]:
        """Nothing need change."""
        return []

    def run(self, call: BlockCall) -> Tensor:
        """Runs the block as it is."""
        if call.reduced:
            refuse_masks(*call.args, call.kwargs.get("attn_mask"))
            call = call.without_masks()
        return call.block.original(call.x, *call.args, **call.kwargs)


def to_encoder_end(encoder: Any, blocks: Sequence[nn.Module], first: int) -> int:
    """The span of plain ViTs: all blocks from the first on."""
    return len(blocks)


@dataclass(frozen=True, eq=False, repr=False)
class Family:
    """Encoders whose last blocks can run on fewer tokens.

    Every callable gets an encoder of the family. A family is found again by its name where a model
    is copied or pickled.

    Attributes:
        name: library and class, as messages name it; unique.
        library: top-level package of the class; "" for files that are copied from project to
            project.
        classes: names of the encoder's class, any of which may be inherited from.
        blocks: all blocks, from the first of the encoder on; each takes the tokens first.
        tokens: how they take them.
        grid: where rows and columns of tokens become known.
        positions: how the blocks know where a token is.
        span: the number of the block at which full resolution is back, from the encoder, its blocks
            and the number of the first block that runs on fewer tokens.
        window: rows and columns of the windows that are clustered each by itself; None for one grid
            an image.
        inside: whether somebody may read the output of any block; if not, that of a span's last
            block alone.
        image_size: height and width of the images that an encoder was made for; None for none.
        run: calls an encoder on images (B, 3, H, W) of any size that it takes.
        attention: of a block, the norm before its attention and the attention; None where there
            are none that could be told apart.
        matches: what else an encoder must be, for classes whose name tells too little.
    """

    name: str
    library: str
    classes: tuple[str, ...]
    blocks: Callable[[Any], Sequence[nn.Module]]
    tokens: TokenSequence | TokenMap
    grid: GridFromCall | GridFromShape
    positions: Positions = NoPositions()
    span: Callable[[Any, Sequence[nn.Module], int], int] = to_encoder_end
    window: Callable[[Any], Size | None] = lambda encoder: None
    inside: bool = True
    image_size: Callable[[Any], Size | None] = lambda encoder: None
    run: Callable[[Any, Tensor], Any] = lambda encoder, images: encoder(images)
    attention: Callable[[Any], Attention | None] = lambda block: None
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
    """Whether a class of the library with one of these names is among a module's classes.

    Args:
        module: any module.
        library: a top-level package; "" for any.
        names: of classes.
    """
    return any(
        kind.__name__ in names and library in ("", kind.__module__.partition(".")[0])
        for kind in type(module).__mro__
    )


def refuse_masks(*masks: Any) -> None:
    """Raises for an attention mask that has an effect: it has rows for tokens, not for clusters.

    Args:
        masks: added to the logits where they are floating point, else 0 where a token is not seen;
            of any shape. What is no tensor is no mask.

    Raises:
        ValueError: a mask with an effect, or one whose values are not known because it is traced.
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
    """Raises for cluster grids of encoders that know a window by the length of its side."""
    rows, columns = cells
    if rows != columns:
        raise ValueError(
            f"clusters must have as many rows as columns in the square windows of "
            f"{type(encoder).__name__}, got {rows}x{columns}"
        )

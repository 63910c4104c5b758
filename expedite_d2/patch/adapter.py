"""What `expedite` must know of a family of encoders, one adapter each."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from expedite_d2.hourglass import Reduction
from expedite_d2.patch.override import Override
from expedite_d2.patch.travel import travel_of


class BlockCall(NamedTuple):
    """One block of the low-resolution span, and what it is called with.

    Attributes:
        encoder: whose block it is.
        block: `owner` is the block, `original` its forward.
        x: clusters, as the block takes its tokens.
        grid: rows and columns of tokens.
        cells: those of clusters; the same for an image that was too small to be reduced.
        args: what the block was given beside its tokens.
        kwargs: the same by name.
    """

    encoder: Any
    block: Override
    x: Tensor
    grid: tuple[int, int]
    cells: tuple[int, int]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Adapter(Protocol):
    """How the blocks of a family of encoders are found, fed and read.

    An adapter has no state. `encoder` is always a module that it matches.
    """

    @property
    def family(self) -> str:
        """Library and class, as messages name it."""

    def matches(self, module: nn.Module) -> bool:
        """Whether a module is an encoder of this family, judged by the names of its classes."""

    def blocks(self, encoder: nn.Module) -> Sequence[nn.Module]:
        """All blocks, from the first of the encoder on; each takes the tokens first."""

    def stop(self, encoder: nn.Module, alpha: int) -> int:
        """The block at which the full resolution is back when block `alpha` starts the span."""

    def read(self, encoder: nn.Module) -> Collection[int] | None:
        """Blocks whose outputs somebody reads, beside the span's last; None: any may be read."""

    def window(self, encoder: nn.Module) -> tuple[int, int] | None:
        """Windows that are clustered each by itself; None for one grid an image."""

    def fixed_grid(self, encoder: nn.Module) -> tuple[int, int] | None:
        """Rows and columns of tokens of every image; None where images may differ in size."""

    def check(
        self, encoder: nn.Module, reduction: Reduction, outputs: Collection[int] | None
    ) -> None:
        """Raises ValueError for settings that this family alone does not take."""

    def overrides(self, encoder: nn.Module, span: range) -> list[Override]:
        """What else must change, beside the blocks, while the blocks in `span` run on clusters."""

    def grid(self, block: nn.Module, x: Tensor) -> tuple[int, int] | None:
        """Rows and columns of the tokens (H, W) that enter a block; None if they are not known."""

    def to_map(
        self, encoder: nn.Module, x: Tensor, grid: tuple[int, int]
    ) -> tuple[Tensor | None, Tensor]:
        """Tokens as a block takes them -> prefix tokens (B, P, C) or None, and map (B, H, W, C)."""

    def from_map(self, prefix: Tensor | None, tokens: Tensor) -> Tensor:
        """The inverse of `to_map`."""

    def run(self, call: BlockCall) -> Tensor:
        """Run one block on clusters."""


class SequenceAdapter:
    """Adapter parts for encoders whose blocks take one sequence: (B, P + H * W, C), P prefixes."""

    def stop(self, encoder: Any, alpha: int) -> int:
        return len(self.blocks(encoder))

    def blocks(self, encoder: Any) -> Sequence[nn.Module]:
        return list(encoder.blocks)

    def read(self, encoder: Any) -> Collection[int] | None:
        return None

    def window(self, encoder: Any) -> tuple[int, int] | None:
        return None

    def fixed_grid(self, encoder: Any) -> tuple[int, int] | None:
        return None

    def check(self, encoder: Any, reduction: Reduction, outputs: Collection[int] | None) -> None:
        """Any settings will do."""

    def prefixes(self, encoder: Any) -> int:
        """Class, distillation and register tokens before the others."""
        return 1

    def grid(self, block: nn.Module, x: Tensor) -> tuple[int, int] | None:
        travel = travel_of(x)
        return None if travel is None else travel.grid

    def to_map(
        self, encoder: Any, x: Tensor, grid: tuple[int, int]
    ) -> tuple[Tensor | None, Tensor]:
        count = self.prefixes(encoder)
        prefix = x[:, :count] if count else None
        return prefix, x[:, count:].unflatten(1, grid)

    def from_map(self, prefix: Tensor | None, tokens: Tensor) -> Tensor:
        tokens = tokens.flatten(1, 2)
        return tokens if prefix is None else torch.cat([prefix, tokens], dim=1)

    def run(self, call: BlockCall) -> Tensor:
        if call.cells != call.grid:
            refuse_masks(*call.args, call.kwargs.get("attn_mask"))
            call = without_masks(call)
        return call.block.original(call.x, *call.args, **call.kwargs)


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


def without_masks(call: BlockCall) -> BlockCall:
    """The same call without what is a tensor beside the tokens: masks that have no effect."""
    args = tuple(None if isinstance(value, Tensor) else value for value in call.args)
    kwargs = {
        name: None if isinstance(value, Tensor) else value for name, value in call.kwargs.items()
    }
    return call._replace(args=args, kwargs=kwargs)


def refuse_oblong(clusters: tuple[int, int], encoder: nn.Module) -> None:
    """Raises for cluster grids of encoders that know a window by the length of its side."""
    rows, columns = clusters
    if rows != columns:
        raise ValueError(
            f"clusters must have as many rows as columns in the square windows of "
            f"{type(encoder).__name__}, got {rows}x{columns}"
        )


def inherits(module: nn.Module, library: str, *names: str) -> bool:
    """Whether a class of the library with one of these names is among a module's classes."""
    return any(
        kind.__name__ in names and kind.__module__.partition(".")[0] == library
        for kind in type(module).__mro__
    )

"""Encoders in stages whose blocks attend within windows, some of them in shifted ones: Swin."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from expedite_d2.adapters.attention import bias_of_pairs
from expedite_d2.adapters.family import BlockCall, Family, Positions, Size, refuse_oblong
from expedite_d2.adapters.hourglass import Hourglass
from expedite_d2.adapters.override import Override
from expedite_d2.adapters.relative_position import read_table
from expedite_d2.adapters.tokens import GridFromCall, GridFromShape, TokenMap, TokenSequence
from expedite_d2.adapters.windows import relative_position_index, shift_mask
from expedite_d2.reducers import Reduction


class Windows(NamedTuple):
    """Windows of clusters in which one block attends.

    Attributes:
        sides: rows and columns of clusters in a window; in a video, frames before them.
        shifts: by how many the map is rolled along each; zeros for a block that does not shift.
    """

    sides: tuple[int, ...]
    shifts: tuple[int, ...]

    def of_frames(self, call: BlockCall, side: int, shift: int) -> Windows:
        """Returns the windows of a clip, whose frames attend to each other as before.

        Windows that are larger than the clip or map are as small as this, without padding.

        Args:
            call: of a block that takes (B, T, h, w, C).
            side: frames in a window.
            shift: by how many frames the block shifts its windows.
        """
        frames = call.x.shape[1]
        sides = (min(side, frames), *map(min, self.sides, call.cells))
        return Windows(sides, (shift if frames > side else 0, *self.shifts))

    def mask(self, cells: Sequence[int], x: Tensor) -> Tensor | None:
        """Returns what is added to the logits of the windows of one map.

        Args:
            cells: rows and columns of the map, before it is padded to whole windows.
            x: the clusters, for type and device.

        Returns:
            (windows, N, N); None without a shift.
        """
        if not any(self.shifts):
            return None
        padded = [length + -length % side for length, side in zip(cells, self.sides, strict=True)]
        return shift_mask(padded, self.sides, self.shifts, x.device).squeeze(1).to(x.dtype)


def table_at(attention: Any, cells: Sequence[int], lengths: Sequence[int] | None = None) -> Tensor:
    """Returns an attention's table of relative positions, read at the offsets between clusters.

    Args:
        attention: holds `window_size` and `relative_position_bias_table`, as official Swin's does.
        cells: clusters along each axis of a window.
        lengths: numbers of those that attend to each other; None for all.

    Returns:
        (offsets, heads).
    """
    window: Sequence[int] = attention.window_size
    table: Tensor = attention.relative_position_bias_table
    table = table.view(*(2 * side - 1 for side in window), table.shape[1])
    return read_table(table, window, cells, lengths).flatten(0, -2)


def table_bias(
    attention: Any, cells: Sequence[int], lengths: Sequence[int] | None = None
) -> Tensor:
    """Returns the bias of each head for each pair of clusters in a window: (heads, N, N).

    Arguments are those of `table_at`.
    """
    table = table_at(attention, cells, lengths)
    return bias_of_pairs(table, relative_position_index(lengths or cells, table.device))


def table_between(attention: Any, cells: Sequence[int]) -> dict[str, Any]:
    """Returns what official Swin's attention looks its biases up in, for windows of clusters.

    Args:
        attention: see `table_at`.
        cells: clusters along each axis of a window.

    Returns:
        Values of the attention's attributes by name.
    """
    table = table_at(attention, cells)
    return {
        "window_size": cells,
        "relative_position_bias_table": table,
        "relative_position_index": relative_position_index(cells, table.device),
    }


def with_table(attention: Override, cells: Sequence[int], *args: Any, **kwargs: Any) -> Any:
    """Runs an attention that looks up its biases as official Swin's does."""
    return attention.original_with(table_between(attention.owner, cells), *args, **kwargs)


def is_shifted(call: BlockCall, window: Size) -> Sequence[bool]:
    """Whether a block shifts its windows along rows and columns, wherever it runs."""
    block: Any = call.block.owner
    return (bool(block.shift_size),) * 2


def is_shifted_beyond(shifts: Sequence[int], call: BlockCall, window: Size) -> Sequence[bool]:
    """Whether a block shifts by some rows and columns: not along those that one window covers."""
    sizes = zip(shifts, call.state.grid, window, strict=True)
    return [shift > 0 and length > side for shift, length, side in sizes]


@dataclass(frozen=True)
class ShiftedWindows(Positions):
    """Windows of clusters instead of tokens, and the relative positions within them.

    A block that shifts its windows now does so by half of the new side, with the mask of the new
    windows; the attention is given its relative positions at the offsets between clusters.

    Attributes:
        stages: the stages of an encoder.
        attention: the module of a block that attends within windows.
        run_in: runs a block in windows of clusters, with `BlockCall.block.original_with`.
        attend: runs an attention in windows of clusters; from its override, rows and columns of
            clusters in a window, and the arguments of its call.
        blocks: the blocks of a stage.
        shifts: whether a block shifts its windows along rows and columns, from its call and the
            window of tokens.
        window: rows and columns of tokens in an attention's windows.
        square: whether windows have as many rows as columns.
        kind: see `Positions`.
    """

    stages: Callable[[Any], Sequence[Any]]
    attention: Callable[[Any], Any]
    run_in: Callable[[BlockCall, Windows], Any]
    attend: Callable[..., Any] = with_table
    blocks: Callable[[Any], Sequence[nn.Module]] = lambda stage: stage.blocks
    shifts: Callable[[BlockCall, Size], Sequence[bool]] = is_shifted
    window: Callable[[Any], Size] = lambda attention: attention.window_size
    square: bool = True
    kind: str = "relative, from tables"

    needs_grid = True

    def family(self, read: Callable[..., Size] | None = None, **values: Any) -> Family:
        """Returns the family of the encoders that have these windows.

        Args:
            read: rows and columns of a stage's map, from the encoder and the arguments of the
                stage, of which tokens (B, H * W, C) are the first; None for stages of maps
                (B, H, W, C).
            values: others of the family.
        """
        forms: dict[str, Any] = {"tokens": TokenMap(), "grid": GridFromShape()}
        if read is not None:
            forms["tokens"] = TokenSequence(lambda encoder: 0)
            forms["grid"] = GridFromCall(place=self._stage_call, read=read, onto_input=True)
        shared: dict[str, Any] = {
            "blocks": self._blocks,
            "positions": self,
            "span": self._to_stage_end,
            "window": self._window,
            "inside": False,
        }
        return Family(**{**forms, **shared, **values})

    def check(self, encoder: Any, reduction: Reduction) -> None:
        """Refuses oblong grids of clusters in square windows."""
        if self.square:
            window = self._window(encoder, reduction.alpha)
            refuse_oblong(reduction.cluster.cells(*window), encoder)

    def overrides(self, hourglass: Hourglass) -> list[Override]:
        """Changes the attentions."""
        blocks: Sequence[Any] = hourglass.family.blocks(hourglass.encoder)
        return [_Attention(self.attention(blocks[number]), hourglass) for number in hourglass.span]

    def run(self, call: BlockCall) -> Any:
        """Runs the block in windows of clusters."""
        window = self.window(self.attention(call.block.owner))
        sides = call.encoder.reduction.cluster.cells(*window)
        shifted = self.shifts(call, window)
        shifts = [side // 2 if moved else 0 for side, moved in zip(sides, shifted, strict=True)]
        return self.run_in(call, Windows(sides, tuple(shifts)))

    def _blocks(self, encoder: Any) -> list[Any]:
        return [block for stage in self.stages(encoder) for block in self.blocks(stage)]

    def _window(self, encoder: Any, first: int) -> Size:
        return self.window(self.attention(self._blocks(encoder)[first]))

    def _ends(self, encoder: Any) -> Iterator[int]:
        """Yields the number of the block after each stage."""
        return itertools.accumulate(len(self.blocks(stage)) for stage in self.stages(encoder))

    def _to_stage_end(self, encoder: Any, blocks: Sequence[nn.Module], first: int) -> int:
        """Ends the span with the stage in which it begins, before its norm and patch merging."""
        return next(end for end in self._ends(encoder) if end > first)

    def _stage_call(self, encoder: Any, span: range) -> tuple[nn.Module, str]:
        stage = list(self._ends(encoder)).index(span.stop)
        return self.stages(encoder)[stage], "forward"


class _Attention(Override):
    """Attends within windows of clusters, of which the settings tell the sides."""

    def __init__(self, owner: nn.Module, hourglass: Hourglass) -> None:
        super().__init__(owner, "forward")
        self.hourglass = hourglass

    def call(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        positions: Any = self.hourglass.family.positions
        cluster = self.hourglass.encoder.reduction.cluster
        cells = cluster.cells(*positions.window(self.owner))
        self.refuse_replaced()
        return positions.attend(self, cells, x, *args, **kwargs)

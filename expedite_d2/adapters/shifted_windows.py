"""Encoders in stages whose blocks attend within windows, some of them in shifted ones: Swin."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from expedite_d2.adapters.family import BlockCall, Family, NoPositions, Size, refuse_oblong
from expedite_d2.adapters.hourglass import Hourglass
from expedite_d2.adapters.override import Override
from expedite_d2.adapters.relative_position import read_table
from expedite_d2.adapters.tokens import GridFromCall, TokenSequence
from expedite_d2.adapters.windows import relative_position_index, shift_mask
from expedite_d2.reducers import Reduction


class Windows(NamedTuple):
    """Windows of clusters in which one block attends.

    Attributes:
        side: rows, and columns, of clusters in a window.
        shift: by how many the map is rolled; 0 for a block that does not shift its windows.
        mask: (windows, N, N), added to the logits of the windows of one map; None without a shift.
    """

    side: int
    shift: int
    mask: Tensor | None


def table_between(attention: Any, side: int) -> dict[str, Any]:
    """Returns an attention's table of relative positions at the offsets between clusters.

    Args:
        attention: holds `window_size`, `relative_position_bias_table` and
            `relative_position_index`, as official Swin's does.
        side: rows, and columns, of clusters in a window.

    Returns:
        Values of these attributes by name.
    """
    rows, columns = attention.window_size
    table: Tensor = attention.relative_position_bias_table
    table = read_table(table.view(2 * rows - 1, 2 * columns - 1, -1), (rows, columns), (side, side))
    return {
        "window_size": (side, side),
        "relative_position_bias_table": table.flatten(0, 1),
        "relative_position_index": relative_position_index((side, side), table.device),
    }


def is_shifted(call: BlockCall, window: Size) -> bool:
    """Whether a block shifts its windows, wherever it runs."""
    block: Any = call.block.owner
    return bool(block.shift_size)


@dataclass(frozen=True)
class ShiftedWindows(NoPositions):
    """Windows of clusters instead of tokens, and the relative positions within them.

    A block that shifts its windows now does so by half of the new side, with the mask of the new
    windows; the attention is given its relative positions at the offsets between clusters.

    Attributes:
        stages: the stages of an encoder; each has its `blocks`.
        attention: the module of a block that attends within windows (windows, N, C).
        run_in: runs a block in windows of clusters, with `BlockCall.block.original_with`.
        shifts: whether a block shifts its windows, from its call and the window of tokens.
        window: rows and columns of tokens in an attention's windows.
        between: those attributes of an attention, by name, that tell it relative positions, with
            values for windows of so many rows and columns of clusters.
    """

    stages: Callable[[Any], Sequence[Any]]
    attention: Callable[[Any], Any]
    run_in: Callable[[BlockCall, Windows], Any]
    shifts: Callable[[BlockCall, Size], bool] = is_shifted
    window: Callable[[Any], Size] = lambda attention: attention.window_size
    between: Callable[[Any, int], dict[str, Any]] = table_between

    needs_grid = True

    def family(self, read: Callable[..., Size], **values: Any) -> Family:
        """Returns the family of the encoders that have these windows.

        Args:
            read: rows and columns of a stage's map, from the encoder and the arguments of the
                stage, of which tokens (B, H * W, C) are the first.
            values: others of the family.
        """
        return Family(
            blocks=self._blocks,
            tokens=TokenSequence(lambda encoder: 0),
            grid=GridFromCall(place=self._stage_call, read=read, onto_input=True),
            positions=self,
            span=self._to_stage_end,
            window=self._window,
            inside=False,
            **values,
        )

    def check(self, encoder: Any, reduction: Reduction) -> None:
        """Refuses oblong grids of clusters."""
        window = self._window(encoder, reduction.alpha)
        refuse_oblong(reduction.cluster.cells(*window), encoder)

    def overrides(self, hourglass: Hourglass) -> list[Override]:
        """Changes the attentions."""
        blocks: Sequence[Any] = hourglass.family.blocks(hourglass.encoder)
        return [_Attention(self.attention(blocks[number]), hourglass) for number in hourglass.span]

    def run(self, call: BlockCall) -> Any:
        """Runs the block in windows of clusters."""
        rows, columns = call.cells
        window = self.window(self.attention(call.block.owner))
        side = call.encoder.reduction.cluster.cells(*window)[0]
        shift = side // 2 if self.shifts(call, window) else 0
        mask = None
        if shift:
            padded = (rows + -rows % side, columns + -columns % side)
            mask = shift_mask(padded, (side, side), (shift, shift), call.x.device).squeeze(1)
            mask = mask.to(call.x.dtype)
        return self.run_in(call, Windows(side, shift, mask))

    def _blocks(self, encoder: Any) -> list[Any]:
        return [block for stage in self.stages(encoder) for block in stage.blocks]

    def _window(self, encoder: Any, first: int) -> Size:
        return self.window(self.attention(self._blocks(encoder)[first]))

    def _ends(self, encoder: Any) -> Iterator[int]:
        """Yields the number of the block after each stage."""
        return itertools.accumulate(len(stage.blocks) for stage in self.stages(encoder))

    def _to_stage_end(self, encoder: Any, blocks: Sequence[nn.Module], first: int) -> int:
        """Ends the span with the stage in which it begins, before its norm and patch merging."""
        return next(end for end in self._ends(encoder) if end > first)

    def _stage_call(self, encoder: Any, span: range) -> tuple[nn.Module, str]:
        stage = list(self._ends(encoder)).index(span.stop)
        return self.stages(encoder)[stage], "forward"


class _Attention(Override):
    """Attends within windows of clusters; how many these hold is the length of its input."""

    def __init__(self, owner: nn.Module, hourglass: Hourglass) -> None:
        super().__init__(owner, "forward")
        self.hourglass = hourglass

    def call(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        positions: Any = self.hourglass.family.positions
        changes = positions.between(self.owner, math.isqrt(x.shape[1]))
        return self.original_with(changes, x, *args, **kwargs)

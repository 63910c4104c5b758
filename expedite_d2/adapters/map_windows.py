"""ViTs of maps, some of whose blocks attend within windows, the others among all tokens: ViTDet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from expedite_d2.adapters.family import BlockCall, Family, Positions, Size, refuse_oblong
from expedite_d2.adapters.tokens import GridFromShape, TokenMap
from expedite_d2.reducers import Reduction


class Spacing(NamedTuple):
    """Positions of the cells that attend to each other.

    Attributes:
        cells: rows and columns of these cells.
        tokens: rows and columns of the tokens beneath them.
        square: rows and columns of tokens that a whole grid of clusters covers.
        clusters: rows and columns of this grid.
    """

    cells: Size
    tokens: Size
    square: Size
    clusters: Size


@dataclass(frozen=True)
class MapWindows(Positions):
    """Windows of clusters instead of tokens; other blocks attend among the clusters of all windows.

    The blocks pad their maps to whole windows by themselves. Where all attend among all tokens, one
    grid of clusters is laid over each image.

    Attributes:
        blocks: all blocks of an encoder; each has a `window_size`, 0 for one that attends among all
            tokens.
    """

    blocks: Callable[[Any], Sequence[Any]]

    needs_grid = True

    def family(self, channels_first: bool = False, **values: Any) -> Family:
        """Returns the family of the encoders that have these windows.

        Args:
            channels_first: whether the blocks take (B, C, H, W) rather than (B, H, W, C).
            values: others of the family.
        """
        return Family(
            blocks=lambda encoder: list(self.blocks(encoder)),
            tokens=TokenMap(channels_first),
            grid=GridFromShape(channels_first),
            positions=self,
            window=lambda encoder, first: self.window(encoder),
            **values,
        )

    def window(self, encoder: Any) -> Size | None:
        """Returns rows and columns of an encoder's windows; None if it has none."""
        side = max(block.window_size for block in self.blocks(encoder))
        return (side, side) if side else None

    def check(self, encoder: Any, reduction: Reduction) -> None:
        """Refuses oblong grids of clusters in windows."""
        window = self.window(encoder)
        if window is not None:
            refuse_oblong(reduction.cluster.cells(*window), encoder)

    def run(self, call: BlockCall) -> Any:
        """Runs the block in windows of clusters, or on all of them."""
        owner: Any = call.block.owner
        window, grid = self.window(call.encoder), call.state.grid
        if window is None and not call.reduced:
            return call.block.original(call.x, *call.args, **call.kwargs)
        changes: dict[str, Any] = {}
        if window is None:
            spacing = Spacing(call.cells, grid, grid, call.cells)
        else:
            clusters = call.encoder.reduction.cluster.cells(*window)
            # Global blocks attend to the cells of all windows, at distances as within one.
            spacing = Spacing(call.cells, grid, window, clusters)
            if owner.window_size:
                spacing = Spacing(clusters, window, window, clusters)
                changes["window_size"] = clusters[0]
        changes |= self.between(call, spacing)
        return call.block.original_with(changes, call.x, *call.args, **call.kwargs)

    def between(self, call: BlockCall, spacing: Spacing) -> dict[str, Any]:
        """Returns those attributes of a block that tell it positions, with other values, by name.

        Args:
            call: the call of the block.
            spacing: the positions of the cells that attend to each other in it.
        """
        return {}

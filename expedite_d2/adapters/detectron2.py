"""Detectron2's ViT (ViTDet): windowed and global blocks, decomposed relative positions."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from expedite_d2.adapters.family import BlockCall, Family, NoPositions, refuse_oblong
from expedite_d2.adapters.hourglass import Hourglass
from expedite_d2.adapters.override import Override
from expedite_d2.adapters.registry import register_family
from expedite_d2.adapters.relative_position import read_offsets
from expedite_d2.adapters.tokens import GridFromShape, TokenMap
from expedite_d2.reducers import Reduction


class DecomposedPositions(NoPositions):
    """Tables of offsets along each axis, and windows of clusters instead of tokens."""

    needs_grid = True

    def check(self, encoder: Any, reduction: Reduction) -> None:
        """Refuses oblong grids of clusters in windows."""
        window = _window(encoder)
        if window is not None:
            refuse_oblong(reduction.cluster.cells(*window), encoder)

    def overrides(self, hourglass: Hourglass) -> list[Override]:
        """Changes the attentions, which can then be told the distances between clusters."""
        attentions = [hourglass.encoder.blocks[number].attn for number in hourglass.span]
        return [_Attention(attn, "forward") for attn in attentions if attn.use_rel_pos]

    def run(self, call: BlockCall) -> Tensor:
        """Runs the block in windows of clusters, or on all of them."""
        owner: Any = call.block.owner
        window, grid = _window(call.encoder), call.state.grid
        if window is None and not call.reduced:
            return call.block.original(call.x, *call.args, **call.kwargs)
        changes: dict[str, Any] = {}
        if window is None:
            spacing = _Spacing(grid, grid, call.cells)
        else:
            clusters = call.encoder.reduction.cluster.cells(*window)
            # Global blocks attend to the cells of all windows, at distances as within one.
            spacing = _Spacing(grid, window, clusters)
            if owner.window_size:
                spacing = _Spacing(window, window, clusters)
                changes["window_size"] = clusters[0]
        if owner.attn.use_rel_pos:
            changes["attn"] = partial(owner.attn, spacing=spacing)
        return call.block.original_with(changes, call.x, *call.args, **call.kwargs)


class _Spacing(NamedTuple):
    """Positions of the cells that attend to each other.

    Attributes:
        tokens: rows and columns of the tokens beneath them.
        square: rows and columns of tokens that a whole grid of clusters covers.
        clusters: rows and columns of this grid.
    """

    tokens: tuple[int, int]
    square: tuple[int, int]
    clusters: tuple[int, int]

    def read(self, table: Tensor, axis: int, cells: int) -> Tensor:
        """Reads the table of one axis, with a row for each offset, at the offsets between cells.

        Args:
            table: (L, C / heads); learnt for another size, it is resized first, as Detectron2
                does.
            axis: 0 for rows, 1 for columns.
            cells: number of cells along this axis.

        Returns:
            (2 * cells - 1, C / heads).
        """
        offsets = 2 * self.tokens[axis] - 1
        if len(table) != offsets:
            table = F.interpolate(table.t()[None], size=offsets, mode="linear")[0].t()
        return read_offsets(table, self.square[axis], self.clusters[axis], cells)


class _Attention(Override):
    """Reads relative positions at the offsets between clusters, if it is given their spacing."""

    def call(self, x: Tensor, spacing: _Spacing | None = None) -> Tensor:
        if spacing is None:
            return self.original(x)
        owner: Any = self.owner
        rows, columns = x.shape[1:3]
        changes = {
            "rel_pos_h": spacing.read(owner.rel_pos_h, 0, rows),
            "rel_pos_w": spacing.read(owner.rel_pos_w, 1, columns),
        }
        return self.original_with(changes, x)


def _window(encoder: Any) -> tuple[int, int] | None:
    side = max(block.window_size for block in encoder.blocks)
    return (side, side) if side else None


VIT = register_family(
    Family(
        name="Detectron2 ViT",
        library="detectron2",
        classes=("ViT",),
        blocks=lambda encoder: list(encoder.blocks),
        # Its blocks take maps and pad them to whole windows by themselves.
        tokens=TokenMap(),
        grid=GridFromShape(),
        positions=DecomposedPositions(),
        window=lambda encoder, first: _window(encoder),
        inside=False,
        attention=lambda block: (block.norm1, block.attn),
    )
)

"""Detectron2's ViT (ViTDet): windowed and global blocks, decomposed relative positions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from expedite_d2.hourglass import Reduction
from expedite_d2.patch.adapter import BlockCall, inherits, refuse_oblong
from expedite_d2.patch.override import Override
from expedite_d2.patch.relative_position import read_offsets


class Detectron2ViT:
    """Its blocks take maps, (B, H, W, C), and pad them to whole windows by themselves."""

    family = "Detectron2 ViT"

    def matches(self, module: nn.Module) -> bool:
        return inherits(module, "detectron2", "ViT")

    def blocks(self, encoder: Any) -> Sequence[nn.Module]:
        return list(encoder.blocks)

    def stop(self, encoder: Any, alpha: int) -> int:
        return len(encoder.blocks)

    def read(self, encoder: Any) -> Collection[int] | None:
        return ()

    def window(self, encoder: Any) -> tuple[int, int] | None:
        side = max(block.window_size for block in encoder.blocks)
        return (side, side) if side else None

    def fixed_grid(self, encoder: Any) -> tuple[int, int] | None:
        return None

    def check(self, encoder: Any, reduction: Reduction, outputs: Collection[int] | None) -> None:
        window = self.window(encoder)
        if window is not None:
            refuse_oblong(reduction.grid(*window), encoder)

    def overrides(self, encoder: Any, span: range) -> list[Override]:
        attentions = [encoder.blocks[number].attn for number in span]
        return [_Attention(attn, "forward") for attn in attentions if attn.use_rel_pos]

    def grid(self, block: nn.Module, x: Tensor) -> tuple[int, int] | None:
        return x.shape[1], x.shape[2]

    def to_map(
        self, encoder: Any, x: Tensor, grid: tuple[int, int]
    ) -> tuple[Tensor | None, Tensor]:
        return None, x

    def from_map(self, prefix: Tensor | None, tokens: Tensor) -> Tensor:
        return tokens

    def run(self, call: BlockCall) -> Tensor:
        owner: Any = call.block.owner
        window = self.window(call.encoder)
        if window is None and call.cells == call.grid:
            return call.block.original(call.x, *call.args, **call.kwargs)
        changes: dict[str, Any] = {}
        if window is None:
            spacing = _Spacing(call.grid, call.grid, call.cells)
        else:
            clusters = call.encoder.reduction.grid(*window)
            # Global blocks see the cells of all windows, as far apart as those of one.
            spacing = _Spacing(call.grid, window, clusters)
            if owner.window_size:
                spacing = _Spacing(window, window, clusters)
                changes["window_size"] = clusters[0]
        if owner.attn.use_rel_pos:
            changes["attn"] = partial(owner.attn, spacing=spacing)
        return call.block.original_seeing(changes, call.x, *call.args, **call.kwargs)


class _Spacing(NamedTuple):
    """Where the cells that attend to each other lie.

    Attributes:
        tokens: rows and columns of the tokens beneath them.
        square: rows and columns of tokens that a full grid of clusters is laid over.
        clusters: rows and columns of this grid.
    """

    tokens: tuple[int, int]
    square: tuple[int, int]
    clusters: tuple[int, int]

    def read(self, table: Tensor, axis: int, cells: int) -> Tensor:
        """Read the table of one axis, of a row for each offset, at the offsets between cells.

        Args:
            table: (L, C / heads); where it was learnt for another size it is stretched first, as
                Detectron2 does.
            axis: 0 for rows, 1 for columns.
            cells: how many there are along it.

        Returns:
            (2 * cells - 1, C / heads).
        """
        offsets = 2 * self.tokens[axis] - 1
        if len(table) != offsets:
            table = F.interpolate(table.t()[None], size=offsets, mode="linear")[0].t()
        return read_offsets(table, self.square[axis], self.clusters[axis], cells)


class _Attention(Override):
    """Reads its relative positions at the offsets between clusters, where it is told of them."""

    def __call__(self, x: Tensor, spacing: _Spacing | None = None) -> Tensor:
        if spacing is None:
            return self.original(x)
        owner: Any = self.owner
        rows, columns = x.shape[1:3]
        changes = {
            "rel_pos_h": spacing.read(owner.rel_pos_h, 0, rows),
            "rel_pos_w": spacing.read(owner.rel_pos_w, 1, columns),
        }
        return self.original_seeing(changes, x)

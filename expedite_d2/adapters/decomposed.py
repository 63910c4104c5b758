"""Relative positions that are a sum over both axes, from a learnt table for each: ViTDet, SAM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expedite_d2.adapters.family import BlockCall
from expedite_d2.adapters.hourglass import Hourglass
from expedite_d2.adapters.map_windows import MapWindows, Spacing
from expedite_d2.adapters.override import Override
from expedite_d2.adapters.relative_position import read_offsets

#: A table of the offsets between rows, and one for columns, (2 * length - 1, C / heads) each.
Tables = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class DecomposedPositions(MapWindows):
    """Tables of offsets along each axis, which are read at the offsets between clusters.

    Attributes:
        attention: name of a block's attention, which takes maps (B, H, W, C) and holds its tables
            as `rel_pos_h` and `rel_pos_w`, if it has any.
        returns: for a library that knows no other attention than one that writes out its matrix:
            what the attention returns, from the map that it gives. A fused kernel then takes its
            place on clusters, see `attend`. None for an attention that runs as it is.
    """

    attention: str = "attn"
    returns: Callable[[Tensor], Any] | None = None

    kind = "relative, from a table for each axis"

    def overrides(self, hourglass: Hourglass) -> list[Override]:
        """Changes the attentions, which can then be told the distances between clusters."""
        blocks = self.blocks(hourglass.encoder)
        attentions = [getattr(blocks[number], self.attention) for number in hourglass.span]
        return [
            _Attention(attention, "forward") for attention in attentions if self._told(attention)
        ]

    def between(self, call: BlockCall, spacing: Spacing) -> dict[str, Any]:
        """The attention, told the distances between clusters."""
        attention = getattr(call.block.owner, self.attention)
        if not self._told(attention):
            return {}
        return {self.attention: partial(attention, spacing=spacing, returns=self.returns)}

    def _told(self, attention: nn.Module) -> bool:
        return self.returns is not None or hasattr(attention, "rel_pos_h")


def attend(attention: Any, x: Tensor, tables: Tables | None) -> Tensor:
    """Computes what an attention does with a fused kernel, which is given the positions as a mask.

    Args:
        attention: its projections `qkv` and `proj`, its `num_heads` and its `scale` are used.
        x: maps (B, H, W, C).
        tables: its positions between their places; None without.

    Returns:
        (B, H, W, C).
    """
    batch, rows, columns, _ = x.shape
    qkv = attention.qkv(x).view(batch, rows * columns, 3, attention.num_heads, -1)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()  # (B, heads, H * W, C / heads)
    mask = None
    if tables is not None:
        maps = query.unflatten(2, (rows, columns))
        by_row = torch.einsum("bnhwc,hkc->bnhwk", maps, _pairs(tables[0], rows))
        by_column = torch.einsum("bnhwc,wkc->bnhwk", maps, _pairs(tables[1], columns))
        mask = by_row[..., :, None] + by_column[..., None, :]
        mask = mask.flatten(4).flatten(2, 3)  # (B, heads, H * W, H * W)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=attention.scale)
    return attention.proj(out.transpose(1, 2).reshape(batch, rows, columns, -1))


def _pairs(table: Tensor, length: int) -> Tensor:
    """Returns the row of a table for each pair of places: (length, length, C / heads)."""
    place = torch.arange(length, device=table.device)
    return table[place[:, None] - place + length - 1]


class _Attention(Override):
    """Reads relative positions at the offsets between clusters, if it is given their spacing."""

    def call(
        self,
        *args: Any,
        spacing: Spacing | None = None,
        returns: Callable[[Tensor], Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        if spacing is None:
            return self.original(*args, **kwargs)
        owner: Any = self.owner
        tables = None
        if hasattr(owner, "rel_pos_h"):
            tables = _read(owner.rel_pos_h, spacing, 0), _read(owner.rel_pos_w, spacing, 1)
        if returns is not None and self._is_as_known() and not kwargs.get("output_attentions"):
            return returns(attend(owner, args[0], tables))
        changes = {} if tables is None else {"rel_pos_h": tables[0], "rel_pos_w": tables[1]}
        return self.original_with(changes, *args, **kwargs)

    def _is_as_known(self) -> bool:
        """Whether the attention consists of what `attend` computes; copies may hold more."""
        parts = [name for name, _ in self.owner.named_children()]
        return self.previous is None and sorted(parts) == ["proj", "qkv"]


def _read(table: Tensor, spacing: Spacing, axis: int) -> Tensor:
    """Reads the table of one axis, with a row for each offset, at the offsets between cells.

    Args:
        table: (L, C / heads); learnt for another size, it is resized first, as the libraries do.
        spacing: the positions of the cells.
        axis: 0 for rows, 1 for columns.

    Returns:
        (2 * cells - 1, C / heads).
    """
    offsets = 2 * spacing.tokens[axis] - 1
    if len(table) != offsets:
        table = F.interpolate(table.t()[None], size=offsets, mode="linear")[0].t()
    return read_offsets(table, spacing.square[axis], spacing.clusters[axis], spacing.cells[axis])

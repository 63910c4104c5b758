"""Attention of windowed ViTs of maps in slow loops over pairs of cells and over windows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def slow_positions(table: Tensor, tokens: int, cells: int, step: float) -> Tensor:
    """(cells, cells, C): the table between each pair of cells, `step` tokens apart."""
    if len(table) != 2 * tokens - 1:
        table = F.interpolate(table.t()[None], size=2 * tokens - 1, mode="linear")[0].t()
    out = table.new_empty(cells, cells, table.shape[1])
    for i, j in itertools.product(range(cells), repeat=2):
        place = min(max((i - j) * step + tokens - 1, 0), 2 * tokens - 2)
        below = math.floor(place)
        above = min(below + 1, 2 * tokens - 2)
        out[i, j] = table[below] + (place - below) * (table[above] - table[below])
    return out


def slow_attention(
    attn: Any, heads: int, x: Tensor, tokens: tuple[int, int], steps: tuple[float, float]
) -> Tensor:
    """Attention among all cells of (B, rows, columns, C)."""
    batch, rows, columns, channels = x.shape
    depth = channels // heads
    places = list(itertools.product(range(rows), range(columns)))
    query, key, value = attn.qkv(x).flatten(1, 2).split(channels, dim=2)
    by_row = slow_positions(attn.rel_pos_h, tokens[0], rows, steps[0])
    by_column = slow_positions(attn.rel_pos_w, tokens[1], columns, steps[1])
    outputs = []
    for head in range(heads):
        part = slice(head * depth, (head + 1) * depth)
        q, k, v = query[..., part], key[..., part], value[..., part]
        logits = x.new_empty(batch, len(places), len(places))
        for p, (y, x_) in enumerate(places):
            for n, (v_, u) in enumerate(places):
                position = by_row[y, v_] + by_column[x_, u]
                logits[:, p, n] = (q[:, p] * (attn.scale * k[:, n] + position)).sum(1)
        outputs.append(logits.softmax(-1) @ v)
    return attn.proj(torch.cat(outputs, -1)).view(x.shape)


def in_windows(attend: Callable[[Tensor], Tensor], x: Tensor, side: int) -> Tensor:
    """What attention gives in each window of so many cells; the map is padded to whole ones."""
    rows, columns = x.shape[1:3]
    padded = F.pad(x, (0, 0, 0, -columns % side, 0, -rows % side))
    out = torch.empty_like(padded)
    for top, left in itertools.product(range(0, rows, side), range(0, columns, side)):
        window = (slice(None), slice(top, top + side), slice(left, left + side))
        out[window] = attend(padded[window])
    return out[:, :rows, :columns]

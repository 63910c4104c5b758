"""Reads learnt biases of relative positions at the offsets between clusters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expedite_d2.adapters.attention import bias_of_pairs
from expedite_d2.adapters.windows import relative_position_index

# SwinV2's continuous bias is between 0 and this.
MAX_BIAS = 16.0


def read_offsets(table: Tensor, tokens: int, cells: int, length: int | None = None) -> Tensor:
    """Reads a table of the offsets between tokens at the offsets between cells laid over them.

    Neighbouring cells are tokens / cells apart, so that an offset of d cells is d * tokens / cells
    tokens; between two entries of the table it is interpolated linearly.

    Args:
        table: (2T - 1, ...), for offsets from 1 - T to T - 1; T is usually `tokens`.
        tokens: number of tokens per side.
        cells: number of cells laid over these.
        length: number of cells per side of a map that consists of several such squares; None for
            `cells`.

    Returns:
        (2 * length - 1, ...).
    """
    length = cells if length is None else length
    middle = len(table) // 2  # the row of offset 0
    if tokens == cells and length == middle + 1:
        return table
    offset = torch.arange(1 - length, length, device=table.device) * tokens
    lower = torch.div(offset, cells, rounding_mode="floor")
    wide = torch.promote_types(table.dtype, torch.float32)
    fraction = (offset - lower * cells).to(wide) / cells
    lower = lower + middle
    # With fewer tokens than cells, or if the last square is not full, the largest offsets lie
    # beyond the table.
    before = table[lower.clamp(0, 2 * middle)]
    after = table[(lower + 1).clamp(0, 2 * middle)]
    return torch.lerp(before, after, fraction.to(table.dtype).view(-1, *[1] * (table.dim() - 1)))


def read_table(
    table: Tensor,
    tokens: Sequence[int],
    cells: Sequence[int],
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """Reads a table of offsets along several axes as `read_offsets` does, along each of them.

    Args:
        table: (2H - 1, 2W - 1, ...), or with frames before the rows.
        tokens: numbers of tokens along the axes, (H, W).
        cells: numbers of cells laid over them, (h, w).
        lengths: numbers of cells that attend to each other; None for `cells`.

    Returns:
        (2h - 1, 2w - 1, ...), or with `lengths` in place of these.
    """
    sides = zip(tokens, cells, lengths or cells, strict=True)
    for axis, (side, count, length) in enumerate(sides):
        table = read_offsets(table.transpose(0, axis), side, count, length).transpose(0, axis)
    return table


def log_spaced(
    tokens: Sequence[int], cells: Sequence[int], pretrained: Sequence[int], like: Tensor
) -> Tensor:
    """Returns SwinV2's coordinates of the offsets between cells laid over a window of tokens.

    Args:
        tokens: rows and columns of tokens in a window.
        cells: rows and columns of cells laid over them, (h, w).
        pretrained: rows and columns of the windows of pre-training; zeros for `tokens`.
        like: has type and device of the coordinates.

    Returns:
        ((2h - 1)(2w - 1), 2): an offset of d tokens is log8(1 + 8 |d| / (M - 1)), signed, M being
        the side of the windows of pre-training.
    """
    coordinates = []
    trained = pretrained if all(pretrained) else tokens
    for side, count, length in zip(tokens, cells, trained, strict=True):
        offset = torch.arange(1 - count, count, device=like.device) * (side / count)
        scaled = 8 * offset / max(length - 1, 1)
        coordinates.append(scaled.sign() * (1 + scaled.abs()).log2() / 3)
    return torch.cartesian_prod(*coordinates).to(like.dtype)


def continuous_bias(
    network: nn.Sequential, tokens: Sequence[int], cells: Sequence[int], pretrained: Sequence[int]
) -> Tensor:
    """Returns SwinV2's bias of each head for each pair of cells laid over a window of tokens.

    Args:
        network: computes a number for each head from coordinates.
        tokens, cells, pretrained: see `log_spaced`.

    Returns:
        (heads, h * w, h * w).
    """
    first: Any = network[0]
    weight: Tensor = first.weight
    table = MAX_BIAS * network(log_spaced(tokens, cells, pretrained, weight)).sigmoid()
    return bias_of_pairs(table, relative_position_index(cells, weight.device))


def relative_bias(
    table: Tensor, extra: Tensor, grid: tuple[int, int], cells: tuple[int, int]
) -> Tensor:
    """Returns BEiT's bias for each pair of positions on a grid of clusters, class token first.

    Args:
        table: (2M_h - 1, 2M_w - 1, heads), for the M_h x M_w tokens of pre-training.
        extra: (3, heads): from the class token to a token, from a token to it, from it to itself.
        grid: rows and columns of the image's tokens, (H, W). If they are not (M_h, M_w), the table
            is resized first, bilinearly, as transformers does.
        cells: rows and columns of the clusters, (h, w); for a bias between tokens, those of the
            tokens.

    Returns:
        (heads, 1 + h * w, 1 + h * w).
    """
    sides = (2 * grid[0] - 1, 2 * grid[1] - 1)
    if tuple(table.shape[:2]) != sides:
        resized = F.interpolate(table.permute(2, 0, 1)[None], size=sides, mode="bilinear")
        table = resized[0].permute(1, 2, 0)
    table = read_table(table, grid, cells)
    entries = torch.cat([table.flatten(0, 1), extra])  # (offsets + 3, heads)
    return bias_of_pairs(entries, _index(cells, table.device))


def _index(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Returns the row of the flat table, extras last, per pair: (1 + h * w, 1 + h * w)."""
    offsets = (2 * grid[0] - 1) * (2 * grid[1] - 1)
    index = F.pad(relative_position_index(grid, device), (1, 0, 1, 0), value=offsets + 1)
    index[0, :] = offsets
    index[0, 0] = offsets + 2
    return index

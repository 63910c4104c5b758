"""Windows of tokens that attend to each other: relative positions, and masks of shifted windows."""

from __future__ import annotations

import torch
from torch import Tensor

# Added to the logits of pairs in a shifted window that are not neighbours in the image. Official
# Swin adds -100, whose exponential is a denormal number: that does not change the result, but a
# product with it takes a CPU many times as long.
MASKED = float("-inf")


def relative_position_index(window: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Returns the row of a (2h-1)(2w-1) table of offsets per pair of positions: (h*w, h*w)."""
    h, w = window
    rows = torch.arange(h, device=device).repeat_interleave(w)
    columns = torch.arange(w, device=device).repeat(h)
    row_offset = rows[:, None] - rows[None, :] + h - 1
    column_offset = columns[:, None] - columns[None, :] + w - 1
    return row_offset * (2 * w - 1) + column_offset


def shift_mask(
    grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], device: torch.device
) -> Tensor:
    """Returns the mask that keeps tokens of a rolled map from attending across its seam.

    Args:
        grid: rows and columns of the map, already multiples of the window.
        window: rows and columns of a window.
        shift: rows and columns by which the map was rolled.
        device: device of the mask.

    Returns:
        (windows, 1, N, N) float32: 0 within a region of the image, `MASKED` between two.
    """
    sides = []
    for length, side, offset in zip(grid, window, shift, strict=True):
        position = torch.arange(length, device=device)
        region = (position >= length - side).long() + (position >= length - offset).long()
        sides.append(region.view(-1, side))  # (windows of this side, M)
    rows, columns = sides
    region = rows[:, None, :, None] * 3 + columns[None, :, None, :]
    region = region.reshape(-1, 1, window[0] * window[1])  # (windows, 1, N)
    differs = region[..., :, None] != region[..., None, :]  # (windows, 1, N, N)
    return torch.zeros(differs.shape, device=device).masked_fill_(differs, MASKED)

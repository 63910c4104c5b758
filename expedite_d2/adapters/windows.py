"""Windows of tokens that attend to each other: relative positions, and masks of shifted windows.

A map has rows and columns of tokens or, in a video, frames before them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Added to the logits of pairs in a shifted window that are not neighbours in the image. Official
# Swin adds -100, whose exponential is a denormal number: that does not change the result, but a
# product with it takes a CPU many times as long.
MASKED = float("-inf")


def relative_position_index(window: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Returns the row of a table of offsets for each pair of positions in a window.

    Args:
        window: tokens along each axis, (h, w) or (t, h, w); N is their product.
        device: device of the result.

    Returns:
        (N, N), for a table of (2h - 1)(2w - 1) rows, or 2t - 1 times as many.
    """
    places = torch.cartesian_prod(*(torch.arange(side, device=device) for side in window))
    index = torch.zeros((), dtype=torch.long, device=device)
    for place, side in zip(places.unbind(1), window, strict=True):
        index = index * (2 * side - 1) + place[:, None] - place + side - 1
    return index


def shift_mask(
    grid: Sequence[int], window: Sequence[int], shift: Sequence[int], device: torch.device
) -> Tensor:
    """Returns the mask that keeps tokens of a rolled map from attending across its seam.

    Args:
        grid: tokens of the map along each axis, already multiples of the window.
        window: those of a window.
        shift: by how many the map was rolled along each axis.
        device: device of the mask.

    Returns:
        (windows, 1, N, N) float32: 0 within a region of the image, `MASKED` between two.
    """
    region = torch.zeros((), dtype=torch.long, device=device)
    for length, side, offset in zip(grid, window, shift, strict=True):
        position = torch.arange(length, device=device)
        part = (position >= length - side).long() + (position >= length - offset).long()
        region = region[..., None] * 3 + part
    region = partition(region[None, ..., None], window).transpose(1, 2)  # (windows, 1, N)
    differs = region[..., :, None] != region[..., None, :]  # (windows, 1, N, N)
    return torch.zeros(differs.shape, device=device).masked_fill_(differs, MASKED)


def partition(maps: Tensor, window: Sequence[int]) -> Tensor:
    """Cuts maps (B, H, W, C) or (B, T, H, W, C), multiples of a window: (B * windows, N, C)."""
    axes = len(window)
    for axis in reversed(range(axes)):
        maps = maps.unflatten(axis + 1, (-1, window[axis]))
    maps = maps.permute(0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1)
    return maps.flatten(axes + 1, 2 * axes).flatten(0, axes)


def unpartition(windows: Tensor, window: Sequence[int], grid: Sequence[int]) -> Tensor:
    """The inverse of `partition`; `grid` has the tokens of a map along each axis."""
    axes = len(window)
    counts = (length // side for length, side in zip(grid, window, strict=True))
    maps = windows.reshape(-1, *counts, *window, windows.shape[-1])
    order = [
        axis
        for pair in zip(range(1, axes + 1), range(axes + 1, 2 * axes + 1), strict=True)
        for axis in pair
    ]
    return maps.permute(0, *order, 2 * axes + 1).reshape(-1, *grid, windows.shape[-1])


def in_windows(
    maps: Tensor,
    window: Sequence[int],
    shift: Sequence[int],
    run: Callable[[Tensor, Tensor | None], Tensor],
) -> Tensor:
    """Runs what works within windows on maps, padded and then rolled as official Swin's are.

    Args:
        maps: (B, H, W, C) or (B, T, H, W, C).
        window: tokens of a window along each axis.
        shift: by how many the map is rolled along each axis.
        run: from (B * windows, N, C) to the same shape, with a mask (windows, N, N) to be added to
            the logits of the windows of one map; None without a shift.

    Returns:
        As `maps`.
    """
    sizes, axes = maps.shape[1:-1], list(range(1, maps.dim() - 1))
    behind = [-size % side for size, side in zip(sizes, window, strict=True)]
    padded = F.pad(maps, (0, 0, *(by for after in reversed(behind) for by in (0, after))))
    grid, mask = padded.shape[1:-1], None
    if any(shift):
        padded = padded.roll([-by for by in shift], axes)
        mask = shift_mask(grid, window, shift, maps.device).squeeze(1).to(maps.dtype)
    out = unpartition(run(partition(padded, window), mask), window, grid)
    if any(shift):
        out = out.roll(list(shift), axes)
    for axis, size in zip(axes, sizes, strict=True):
        out = out.narrow(axis, 0, size)
    return out

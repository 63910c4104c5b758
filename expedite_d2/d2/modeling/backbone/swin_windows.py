"""Layout of the tokens of a map in windows, and attention within these.

Padding a map to whole windows, rolling it and cutting it into windows is one gather, and so is the
inverse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from expedite_d2.adapters.windows import shift_mask

# Where windows hold more places than this for each token, the rest being padding, tokens are
# projected before they are laid out; else after that, when there are fewer channels to move.
MUCH_PADDING = 1.1


class Layout(NamedTuple):
    """Windows of all maps of a batch, one after the other; those with a seam come last.

    At a seam, tokens that are not neighbours in the image are neighbours in the rolled map. Seams
    are in the windows of its last row and column.

    Attributes:
        order: (B * H' * W',), for each place in the windows the number of its token in the maps;
            B * H * W for padding.
        inverse: (B * H * W,), the place of each token.
        mask: (windows with a seam, 1, N, N), added to the logits of these windows; None if the maps
            are not rolled.
    """

    order: Tensor
    inverse: Tensor
    mask: Tensor | None


def window_layout(x: Tensor, size: tuple[int, int], shift: tuple[int, int]) -> Layout:
    """Lays windows of ``size`` over maps (B, H, W, C), padded at the end, rolled by ``shift``."""
    batch, height, width = x.shape[:3]
    down, across = -(-height // size[0]), -(-width // size[1])
    count = batch * height * width
    tokens = torch.arange(count, device=x.device)
    maps = tokens.view(batch, height, width)
    bottom, right = -height % size[0], -width % size[1]
    if bottom or right:
        # As in official Swin, padding follows the norm (v1), precedes the roll, and is not masked.
        maps = F.pad(maps, (0, right, 0, bottom), value=count)
    rolled = maps.roll((-shift[0], -shift[1]), (1, 2)) if any(shift) else maps
    windows = rolled.view(batch, down, size[0], across, size[1]).transpose(2, 3)
    mask = None
    if any(shift):
        # A map of two by two windows has every kind of seam.
        kinds = shift_mask((2 * size[0], 2 * size[1]), size, shift, x.device).unbind(0)
        bodies = (windows[:, :-1], windows[:, -1:])
        parts = [part for body in bodies for part in (body[:, :, :-1], body[:, :, -1:])]
        order = torch.cat([part.reshape(-1) for part in parts])
        counts = [batch * part.shape[1] * part.shape[2] for part in parts]
        seams = zip(kinds[1:], counts[1:], strict=True)
        mask = torch.cat([kind.expand(count, 1, -1, -1) for kind, count in seams])
    else:
        order = windows.reshape(-1)
    places = torch.arange(len(order), device=x.device)
    inverse = order.new_empty(count + 1).scatter(0, order, places)[:count]
    return Layout(order, inverse, mask)


class Windows(NamedTuple):
    """Windows in which the blocks of a stage attend.

    Attributes:
        size: rows and columns of a window, (M_h, M_w), N = M_h * M_w.
        layout: layout for blocks that do not roll the map.
        shifted: layout for blocks that do.
        positions: (N, N), row of the position bias table for each pair of positions in a window.
        source: that from which the attention computes its bias for the offsets between clusters, as
            its `position_source` returns it: a matrix that resamples the learnt table in version 1,
            coordinates in version 2. None for the offsets between tokens.
    """

    size: tuple[int, int]
    layout: Layout
    shifted: Layout
    positions: Tensor
    source: Tensor | None = None

    @classmethod
    def of_map(
        cls,
        x: Tensor,
        size: tuple[int, int],
        positions: Tensor,
        source: Tensor | None = None,
    ) -> Windows:
        """Lays windows over a map (B, H, W, C) of tokens or clusters; other arguments as above."""
        shift = (size[0] // 2, size[1] // 2)
        plain, shifted = (window_layout(x, size, by) for by in ((0, 0), shift))
        return cls(size, plain, shifted, positions, source)


def project_into_windows(
    x: Tensor, windows: Windows, layout: Layout, project: Callable[[Tensor], Tensor]
) -> Tensor:
    """Projects the tokens of maps, and lays them out in windows.

    Args:
        x: (B, H * W, C).
        windows: their geometry.
        layout: one of their two layouts.
        project: (..., C) -> (..., D), of each token by itself; zeros stand for padding.

    Returns:
        (windows, N, D).
    """
    x = x.flatten(0, 1)
    places, count = len(layout.order), len(x)
    if places > count:
        x = F.pad(x, (0, 0, 0, 1))  # the zeros that stand for padding
    if places > MUCH_PADDING * count:
        tokens = project(x).index_select(0, layout.order)
    else:
        tokens = project(x.index_select(0, layout.order))
    return tokens.view(-1, windows.size[0] * windows.size[1], tokens.shape[1])


def out_of_windows(x: Tensor, layout: Layout, shape: torch.Size) -> Tensor:
    """Returns the tokens of windows (windows, N, C) in the order of the maps, (B, H * W, C)."""
    return x.flatten(0, 1).index_select(0, layout.inverse).view(shape)

"""Rotary positions: a table of (cos, sin) that each block is passed, made for reduced tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expedite_d2.adapters.family import BlockCall, Positions, Size, refuse_masks
from expedite_d2.ops.token_pool import token_pool
from expedite_d2.reducers import Points, State
from expedite_d2.reducers.merge import means_of_members

#: One of (cos, sin) in either order, (..., N, d); or both side by side in one, (..., N, 2 d).
Rotations = tuple[Tensor, Tensor] | Tensor


@dataclass(frozen=True)
class Rotary(Positions):
    """Positions that rotate queries and keys, by a table that the encoder passes to each block.

    The table of the reduced tokens is made of that of the image's tokens, as it arrives: so it has
    what the model says, whatever its coordinates are scaled by, and whatever it has drawn at random
    for this pass. A cluster is rotated as a token at the centre of its cell. A merged token has the
    mean of the (cos, sin) of the image's tokens that it stands for, with which its logits are the
    means of theirs; a group has the unweighted mean of its tokens'.

    The table of one layout serves all blocks that are passed the same table: it accompanies the
    tokens from block to block, as their state.

    Attributes:
        argument: name of the block's argument for the table: (cos, sin) in either order, or both
            side by side; one row for each of the image's tokens, none for prefix tokens.
        kind: see `Positions`.
    """

    argument: str
    kind: str = "rotary"

    def prepare(self, call: BlockCall) -> BlockCall:
        """Returns the call with the table of its reduced tokens."""
        table = call.kwargs.get(self.argument)
        if table is None or not call.reduced:
            return call
        given, reduced = call.state.positions or (None, None)
        if given is not _first(table):
            reduced = reduced_rotations(table, call.state, call.x.shape[0])
        return call._replace(
            state=call.state._replace(positions=(_first(table), reduced)),
            kwargs={**call.kwargs, self.argument: reduced},
        )

    def run(self, call: BlockCall) -> Any:
        """Runs the block with the table."""
        table = call.kwargs.get(self.argument)
        if table is None or not call.reduced:
            return super().run(call)
        others = {k: v for k, v in call.kwargs.items() if k != self.argument}
        refuse_masks(*call.args, *others.values())
        call = call._replace(kwargs=others).without_masks()
        return call.block.original(call.x, *call.args, **call.kwargs, **{self.argument: table})


def reduced_rotations(table: Rotations, state: State, batch: int) -> Rotations:
    """Returns the rotations of reduced tokens, in the form of those of the image's tokens.

    Args:
        table: rotations of the image's tokens, (cos, sin) of shape (..., H * W, d), or both side by
            side; the other axes, such as one for heads, come before.
        state: the state of the reduced tokens.
        batch: number of images.

    Returns:
        Rows for the tokens of the layout, or for its groups if it has any: (..., h * w, d) for
        clusters, (B, 1, n, d) for merged tokens, with the table's other axes in place of the 1.
    """
    both = table if isinstance(table, Tensor) else torch.cat(table, -1)
    if isinstance(state.layout, Points):
        reduced = _means(both, state, state.layout, batch)
    else:
        reduced = rotations_at_centres(both, state.grid, state.layout)
    if isinstance(table, Tensor):
        return reduced
    first, second = reduced.chunk(2, -1)
    return first, second


def rotations_at_centres(table: Tensor, grid: Size, cells: Size) -> Tensor:
    """Returns the rotations at the centres of cells laid over the tokens of an image.

    An angle is linear in the token's row and column: so the turn from each token to the next is the
    same, and a centre between two tokens has the rotation of the nearest one, turned further by
    that fraction. This is exact where neighbouring tokens are less than half a turn apart; if they
    are not, their rotations do not tell by how much. DINOv3 needs more than 4 rows and columns of
    tokens, times the factor by which its training rescales them.

    Args:
        table: cos and sin of the tokens' angles in either order, (..., H * W, 2 d).
        grid: rows and columns of tokens, (H, W).
        cells: rows and columns of cells, (h, w).

    Returns:
        The same of the cells, (..., h * w, 2 d), in the table's type.
    """
    wide = torch.promote_types(table.dtype, torch.float32)
    x, y = table.to(wide).unflatten(-2, grid).chunk(2, -1)
    x, y = _along(x, y, -3, grid[0], cells[0])
    x, y = _along(x, y, -2, grid[1], cells[1])
    return torch.cat([x, y], -1).flatten(-3, -2).to(table.dtype)


def _along(x: Tensor, y: Tensor, axis: int, tokens: int, cells: int) -> tuple[Tensor, Tensor]:
    """Reads the rotations (x, y) at the centres of cells along one axis."""
    if tokens == cells:
        return x, y
    centre = (torch.arange(cells, device=x.device) + 0.5) * (tokens / cells) - 0.5
    nearest = centre.round()
    x_at, y_at = (part.index_select(axis, nearest.long()) for part in (x, y))
    if tokens == 1:
        return x_at, y_at  # which has no next token
    (x0, x1), (y0, y1) = (part.narrow(axis, 0, 2).split(1, axis) for part in (x, y))
    turn = torch.atan2(x0 * y1 - y0 * x1, x0 * x1 + y0 * y1)
    shape = [1] * x.dim()
    shape[axis] = cells
    angle = turn * (centre - nearest).to(x.dtype).view(shape)
    cos, sin = angle.cos(), angle.sin()
    return x_at * cos - y_at * sin, x_at * sin + y_at * cos


def _means(table: Tensor, state: State, layout: Points, batch: int) -> Tensor:
    """Returns means over the image's tokens that each merged token, or each group, stands for.

    Args:
        table: (..., N, D), for the N tokens of an image.
        state: the state of the merged tokens.
        layout: its layout.
        batch: number of images.

    Returns:
        (B, ..., n, D), with an axis of length 1 in between where `table` has no other axis.
    """
    other, rows = table.shape[:-2] or (1,), table.movedim(-2, 0).flatten(1)  # (N, ... * D)
    means = means_of_members(rows.expand(batch, *rows.shape), state)
    if layout.groups is not None:
        prefixes, suffixes = state.aside  # each a group of its own
        groups, total = layout.groups
        groups = groups[:, prefixes : groups.shape[1] - suffixes] - prefixes
        means = token_pool(means, groups, total - prefixes - suffixes)
    return means.unflatten(2, (*other, table.shape[-1])).movedim(1, -2)


def _first(table: Rotations) -> Tensor:
    return table if isinstance(table, Tensor) else table[0]

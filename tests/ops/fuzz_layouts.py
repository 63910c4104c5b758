"""Ways in which a map (B, H, W, C) can lie in memory, for the fuzz test."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _nothing(x: Tensor, shape: list[int]) -> Tensor:
    """Shows where it is read: NaN, or an index that is out of range."""
    return x.new_full(shape, torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max)


def _in_a_larger_one(x: Tensor) -> Tensor:
    """Something else on all sides."""
    around = _nothing(x, [n + more for n, more in zip(x.shape, (1, 2, 3, 5), strict=True)])
    inner = around[1:, 1:-1, 1:-2, 3:-2]
    inner.copy_(x)
    return inner


def _every_second(x: Tensor) -> Tensor:
    """A step in every axis, the channels included."""
    around = _nothing(x, [2 * n for n in x.shape])
    around[1::2, ::2, 1::2, ::2] = x
    return around[1::2, ::2, 1::2, ::2]


def _expanded(x: Tensor) -> Tensor:
    """Columns that share memory, where all are equal."""
    column = x[:, :, :1].contiguous()
    return column.expand(x.shape) if torch.equal(column.expand(x.shape), x) else x.contiguous()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda x: x.contiguous(),
    "channels_first": lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "columns_first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "batch_inside": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    "in_a_larger_one": _in_a_larger_one,
    "every_second": _every_second,
    "expanded": _expanded,
}

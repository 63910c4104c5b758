"""Sums of rows in a fixed order, for the references."""

from __future__ import annotations

from torch import Tensor


def add_rows(sums: Tensor, at: Tensor, rows: Tensor) -> Tensor:
    """Adds ``rows`` (n, C), in their order, to those of ``sums`` (R, C) that ``at`` (n,) names.

    On CUDA index_add is in the order of chance; on the CPU index_put is.
    """
    if sums.is_cuda:
        return sums.index_put((at,), rows, accumulate=True)
    return sums.index_add(0, at, rows)

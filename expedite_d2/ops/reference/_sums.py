"""Sums of rows in a fixed order, for the references."""

from __future__ import annotations

from torch import Tensor


def add_rows(sums: Tensor, at: Tensor, rows: Tensor) -> Tensor:
    """Adds ``rows`` (n, C), in their order, to those of ``sums`` (R, C) that ``at`` (n,) names.

    On CUDA scatter_add is in the order of chance, and index_put is not. A program that is traced
    has scatter_add alone: ONNX Runtime adds what index_put and index_add become (ScatterND) by
    several threads at once, and loses summands.
    """
    if sums.is_cuda and type(sums) is Tensor:
        return sums.index_put((at,), rows, accumulate=True)
    return sums.scatter_add(0, at[:, None].expand(rows.shape), rows)

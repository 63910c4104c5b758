"""Biases of relative positions between clusters."""

from __future__ import annotations

import pytest
import torch
from family_cases.plain import slow_bias
from timm.models.beit import RelativePositionBias

from expedite_d2.adapters.relative_position import read_offsets, relative_bias


@pytest.mark.parametrize(
    ("tokens", "cells", "expected"),
    [
        (3, 3, [0, 10, 20, 30, 40]),
        (4, 2, [10, 30, 50]),  # offsets -2, 0, 2 of -3 ... 3
        (3, 2, [5, 20, 35]),  # offsets -1.5, 0, 1.5 of -2 ... 2
        (5, 1, [40]),
        (2, 3, [0, 10 / 3, 10, 50 / 3, 20]),  # offsets of -4/3 are beyond the table
    ],
)
def test_offsets_between_cells_are_read_linearly(
    tokens: int, cells: int, expected: list[float]
) -> None:
    table = 10.0 * torch.arange(2 * tokens - 1)[:, None].expand(-1, 3)
    read = read_offsets(table, tokens, cells)
    torch.testing.assert_close(
        read, torch.tensor(expected, dtype=torch.float32)[:, None].expand(-1, 3)
    )


def test_offsets_across_several_squares_are_read_linearly() -> None:
    wide, narrow = 10.0 * torch.arange(7), 10.0 * torch.arange(5)
    assert read_offsets(wide, 3, 2, 3).tolist() == [0, 15, 30, 45, 60]  # offsets -3, -1.5, 0 ...
    assert read_offsets(narrow, 3, 2, 3).tolist() == [0, 5, 20, 35, 40]  # +-3 are beyond the table
    assert read_offsets(wide, 2, 2, 3).tolist() == [10, 20, 30, 40, 50]


@pytest.mark.parametrize("grid", [(4, 4), (3, 6)])
def test_bias_of_tokens_is_the_models_own(grid: tuple[int, int]) -> None:
    module = RelativePositionBias(grid, num_heads=2)
    table = module.relative_position_bias_table.data.normal_()
    maps = table[:-3].view(2 * grid[0] - 1, 2 * grid[1] - 1, 2)
    assert torch.equal(relative_bias(maps, table[-3:], grid, grid), module())


@pytest.mark.parametrize("cells", [(2, 2), (3, 4), (1, 6)])
def test_bias_of_cells_is_read_pair_by_pair(cells: tuple[int, int]) -> None:
    table = torch.randn(5 * 11 + 3, 2, generator=torch.Generator().manual_seed(0))
    bias = relative_bias(table[:-3].view(5, 11, 2), table[-3:], (3, 6), cells)
    torch.testing.assert_close(bias[None], slow_bias(table, (3, 6), cells))


def test_bias_is_resized_before_it_is_read() -> None:
    maps = torch.arange(3.0)[:, None, None].expand(3, 3, 2)  # -1, 0, 1 rows: 0, 1, 2
    bias = relative_bias(maps, torch.zeros(3, 2), (3, 3), (3, 1))
    resized = torch.tensor([0, 0.4, 1, 1.6, 2])  # to -2 ... 2 rows, bilinearly
    rows = torch.arange(3)
    torch.testing.assert_close(bias[0, 1:, 1:], resized[rows[:, None] - rows[None, :] + 2])


def test_bias_passes_gradients_to_the_table() -> None:
    table = torch.randn(7, 7, 2, dtype=torch.float64, requires_grad=True)
    extra = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda t, e: relative_bias(t, e, (4, 4), (3, 2)), (table, extra))

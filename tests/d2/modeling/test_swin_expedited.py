"""The expedited Swin backbone: against slow loops, and what it leaves as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from settings_cases import clustered
from swin_cases import assert_expedited_equals_slow_loops, images, slow_attention, tiny
from torch import Tensor

from expedite_d2.d2.modeling.backbone.swin_blocks import position_resampling
from expedite_d2.reducers import Reduction
from expedite_d2.tools.calibrate import calibrate


def bias_at(table: Tensor, window: int, dy: float, dx: float) -> Tensor:
    """The bias table, (heads,) at a fractional offset, by bilinear interpolation."""
    y, x = dy + window - 1, dx + window - 1
    y0, x0 = min(int(y), 2 * window - 3), min(int(x), 2 * window - 3)
    grid = table.view(2 * window - 1, 2 * window - 1, -1)
    top = grid[y0, x0] * (x0 + 1 - x) + grid[y0, x0 + 1] * (x - x0)
    bottom = grid[y0 + 1, x0] * (x0 + 1 - x) + grid[y0 + 1, x0 + 1] * (x - x0)
    return top * (y0 + 1 - y) + bottom * (y - y0)


def slow_block(block: Any, x: Tensor, window: int, m: tuple[int, int]) -> Tensor:
    """One block of the first version on a map (h, w, C) of clusters."""
    attn = block.attn

    def qkv(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = attn.qkv(y).view(len(y), 3, attn.num_heads, -1).permute(1, 2, 0, 3)
        return parts[0] / parts.shape[-1] ** 0.5, parts[1], parts[2]

    def bias(dy: float, dx: float) -> Tensor:
        return bias_at(attn.relative_position_bias_table, window, dy, dx)

    x = x + slow_attention(block, block.norm1(x), window, m, qkv, bias)
    return x + block.mlp(block.norm2(x))


@pytest.mark.parametrize(
    ("size", "reduction"),
    [
        ((128, 128), clustered(4, (2, 2))),
        ((144, 112), clustered(4, (3, 3))),  # 9x7 tokens: ragged windows both ways
        ((112, 80), clustered(3, (3, 2), temperature=0.3, mode="replace")),
        ((80, 160), clustered(2, (2, 3), topk=2)),  # the first block of the stage
        ((48, 48), clustered(7, (3, 3))),  # a map smaller than one window, the last block only
    ],
)
def test_swin_expedited_equals_slow_loops(
    size: tuple[int, int], reduction: Reduction, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(reduction)
    exact = copy.deepcopy(model).double()
    x = images(*size, batch=1)
    assert_expedited_equals_slow_loops(model, exact, x, slow_block, monkeypatch)


@pytest.mark.parametrize("alpha", [0, 1, 2, 5, 7, 8])
def test_swin_expedited_has_plain_shapes(alpha: int) -> None:
    plain, expedited = tiny(), tiny(clustered(alpha, (0.5, 0.75)))
    for size in ((32, 32), (33, 47), (95, 130)):
        x = images(*size, batch=1)
        with torch.no_grad():
            a, b = plain(x), expedited(x)
        assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
        assert all(v.isfinite().all() for v in b.values())
        stages = [0] * 1 + [1] * 1 + [2] * 6 + [3]
        for i, name in enumerate(a):
            assert torch.equal(a[name], b[name]) == (i < stages[alpha])


def test_swin_disabled_is_bit_equal() -> None:
    plain, model = tiny(), tiny(clustered(4, (2, 2)))
    x = images(100, 144)
    with torch.no_grad():
        model(x)
        model.reduction = None
        for a, b in zip(plain(x).values(), model(x).values(), strict=True):
            assert torch.equal(a, b)


def test_swin_expedited_changes_no_state_dict() -> None:
    plain, model = tiny(), tiny(clustered(4, (2, 2)))
    with torch.no_grad():
        model(images(64, 64))
    assert list(plain.state_dict()) == list(model.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True)
    )
    plain.load_state_dict(model.state_dict(), assign=True)
    assert plain.norm0.weight.data_ptr() == model.norm0.weight.data_ptr()


def test_swin_bias_follows_loaded_weights() -> None:
    model, other = tiny(clustered(4, (2, 2))), tiny(clustered(4, (2, 2)), mlp_ratio=4.0)
    x = images(64, 64)
    with torch.no_grad():
        model(x)
        for p in other.parameters():
            p.mul_(1.1)
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(x)["res5"], other(x)["res5"])


def test_swin_position_resampling_hits_table_at_integers() -> None:
    # 4 -> 2: offsets -2, 0, 2 are entries 1, 3, 5 of the seven.
    rows = position_resampling(4, (2, 2)).view(3, 3, 7, 7)
    expected = torch.zeros(3, 3, 7, 7)
    for i, a in enumerate((1, 3, 5)):
        for j, b in enumerate((1, 3, 5)):
            expected[i, j, a, b] = 1
    assert torch.equal(rows, expected)
    # 12 -> 8: offset 1 is 1.5 tokens, half way between two entries; every row is an average.
    rows = position_resampling(12, (8, 8))
    torch.testing.assert_close(rows.sum(1), torch.ones(225))
    assert rows.view(15, 15, 23, 23)[8, 7, 12, 11] == rows.view(15, 15, 23, 23)[8, 7, 13, 11] == 0.5


def test_swin_calibrated_equals_automatic_on_one_image() -> None:
    model = tiny(clustered(4, (2, 2)))
    x = images(96, 112, batch=1)
    with torch.no_grad():
        automatic = model(x)["res5"]
        temperature = calibrate(model, [x]).cluster.temperature
        assert model.reduction == clustered(4, (2, 2), temperature=temperature)
        torch.testing.assert_close(model(x)["res5"], automatic, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("reduction", "message"),
    [
        (clustered(9, (2, 2)), "alpha must be less than the backbone's 9 blocks, got 9"),
        (clustered(4, (4, 4)), "smaller than the 4x4 window, got 4x4"),
        (clustered(4, (2, 5)), "smaller than the 4x4 window, got 2x5"),
        (clustered(4, (0.9, 0.9)), "smaller than the 4x4 window, got 4x4"),
    ],
)
def test_swin_refuses_bad_reduction(reduction: Reduction, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(reduction)
    model = tiny()
    with pytest.raises(ValueError, match=message):
        model.reduction = reduction
    assert model.reduction is None

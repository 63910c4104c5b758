"""The expedited second version of Swin: against slow loops, its continuous position bias."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from settings_cases import clustered
from swin_cases import assert_expedited_equals_slow_loops, images, slow_attention, tiny
from torch import Tensor

from expedite_d2.reducers import Reduction


def slow_block(block: Any, x: Tensor, window: int, m: tuple[int, int]) -> Tensor:
    """One block of the second version on a map (h, w, C) of clusters."""
    attn = block.attn

    def qkv(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = []
        for part, bias in zip(attn.qkv.weight.chunk(3), (attn.q_bias, 0, attn.v_bias), strict=True):
            heads.append((y @ part.T + bias).view(len(y), attn.num_heads, -1).transpose(0, 1))
        query, key, value = heads
        scale = attn.logit_scale.exp().clamp(max=100)
        query = query / query.norm(dim=-1, keepdim=True)
        key = key / key.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        return scale * query, key, value

    def bias(dy: float, dx: float) -> Tensor:
        # Pretrained in windows of 3: the coordinates are measured in halves.
        sides = [math.copysign(math.log(1 + 8 * abs(d) / 2, 8), d) for d in (dy, dx)]
        return 16 * attn.cpb_mlp(x.new_tensor(sides)).sigmoid()

    x = x + block.norm1(slow_attention(block, x, window, m, qkv, bias))
    return x + block.norm2(block.mlp(x))


@pytest.mark.parametrize(
    ("size", "reduction"),
    [
        ((128, 128), clustered(4, (2, 2))),
        ((144, 112), clustered(5, (3, 3))),  # 9x7 tokens: ragged windows both ways
        ((112, 80), clustered(3, (3, 2), temperature=0.3, mode="replace")),
        ((48, 48), clustered(7, (3, 3))),  # a map smaller than one window, the last block only
    ],
)
def test_swin_v2_expedited_equals_slow_loops(
    size: tuple[int, int], reduction: Reduction, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only the stage that is expedited has other pretrained windows: its coordinates are to be used.
    model = tiny(reduction, version=2, pretrained_window_sizes=[0, 0, 3, 0])
    exact = copy.deepcopy(model).double()
    x = images(*size, batch=1)
    assert_expedited_equals_slow_loops(model, exact, x, slow_block, monkeypatch)


@pytest.mark.parametrize("alpha", [0, 1, 2, 5, 7, 8])
def test_swin_v2_expedited_has_plain_shapes(alpha: int) -> None:
    plain, expedited = tiny(version=2), tiny(clustered(alpha, (0.5, 0.75)), version=2)
    for size in ((32, 32), (95, 130)):
        x = images(*size, batch=1)
        with torch.no_grad():
            a, b = plain(x), expedited(x)
        assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
        assert all(v.isfinite().all() for v in b.values())
        stages = [0] * 1 + [1] * 1 + [2] * 6 + [3]
        for i, name in enumerate(a):
            assert torch.equal(a[name], b[name]) == (i < stages[alpha])


def test_swin_v2_disabled_is_bit_equal_and_has_the_same_state_dict() -> None:
    plain, model = tiny(version=2), tiny(clustered(4, (2, 2)), version=2)
    assert list(plain.state_dict()) == list(model.state_dict())
    x = images(100, 144)
    with torch.no_grad():
        model(x)
        model.reduction = None
        for a, b in zip(plain(x).values(), model(x).values(), strict=True):
            assert torch.equal(a, b)


def test_swin_v2_bias_between_clusters_is_the_bias_at_their_distance() -> None:
    model = tiny(version=2)
    attn = model.layers[2].blocks[0].attn
    table = attn.relative_coords_table.view(7, 7, 2)
    # 4 -> 2: offsets -2, 0, 2 are rows and columns 1, 3, 5 of the seven.
    assert torch.equal(attn.position_source((2, 2)).view(3, 3, 2), table[1::2, 1::2])
    # 4 -> 3: one cell is 4/3 tokens.
    rows = attn.position_source((3, 4)).view(5, 7, 2)
    assert rows[3, 0, 0].item() == pytest.approx(math.log(1 + 8 * (4 / 3) / 3, 8))
    assert torch.equal(rows[:, :, 1], table[1:6, :, 1])


def test_swin_v2_padding_has_finite_gradients_in_half_precision() -> None:
    """Keys of padding are zero, whose direction is none."""
    model = tiny(version=2, drop_path_rate=0.0).train()
    for dtype in (torch.float16, torch.bfloat16):
        model.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            sum(v.float().square().mean() for v in model(images(36, 52)).values()).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), (name, dtype)

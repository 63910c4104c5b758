"""What the tests of the Swin backbone share: tiny models, and the expedited stage in slow loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from expedite_d2.d2.modeling.backbone.swin import ExpeditedSwinTransformer
from expedite_d2.d2.modeling.backbone.swin_windows import Windows
from expedite_d2.reducers import Reduction


def tiny(reduction: Reduction | None = None, **changes: Any) -> ExpeditedSwinTransformer:
    """16 channels, windows of 4, nine blocks of which six in the third stage."""
    settings: dict[str, Any] = {
        "embed_dim": 16,
        "depths": [1, 1, 6, 1],
        "num_heads": [1, 2, 2, 4],
        "window_size": 4,
        "reduction": reduction,
    }
    torch.manual_seed(0)
    model = ExpeditedSwinTransformer(**{**settings, **changes})
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)  # the second version begins some with zeros
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relative_position_bias_table" in name:
                parameter.normal_()  # large enough that a wrong bias shows
            elif "logit_scale" in name:
                parameter.uniform_(1.0, 5.0)  # some are clamped, to log 100
            elif parameter.dim() > 1:
                parameter.normal_(std=0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def images(height: int, width: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def slow_cluster_window(z: Tensor, window: int, grid: tuple[int, int], tau: float) -> Any:
    """Soft k-means of one window (rows, columns, C), cell by cell; only cells with tokens exist."""
    rows, columns, _ = z.shape
    cells = {}
    for i in range(grid[0]):
        for j in range(grid[1]):
            r0, r1 = i * window // grid[0], -(-(i + 1) * window // grid[0])
            c0, c1 = j * window // grid[1], -(-(j + 1) * window // grid[1])
            if r0 < rows and c0 < columns:
                cells[i, j] = z[r0:r1, c0:c1].flatten(0, 1).mean(0)
    home = {
        (y, x): (y * grid[0] // window, x * grid[1] // window)
        for y in range(rows)
        for x in range(columns)
    }
    near = {
        p: [c for c in cells if abs(c[0] - h[0]) <= 2 and abs(c[1] - h[1]) <= 2]
        for p, h in home.items()
    }
    spread = [min((z[p] - cells[c]).square().sum() for c in near[p]) for p in home]
    for _ in range(5):
        mass = dict.fromkeys(cells, z.new_zeros(()))
        total = {c: torch.zeros_like(z[0, 0]) for c in cells}
        for p, candidates in near.items():
            distance = torch.stack([(z[p] - cells[c]).square().sum() for c in candidates])
            for c, q in zip(candidates, (-tau * distance).softmax(0), strict=True):
                mass[c] = mass[c] + q
                total[c] = total[c] + q * z[p]
        cells = {c: total[c] / mass[c] for c in cells}
    return cells, spread


def slow_attention(
    block: Any,
    x: Tensor,
    window: int,
    m: tuple[int, int],
    qkv: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
    bias_at: Callable[[float, float], Tensor],
) -> Tensor:
    """A block's attention on a map (h, w, C) of clusters: every pair of positions, allowed or not.

    Args:
        qkv: (N, C) -> query, key and value, (heads, N, d) each; the query already scaled.
        bias_at: the bias, (heads,), at an offset in tokens.
    """
    h, w, channels = x.shape
    hp, wp = -(-h // m[0]) * m[0], -(-w // m[1]) * m[1]
    y = x.new_zeros(hp, wp, channels)
    y[:h, :w] = x
    sy, sx = (m[0] // 2, m[1] // 2) if block.shifted else (0, 0)
    query, key, value = qkv(y.reshape(-1, channels))
    place = [((r - sy) % hp, (c - sx) % wp, r < sy, c < sx) for r in range(hp) for c in range(wp)]
    bias = x.new_full((len(query), hp * wp, hp * wp), -torch.inf)
    for p, (pr, pc, *p_wrapped) in enumerate(place):
        for q, (qr, qc, *q_wrapped) in enumerate(place):
            same = (pr // m[0], pc // m[1]) == (qr // m[0], qc // m[1])
            if same and p_wrapped == q_wrapped:
                bias[:, p, q] = bias_at((pr - qr) * window / m[0], (pc - qc) * window / m[1])
    out = (query @ key.transpose(1, 2) + bias).softmax(-1) @ value
    return block.attn.proj(out.transpose(0, 1).reshape(hp, wp, channels))[:h, :w]


SlowBlock = Callable[[Any, Tensor, int, tuple[int, int]], Tensor]


def slow_stage(
    blocks: Any, slow_block: SlowBlock, z: Tensor, reduction: Reduction, window: int = 4
) -> Tensor:
    """The expedited end of a stage for one image (H, W, C), from the definitions."""
    height, width, channels = z.shape
    m: Any = reduction.cluster.grid
    corners = [(y, x) for y in range(0, height, window) for x in range(0, width, window)]

    def part(y: int, x: int) -> Tensor:
        return z[y : y + window, x : x + window]

    tau = reduction.cluster.temperature
    if tau == 0:
        spreads = [s for y, x in corners for s in slow_cluster_window(part(y, x), window, m, 1)[1]]
        tau = 32 / float(torch.stack(spreads).mean())
    low = z.new_zeros(-(-height * m[0] // window), -(-width * m[1] // window), channels)
    cells = {(y, x): slow_cluster_window(part(y, x), window, m, tau)[0] for y, x in corners}
    for (y, x), window_cells in cells.items():
        for (i, j), centre in window_cells.items():
            low[y // window * m[0] + i, x // window * m[1] + j] = centre
    refined = low
    for block in blocks:
        refined = slow_block(block, refined, window, m)
    out = torch.zeros_like(z)
    for (y, x), window_cells in cells.items():
        names = list(window_cells)
        centres = torch.stack([window_cells[c] for c in names])
        after = torch.stack(
            [refined[y // window * m[0] + i, x // window * m[1] + j] for i, j in names]
        )
        for r in range(part(y, x).shape[0]):
            for c in range(part(y, x).shape[1]):
                token = part(y, x)[r, c]
                distance = (centres - token).square().sum(1)
                nearest = distance.argsort(stable=True)[: reduction.cluster.topk]
                weight = (-tau * distance[nearest]).softmax(0)
                if reduction.reconstruction == "replace":
                    out[y + r, x + c] = weight @ after[nearest]
                else:
                    out[y + r, x + c] = token + weight @ (after - centres)[nearest]
    return out


def assert_expedited_equals_slow_loops(
    model: ExpeditedSwinTransformer, exact: Any, x: Tensor, slow_block: SlowBlock, monkeypatch: Any
) -> None:
    """The third stage of ``model``, in float32 and in double (``exact``), against slow loops."""
    from expedite_d2.d2.modeling.backbone import swin

    reduction, seen, reduce = model.reduction, [], swin.reduce
    assert reduction is not None

    def spy(tokens: Tensor, *args: Any) -> Any:
        seen.append(tokens)
        return reduce(tokens, *args)

    monkeypatch.setattr(swin, "reduce", spy)
    with torch.no_grad():
        in_float, in_double = model(x), exact(x.double())
        stage = exact.layers[2]
        res4 = slow_stage(stage.blocks[reduction.alpha - 2 :], slow_block, seen[-1][0], reduction)
        res5 = stage.downsample(res4[None])
        block = exact.layers[3].blocks[0]
        windows = Windows.of_map(res5, (4, 4), exact.token_positions)
        res5 = block(res5.flatten(1, 2), windows).view(res5.shape)
        expected = {"res4": exact.norm2(res4[None]), "res5": exact.norm3(res5)}
    for name, value in expected.items():
        value = value.permute(0, 3, 1, 2)
        # The constants of the position bias are float32. A sharp softmax over distances makes much
        # of float32's rounding.
        torch.testing.assert_close(in_double[name], value, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(in_float[name].double(), value, rtol=2e-3, atol=2e-3)

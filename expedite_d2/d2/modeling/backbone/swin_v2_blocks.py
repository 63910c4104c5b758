"""Parts of Swin that differ in its second version: attention, block and patch merging.

Attention compares directions (cosines, times a learnt scale), and a small network computes the bias
of a relative position from its log-spaced coordinates, so that a model can be used with other
windows. Blocks and merging normalise their outputs, not their inputs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expedite_d2.adapters.attention import attend_by_direction, bias_of_pairs, split_heads
from expedite_d2.adapters.relative_position import MAX_BIAS
from expedite_d2.d2.modeling.backbone.swin_blocks import SwinBlock, concatenate_neighbours
from expedite_d2.d2.modeling.backbone.swin_windows import (
    Layout,
    Windows,
    out_of_windows,
    project_into_windows,
)
from expedite_d2.d2.modeling.upcast import upcast_product


class CosineWindowAttention(nn.Module):
    """Multi-head cosine attention inside windows, with a continuous position bias."""

    relative_coords_table: Tensor
    q_bias: Tensor  # None without qkv_bias
    v_bias: Tensor

    def __init__(
        self,
        dim: int,
        window_size: int,
        num_heads: int,
        qkv_bias: bool = True,
        pretrained_window_size: int = 0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        """Arguments as in `WindowAttention`, without the scale of the logits, which is learnt, and:

        Args:
            pretrained_window_size: side of the window in which coordinates are measured; 0 for that
                of the attention.
        """
        super().__init__()
        self.window_size = window_size
        self.num_heads = num_heads
        self.reach = max((pretrained_window_size or window_size) - 1, 1)
        self.attn_drop = attn_drop
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10.0)))
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, num_heads, bias=False)
        )
        table = self.position_source((window_size, window_size))
        self.register_buffer("relative_coords_table", table, persistent=False)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        for name in ("q_bias", "v_bias"):  # keys have none
            self.register_parameter(name, nn.Parameter(torch.zeros(dim)) if qkv_bias else None)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Constants that official checkpoints contain, for the window that they were trained with.
        for name in ("relative_position_index", "relative_coords_table"):
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def position_source(self, clusters: tuple[int, int]) -> Tensor:
        """Returns log-spaced coordinates of the offsets between cells of a grid laid over a window.

        Args:
            clusters: rows and columns (m_h, m_w) of the grid, M / m tokens apart.

        Returns:
            ((2m_h-1)(2m_w-1), 2) float32.
        """
        sides = []
        for cells in clusters:
            offset = torch.arange(1 - cells, cells, dtype=torch.float64) * self.window_size / cells
            scaled = 8 * offset / self.reach
            sides.append(scaled.sign() * (1 + scaled.abs()).log2() / 3)
        return torch.cartesian_prod(*sides).float()

    def position_bias(self, windows: Windows) -> Tensor:
        """Returns the bias of each head for each pair of positions in a window: (heads, N, N)."""
        source = windows.source
        coordinates = self.relative_coords_table if source is None else source
        table = self.cpb_mlp(coordinates.to(self.logit_scale.dtype))
        return bias_of_pairs(MAX_BIAS * table.sigmoid(), windows.positions)

    def forward(self, x: Tensor, windows: Windows, layout: Layout) -> Tensor:
        """Attends within each window: (B, H * W, C) -> the same shape.

        Args:
            x: tokens of a map.
            windows: their geometry.
            layout: one of their two layouts.
        """
        qkv = project_into_windows(x, windows, layout, self._project)
        query, key, value = split_heads(qkv, self.num_heads)
        dropout = self.attn_drop if self.training else 0.0
        bias = self.position_bias(windows)
        attended = attend_by_direction(
            query, key, value, bias, layout.mask, dropout, self.logit_scale
        )
        return self.proj_drop(self.proj(out_of_windows(attended, layout, x.shape)))

    def _project(self, x: Tensor) -> Tensor:
        bias = None
        if self.q_bias is not None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        return upcast_product(F.linear, x, self.qkv.weight, bias)


class SwinV2Block(SwinBlock):
    """Window attention and an MLP, each followed by a LayerNorm and with a residual."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Arguments are those of `SwinBlock`."""
        super().__init__(*args, **kwargs)
        for norm in (self.norm1, self.norm2):  # each block starts as the identity
            nn.init.zeros_(norm.weight)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.norm2(self.mlp(x)))

    def _attend(self, x: Tensor, windows: Windows) -> Tensor:
        layout = windows.shifted if self.shifted else windows.layout
        return self.norm1(self.attn(x, windows, layout))


class PatchMergingV2(nn.Module):
    """Halves the map: four neighbours are concatenated, projected, and then normalised."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, ceil(H/2), ceil(W/2), 2C)."""
        return self.norm(self.reduction(concatenate_neighbours(x)))

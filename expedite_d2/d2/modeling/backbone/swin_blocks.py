"""The parts of a Swin transformer: patch embedding, window attention, block, patch merging.

The parts that differ in its second version are in ``swin_v2_blocks``.

Token maps are channels-last, (B, H, W, C). Blocks take them as (B, H * W, C): if a convolution
follows, torch.compile changes the layout of four-dimensional tensors, as if their H were channels.

A block is given the geometry of its windows with each call, so that the same parameters work in
12x12 windows of tokens and in 8x8 windows of clusters, and nothing of a forward pass stays on a
module.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from expedite_d2.adapters.attention import attend, bias_of_pairs, split_heads
from expedite_d2.adapters.relative_position import read_offsets
from expedite_d2.d2.modeling.backbone.swin_windows import (
    Layout,
    Windows,
    out_of_windows,
    project_into_windows,
)
from expedite_d2.d2.modeling.in_parts import in_parts


def position_resampling(window: int, clusters: tuple[int, int]) -> Tensor:
    """Returns the matrix that reads a window's bias table bilinearly at offsets between clusters.

    Cells of an m x m map laid over an M x M window are M/m tokens apart.

    Args:
        window: side M of the window that the table was trained for.
        clusters: rows and columns (m_h, m_w) of the cluster grid.

    Returns:
        ((2m_h-1)(2m_w-1), (2M-1)^2) float32.
    """
    # Reading is linear: of the identity, it returns its own matrix.
    offsets = torch.eye(2 * window - 1, dtype=torch.float64)
    rows, columns = (read_offsets(offsets, window, cells) for cells in clusters)
    return torch.kron(rows, columns).float()


class WindowAttention(nn.Module):
    """Multi-head attention inside windows, with a learnt bias for each relative position."""

    def __init__(
        self,
        dim: int,
        window_size: int,
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.num_heads = num_heads
        self.scale = qk_scale
        self.attn_drop = attn_drop
        table = torch.empty((2 * window_size - 1) ** 2, num_heads)
        self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A constant that official checkpoints contain, and ours do not.
        state_dict.pop(prefix + "relative_position_index", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def position_source(self, clusters: tuple[int, int]) -> Tensor:
        """Returns the matrix that reads the bias table at offsets between clusters of a window."""
        return position_resampling(self.window_size, clusters)

    def position_bias(self, windows: Windows) -> Tensor:
        """Returns the bias of each head for each pair of positions in a window: (heads, N, N)."""
        table: Tensor = self.relative_position_bias_table
        if windows.source is not None:
            table = windows.source.to(table.dtype) @ table
        return bias_of_pairs(table, windows.positions)

    def forward(self, x: Tensor, windows: Windows, layout: Layout) -> Tensor:
        """Attends within each window: (B, H * W, C) -> the same shape.

        Args:
            x: tokens of a map.
            windows: their geometry.
            layout: one of their two layouts.
        """
        qkv = project_into_windows(x, windows, layout, self.qkv)
        query, key, value = split_heads(qkv, self.num_heads)
        dropout = self.attn_drop if self.training else 0.0
        bias = self.position_bias(windows)
        attended = attend(query, key, value, bias, layout.mask, dropout, self.scale)
        return self.proj_drop(self.proj(out_of_windows(attended, layout, x.shape)))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class SwinBlock(nn.Module):
    """Window attention and an MLP, each behind a LayerNorm and with a residual."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        shifted: bool,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.shifted = shifted
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.drop_path = StochasticDepth(drop_path, mode="row")
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        """Runs the block on the tokens of a map: (B, H * W, C) -> same shape, for any H and W."""
        x = x + self.drop_path(self._attend(x, windows))
        if self.training:  # the path of a whole map is dropped
            return self._feed_forward(x)
        return in_parts(self._feed_forward, x, self.mlp.fc1.out_features)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor, windows: Windows) -> Tensor:
        layout = windows.shifted if self.shifted else windows.layout
        return self.attn(self.norm1(x), windows, layout)


def concatenate_neighbours(x: Tensor) -> Tensor:
    """Concatenates 2 x 2 neighbours: (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), 4C)."""
    height, width, channels = x.shape[1:]
    if height % 2 or width % 2:
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
    # Neighbours are in the official order, column by column.
    x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5)
    return x.reshape(*x.shape[:3], 4 * channels)


class PatchMerging(nn.Module):
    """Halves the map: four neighbours are concatenated and projected to twice the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, ceil(H/2), ceil(W/2), 2C)."""
        return self.reduction(self.norm(concatenate_neighbours(x)))


class PatchEmbed(nn.Module):
    """Projects patches of the image to tokens."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int, norm: bool) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(embed_dim) if norm else None

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, ceil(H/patch), ceil(W/patch), C)."""
        height, width = images.shape[2:]
        bottom, right = -height % self.patch_size, -width % self.patch_size
        if bottom or right:
            images = F.pad(images, (0, right, 0, bottom))
        x = self.proj(images).permute(0, 2, 3, 1)
        return x.contiguous() if self.norm is None else self.norm(x)

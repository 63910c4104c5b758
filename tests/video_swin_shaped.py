"""A small encoder in the shape of Video-Swin-Transformer's, whose library is in no registry.

The same classes, attributes, parameter names and calls between the parts, as far as an adapter can
see them, in lines of our own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from official_shaped import Mlp, WindowAttention
from torch import Tensor, nn

Three = tuple[int, int, int]


def fitted(sizes: Sequence[int], window: Three, shift: Three) -> tuple[list[int], list[int]]:
    """Window and shift along each axis: no larger than the clip, and unshifted where it covers."""
    sides = [min(size, side) for size, side in zip(sizes, window, strict=True)]
    moved = [by if size > side else 0 for size, side, by in zip(sizes, window, shift, strict=True)]
    return sides, moved


def cut(x: Tensor, sides: Sequence[int]) -> Tensor:
    """(B, T, H, W, C) to windows (B, t, h, w, sides ..., C)."""
    for axis in (3, 2, 1):
        x = x.unflatten(axis, (-1, sides[axis - 1]))
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7)


def joined(windows: Tensor) -> Tensor:
    """The inverse of `cut`."""
    x = windows.permute(0, 1, 4, 2, 5, 3, 6, 7)
    return x.flatten(5, 6).flatten(3, 4).flatten(1, 2)


class SwinTransformerBlock3D(nn.Module):
    def __init__(self, dim: int, num_heads: int, window_size: Three, shift_size: Three) -> None:
        super().__init__()
        self.window_size, self.shift_size = window_size, shift_size
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = WindowAttention(dim, window_size, num_heads), Mlp(dim)

    def forward_part1(self, x: Tensor, mask_matrix: Tensor | None) -> Tensor:
        sizes = x.shape[1:4]
        sides, shift = fitted(sizes, self.window_size, self.shift_size)
        frames, rows, columns = (-size % side for size, side in zip(sizes, sides, strict=True))
        x = F.pad(self.norm1(x), (0, 0, 0, columns, 0, rows, 0, frames))
        if any(shift):
            x = x.roll([-by for by in shift], (1, 2, 3))
        windows = cut(x, sides)
        tokens = windows.flatten(4, 6).flatten(0, 3)
        out = self.attn(tokens, mask=mask_matrix if any(shift) else None)
        x = joined(out.view(windows.shape))
        if any(shift):
            x = x.roll(shift, (1, 2, 3))
        return x[:, : sizes[0], : sizes[1], : sizes[2]].contiguous()

    def forward_part2(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm2(x))

    def forward(self, x: Tensor, mask_matrix: Tensor | None) -> Tensor:
        x = x + self.forward_part1(x, mask_matrix)
        return x + self.forward_part2(x)


class PatchMerging(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction, self.norm = nn.Linear(4 * dim, 2 * dim, bias=False), nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[3] % 2, 0, x.shape[2] % 2))
        corners = [x[:, :, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, -1)))


class BasicLayer(nn.Module):
    """One stage, from (B, C, T, H, W) to the same of the next stage."""

    def __init__(
        self, dim: int, depth: int, num_heads: int, window_size: Three, last: bool
    ) -> None:
        super().__init__()
        frames, rows, columns = window_size
        self.window_size, self.shift_size = window_size, (frames // 2, rows // 2, columns // 2)
        self.blocks = nn.ModuleList(
            SwinTransformerBlock3D(
                dim, num_heads, window_size, self.shift_size if i % 2 else (0, 0, 0)
            )
            for i in range(depth)
        )
        self.downsample = None if last else PatchMerging(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 4, 1)
        sides, shift = fitted(x.shape[1:4], self.window_size, self.shift_size)
        sizes = [size + -size % side for size, side in zip(x.shape[1:4], sides, strict=True)]
        regions = torch.zeros(sizes)
        parts = [
            (slice(-side), slice(-side, -by), slice(-by, None)) if by else (slice(None),)
            for side, by in zip(sides, shift, strict=True)
        ]
        for number, place in enumerate(itertools.product(*parts)):
            regions[place] = number
        region = cut(regions[None, ..., None], sides).flatten(3).flatten(0, 2).flatten(1)
        region = region.view(-1, sides[0] * sides[1] * sides[2])
        mask = torch.where(region[:, None] == region[:, :, None], 0.0, -100.0).to(x)
        for block in self.blocks:
            x = block(x, mask)
        if self.downsample is not None:
            x = self.downsample(x)
        return x.permute(0, 4, 1, 2, 3)


class PatchEmbed3D(nn.Module):
    def __init__(self, patch_size: Three, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv3d(3, dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        frames, rows, columns = (
            -size % side for size, side in zip(x.shape[2:], self.patch_size, strict=True)
        )
        x = self.proj(F.pad(x, (0, columns, 0, rows, 0, frames)))
        return self.norm(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


class SwinTransformer3D(nn.Module):
    """Gives (B, C, T, H, W) of the last stage, normalised."""

    def __init__(
        self,
        patch_size: Three = (2, 4, 4),
        embed_dim: int = 16,
        depths: Sequence[int] = (1, 1, 6),
        num_heads: Sequence[int] = (1, 2, 2),
        window_size: Three = (2, 6, 6),
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed3D(patch_size, embed_dim)
        self.pos_drop = nn.Dropout(0.0)
        self.layers = nn.ModuleList(
            BasicLayer(embed_dim * 2**i, depth, heads, window_size, i == len(depths) - 1)
            for i, (depth, heads) in enumerate(zip(depths, num_heads, strict=True))
        )
        self.norm = nn.LayerNorm(embed_dim * 2 ** (len(depths) - 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos_drop(self.patch_embed(x))
        for stage in self.layers:
            x = stage(x.contiguous())
        return self.norm(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)

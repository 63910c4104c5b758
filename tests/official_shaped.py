"""Small encoders in the shape of official ones, whose libraries are in no package registry.

Swin as Mask2Former and Detectron2 have it, Detectron2's ViT and DINOv2's: the same classes,
attributes, parameter names and calls between the parts, as far as an adapter can see them, in lines
of our own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---- Swin ------------------------------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class WindowAttention(nn.Module):
    """Among the tokens of windows (windows, N, C); a mask is (windows of an image, N, N).

    Windows have rows and columns, or frames before them; the last ones may be missing.
    """

    relative_position_index: Tensor

    def __init__(self, dim: int, window_size: tuple[int, ...], num_heads: int) -> None:
        super().__init__()
        self.window_size, self.num_heads = window_size, num_heads
        offsets = math.prod(2 * side - 1 for side in window_size)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets, num_heads))
        places = torch.cartesian_prod(*map(torch.arange, window_size))
        apart = places[:, None] - places + torch.tensor(window_size) - 1
        behind = [window_size[i + 1 :] for i in range(len(window_size))]
        steps = torch.tensor([math.prod(2 * side - 1 for side in sides) for sides in behind])
        index = (apart * steps).sum(-1)
        self.register_buffer("relative_position_index", index)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop, self.softmax = nn.Dropout(0), nn.Dropout(0), nn.Softmax(-1)
        self.scale = (dim // num_heads) ** -0.5

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        count, length, channels = x.shape
        qkv = self.qkv(x).view(count, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv
        logits = query @ key.transpose(-2, -1) * self.scale
        index = self.relative_position_index[:length, :length]
        logits = logits + self.relative_position_bias_table[index].permute(2, 0, 1)
        if mask is not None:
            logits = logits.unflatten(0, (-1, len(mask))) + mask[:, None]
            logits = logits.flatten(0, 1)
        weights = self.attn_drop(self.softmax(logits))
        out = (weights @ value).transpose(1, 2).reshape(count, length, channels)
        return self.proj_drop(self.proj(out))


class SwinTransformerBlock(nn.Module):
    """Is told the map's rows and columns by its stage, as H and W."""

    H: int
    W: int

    def __init__(self, dim: int, num_heads: int, window_size: int, shift_size: int) -> None:
        super().__init__()
        self.window_size, self.shift_size = window_size, shift_size
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, (window_size, window_size), num_heads)
        self.mlp = Mlp(dim)
        self.H = self.W = None  # type: ignore[assignment]

    def forward(self, x: Tensor, mask_matrix: Tensor | None) -> Tensor:
        rows, columns, side, shift = self.H, self.W, self.window_size, self.shift_size
        maps = self.norm1(x).unflatten(1, (rows, columns))
        maps = F.pad(maps, (0, 0, 0, -columns % side, 0, -rows % side))
        if shift:
            maps = maps.roll((-shift, -shift), (1, 2))
        windows = maps.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)
        out = self.attn(
            windows.reshape(-1, side * side, x.shape[2]), mask_matrix if shift else None
        )
        maps = out.view(windows.shape).transpose(2, 3).reshape(maps.shape)
        if shift:
            maps = maps.roll((shift, shift), (1, 2))
        x = x + maps[:, :rows, :columns].flatten(1, 2)
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction, self.norm = nn.Linear(4 * dim, 2 * dim, bias=False), nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        maps = F.pad(x.unflatten(1, (H, W)), (0, 0, 0, W % 2, 0, H % 2))
        corners = [maps[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, -1).flatten(1, 2)))


class BasicLayer(nn.Module):
    """One stage; gives its output, that of the merging, and the sizes of both."""

    def __init__(self, dim: int, depth: int, num_heads: int, window_size: int, last: bool) -> None:
        super().__init__()
        self.window_size, self.shift_size = window_size, window_size // 2
        self.blocks = nn.ModuleList(
            SwinTransformerBlock(dim, num_heads, window_size, i % 2 * self.shift_size)
            for i in range(depth)
        )
        self.downsample = None if last else PatchMerging(dim)

    def forward(self, x: Tensor, H: int, W: int) -> tuple[Tensor, int, int, Tensor, int, int]:
        side, shift = self.window_size, self.shift_size
        regions = torch.zeros(H + -H % side, W + -W % side)
        for i, rows in enumerate((slice(-side), slice(-side, -shift), slice(-shift, None))):
            for j, columns in enumerate((slice(-side), slice(-side, -shift), slice(-shift, None))):
                regions[rows, columns] = 3 * i + j
        windows = regions.unflatten(1, (-1, side)).unflatten(0, (-1, side)).transpose(1, 2)
        region = windows.reshape(-1, side * side)
        mask = torch.where(region[:, None] == region[:, :, None], 0.0, -100.0).to(x)
        for block in self.blocks:
            block.H, block.W = H, W
            x = block(x, mask)
        if self.downsample is None:
            return x, H, W, x, H, W
        return x, H, W, self.downsample(x, H, W), (H + 1) // 2, (W + 1) // 2


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        bottom, right = -x.shape[2] % self.patch_size, -x.shape[3] % self.patch_size
        return self.norm(self.proj(F.pad(x, (0, right, 0, bottom))).permute(0, 2, 3, 1))


class SwinTransformer(nn.Module):
    """Gives "res2" to "res5", normalised."""

    def __init__(
        self,
        embed_dim: int = 16,
        depths: Sequence[int] = (1, 1, 6, 1),
        num_heads: Sequence[int] = (1, 2, 2, 4),
        window_size: int = 6,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(4, embed_dim)
        self.pos_drop = nn.Dropout(0.0)
        self.layers = nn.ModuleList(
            BasicLayer(embed_dim * 2**i, depth, heads, window_size, i == len(depths) - 1)
            for i, (depth, heads) in enumerate(zip(depths, num_heads, strict=True))
        )
        for i in range(len(depths)):
            self.add_module(f"norm{i}", nn.LayerNorm(embed_dim * 2**i))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.patch_embed(x)
        rows, columns = x.shape[1:3]
        x, outputs = self.pos_drop(x.flatten(1, 2)), {}
        for i, stage in enumerate(self.layers):
            out, height, width, x, rows, columns = stage(x, rows, columns)
            out = getattr(self, f"norm{i}")(out)
            outputs[f"res{i + 2}"] = out.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return outputs


# ---- Detectron2's ViT ------------------------------------------------------------------------


class Attention(nn.Module):
    """Among all tokens of maps (B, H, W, C), with relative positions along each axis."""

    def __init__(self, dim: int, num_heads: int, use_rel_pos: bool, side: int) -> None:
        super().__init__()
        self.num_heads, self.use_rel_pos = num_heads, use_rel_pos
        self.scale = (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        if use_rel_pos:
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, dim // num_heads))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, dim // num_heads))

    def forward(self, x: Tensor) -> Tensor:
        batch, rows, columns, channels = x.shape
        qkv = self.qkv(x).view(batch, rows * columns, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv
        logits = query * self.scale @ key.transpose(-2, -1)
        if self.use_rel_pos:
            maps = query.unflatten(2, (rows, columns))
            by_row = torch.einsum("bnyxc,yvc->bnyxv", maps, _positions(self.rel_pos_h, rows))
            by_column = torch.einsum("bnyxc,xuc->bnyxu", maps, _positions(self.rel_pos_w, columns))
            logits = logits + (by_row[..., None] + by_column[..., None, :]).flatten(4).flatten(2, 3)
        out = (logits.softmax(-1) @ value).transpose(1, 2).reshape(x.shape)
        return self.proj(out)


def _positions(table: Tensor, length: int) -> Tensor:
    """(length, length, C): the table between two places; stretched if made for another length."""
    if len(table) != 2 * length - 1:
        table = F.interpolate(table.t()[None], size=2 * length - 1, mode="linear")[0].t()
    place = torch.arange(length)
    return table[place[:, None] - place + length - 1]


class ViTBlock(nn.Module):
    """In windows, or on the whole map where window_size is 0."""

    def __init__(
        self, dim: int, num_heads: int, use_rel_pos: bool, window_size: int, side: int
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, use_rel_pos, window_size or side)
        self.mlp = Mlp(dim)
        self.use_residual_block = False

    def forward(self, x: Tensor) -> Tensor:
        maps, side = self.norm1(x), self.window_size
        if side:
            batch, rows, columns, _ = x.shape
            maps = F.pad(maps, (0, 0, 0, -columns % side, 0, -rows % side))
            windows = maps.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)
            out = self.attn(windows.flatten(0, 2))
            maps = out.view(windows.shape).transpose(2, 3).reshape(maps.shape)
            maps = maps[:, :rows, :columns]
        else:
            maps = self.attn(maps)
        x = x + maps
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Gives "last_feat", (B, C, H / 4, W / 4)."""

    def __init__(
        self,
        img_size: int = 32,
        patch_size: int = 4,
        embed_dim: int = 16,
        depth: int = 4,
        num_heads: int = 2,
        use_rel_pos: bool = True,
        window_size: int = 6,
        window_block_indexes: Sequence[int] = (1, 2),
    ) -> None:
        super().__init__()
        self.patch_embed: Any = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        self.blocks = nn.ModuleList(
            ViTBlock(
                embed_dim,
                num_heads,
                use_rel_pos,
                window_size if i in window_block_indexes else 0,
                img_size // patch_size,
            )
            for i in range(depth)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.patch_embed(x).permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x)
        return {"last_feat": x.permute(0, 3, 1, 2)}


class Detectron2ViT(ViT):
    """Pickles by this name, while the class that it inherits from says it is Detectron2's."""


# Families tell a library by the first part of its modules' names.
ViT.__module__ = "detectron2.modeling.backbone.vit"


# ---- DINOv2's ViT ----------------------------------------------------------------------------


class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class MemEffAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.proj(out.transpose(1, 2).flatten(2))


class DinoBlock(nn.Module):
    """NestedTensorBlock, without lists of tensors and stochastic depth."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = MemEffAttention(dim, num_heads), Mlp(dim)
        self.ls1, self.ls2 = LayerScale(dim), LayerScale(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class BlockChunk(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x


class DinoPatchEmbed(nn.Module):
    def __init__(self, img_size: int, patch_size: int, dim: int) -> None:
        super().__init__()
        self.img_size, self.patch_size = (img_size, img_size), (patch_size, patch_size)
        self.patches_resolution = (img_size // patch_size, img_size // patch_size)
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class DinoVisionTransformer(nn.Module):
    """Blocks in a list, or in chunks that begin with an Identity for each block before."""

    def __init__(
        self,
        img_size: int = 24,
        patch_size: int = 4,
        embed_dim: int = 16,
        depth: int = 4,
        num_heads: int = 2,
        block_chunks: int = 0,
        num_register_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.patch_size, self.first = patch_size, 1 + num_register_tokens
        if num_register_tokens:  # without, as it was before there were registers
            self.num_register_tokens = num_register_tokens
        self.patch_embed = DinoPatchEmbed(img_size, patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        places = 1 + (img_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, places, embed_dim))
        self.register_tokens = (
            nn.Parameter(torch.zeros(1, num_register_tokens, embed_dim))
            if num_register_tokens
            else None
        )
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))
        blocks: list[nn.Module] = [DinoBlock(embed_dim, num_heads) for _ in range(depth)]
        self.chunked_blocks = block_chunks > 0
        if self.chunked_blocks:
            size = depth // block_chunks
            self.blocks = nn.ModuleList(
                BlockChunk([nn.Identity()] * i + blocks[i : i + size])
                for i in range(0, depth, size)
            )
        else:
            self.blocks = nn.ModuleList(blocks)
        self.norm, self.head = nn.LayerNorm(embed_dim), nn.Identity()

    def interpolate_pos_encoding(self, x: Tensor, rows: int, columns: int) -> Tensor:
        side = self.patch_embed.patches_resolution
        maps = self.pos_embed[:, 1:].unflatten(1, side).permute(0, 3, 1, 2).float()
        maps = F.interpolate(maps, (rows, columns), mode="bicubic")
        places = maps.flatten(2).transpose(1, 2).to(x.dtype)
        return torch.cat([self.pos_embed[:, :1].to(x.dtype), places], 1)

    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        rows, columns = (side // self.patch_size for side in x.shape[2:])
        x = self.patch_embed(x)
        if masks is not None:
            x = torch.where(masks[..., None], self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
        x = x + self.interpolate_pos_encoding(x, rows, columns)
        if self.register_tokens is not None:
            registers = self.register_tokens.expand(x.shape[0], -1, -1)
            x = torch.cat([x[:, :1], registers, x[:, 1:]], 1)
        return x

    def forward_features(self, x: Tensor, masks: Tensor | None = None) -> dict[str, Any]:
        x = self.prepare_tokens_with_masks(x, masks)
        for block in self.blocks:
            x = block(x)
        normed = self.norm(x)
        return {
            "x_norm_clstoken": normed[:, 0],
            "x_norm_regtokens": normed[:, 1 : self.first],
            "x_norm_patchtokens": normed[:, self.first :],
            "x_prenorm": x,
            "masks": masks,
        }

    def get_intermediate_layers(self, x: Tensor, n: Sequence[int]) -> list[Tensor]:
        """Normalised outputs of the blocks of these numbers, without prefix tokens."""
        x, seen = self.prepare_tokens_with_masks(x), []
        for chunk in self.blocks if self.chunked_blocks else [self.blocks]:
            for block in list(chunk)[len(seen) :]:
                x = block(x)
                seen.append(x)
        return [self.norm(seen[i])[:, self.first :] for i in n]

    def forward(self, x: Tensor, masks: Tensor | None = None, is_training: bool = False) -> Any:
        features = self.forward_features(x, masks)
        return features if is_training else self.head(features["x_norm_clstoken"])

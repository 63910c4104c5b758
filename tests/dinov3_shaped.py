"""A small encoder in the shape of DINOv3's own, whose library is in no package registry.

The same classes, attributes, parameter names and calls between the parts, as far as an adapter can
see them, in lines of our own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from official_shaped import DinoPatchEmbed, LayerScale, Mlp
from torch import Tensor, nn

Rope = tuple[Tensor, Tensor]


class RopePositionEmbedding(nn.Module):
    """(sin, cos) of the patches' centres, which are -1 ... 1; moved at random in training."""

    periods: Tensor

    def __init__(self, head: int) -> None:
        super().__init__()
        self.register_buffer("periods", 100 ** (torch.arange(head // 4) / (head // 4)))

    def forward(self, *, H: int, W: int) -> Rope:
        rows, columns = (2 * (torch.arange(side) + 0.5) / side - 1 for side in (H, W))
        places = torch.cartesian_prod(rows, columns).to(self.periods.device)
        if self.training:
            places = places * (1 + torch.rand(1, device=places.device))
        angles = (2 * math.pi * places[..., None] / self.periods).flatten(1).tile(2)
        return angles.sin(), angles.cos()


class SelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, attn_bias: None = None, rope: Rope | None = None) -> Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if rope is not None:
            query, key = (self.rotated(part, *rope).to(value.dtype) for part in (query, key))
        out = F.scaled_dot_product_attention(query, key, value)
        return self.proj(out.transpose(1, 2).flatten(2))

    def rotated(self, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        prefix, rest = x.split([x.shape[-2] - sin.shape[-2], sin.shape[-2]], -2)
        first, second = rest.chunk(2, -1)
        rest = rest * cos + torch.cat([-second, first], -1) * sin
        return torch.cat([prefix.to(rest.dtype), rest], -2)


class SelfAttentionBlock(nn.Module):
    """Takes and gives a tensor, or a list of them with a list of their positions."""

    def __init__(self, dim: int, num_heads: int, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = SelfAttention(dim, num_heads), Mlp(dim)
        self.ls1, self.ls2 = LayerScale(dim), LayerScale(dim)
        self.sample_drop_ratio = drop_path

    def forward(self, x_or_x_list: Any, rope_or_rope_list: Any = None) -> Any:
        if isinstance(x_or_x_list, list):
            return [self.one(*pair) for pair in zip(x_or_x_list, rope_or_rope_list, strict=True)]
        return self.one(x_or_x_list, rope_or_rope_list)

    def one(self, x: Tensor, rope: Rope | None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), rope=rope))
        return x + self.ls2(self.mlp(self.norm2(x)))


class DinoVisionTransformer(nn.Module):
    def __init__(
        self,
        img_size: int = 32,
        patch_size: int = 4,
        embed_dim: int = 16,
        depth: int = 4,
        num_heads: int = 2,
        n_storage_tokens: int = 2,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.patch_size, self.n_storage_tokens = patch_size, n_storage_tokens
        self.patch_embed = DinoPatchEmbed(img_size, patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.storage_tokens = nn.Parameter(torch.zeros(1, n_storage_tokens, embed_dim))
        self.rope_embed = RopePositionEmbedding(embed_dim // num_heads)
        self.chunked_blocks = False
        self.blocks = nn.ModuleList(
            SelfAttentionBlock(embed_dim, num_heads, drop_path_rate) for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(embed_dim), nn.Identity()

    def prepare_tokens_with_masks(
        self, x: Tensor, masks: None = None
    ) -> tuple[Tensor, tuple[int, int]]:
        rows, columns = (side // self.patch_size for side in x.shape[2:])
        first = torch.cat([self.cls_token, self.storage_tokens], 1).expand(x.shape[0], -1, -1)
        return torch.cat([first, self.patch_embed(x)], 1), (rows, columns)

    def forward_features(self, x: Tensor | list[Tensor]) -> Any:
        images = x if isinstance(x, list) else [x]
        tokens, grids = map(list, zip(*map(self.prepare_tokens_with_masks, images), strict=True))
        for block in self.blocks:
            tokens = block(tokens, [self.rope_embed(H=rows, W=columns) for rows, columns in grids])
        outputs = [{"x_norm": self.norm(out), "x_prenorm": out} for out in tokens]
        return outputs if isinstance(x, list) else outputs[0]

    def get_intermediate_layers(self, x: Tensor, n: Sequence[int]) -> list[Tensor]:
        """Normalised outputs of the blocks of these numbers, without prefix tokens."""
        (x, (rows, columns)), seen = self.prepare_tokens_with_masks(x), []
        for block in self.blocks:
            x = block(x, self.rope_embed(H=rows, W=columns))
            seen.append(x)
        return [self.norm(seen[i])[:, 1 + self.n_storage_tokens :] for i in n]

    def forward(self, x: Tensor | list[Tensor], is_training: bool = False) -> Any:
        features = self.forward_features(x)
        return features if is_training else self.head(features["x_norm"][:, 0])

"""Segmenter's two decoders, which compute class logits of each token of an image."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expedite_d2.d2.modeling.lazy_timm import import_timm

_INIT_STD = 0.02  # of every linear layer and embedding, as in Segmenter


class LinearDecoder(nn.Module):
    """A linear classifier of each token.

    Args:
        num_classes: K.
        in_channels: C of the tokens.
    """

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.head = nn.Linear(in_channels, num_classes)
        self.apply(_init_weights)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, K)."""
        return self.head(tokens)


class MaskDecoder(nn.Module):
    """Mask transformer: tokens and one learnt embedding per class attend to each other.

    The logit of a token for a class is the cosine of their outputs, normalised over classes.

    Args:
        num_classes: K.
        in_channels: C of the tokens.
        dim: width of the decoder.
        depth: number of blocks.
        num_heads: heads of their attention.
        mlp_ratio: width of hidden layers, relative to ``dim``.
        dropout: probability of dropping an activation or an attention weight.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        dropout: float,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.proj_dec = nn.Linear(in_channels, dim)
        self.cls_emb = nn.Parameter(torch.empty(1, num_classes, dim))
        block = import_timm().models.vision_transformer.Block
        self.blocks = nn.Sequential(
            *(
                block(
                    dim,
                    num_heads,
                    mlp_ratio,
                    qkv_bias=True,
                    proj_drop=dropout,
                    attn_drop=dropout,
                    drop_path=drop_path_rate * index / max(depth - 1, 1),
                    norm_layer=nn.LayerNorm,
                )
                for index in range(depth)
            )
        )
        self.decoder_norm = nn.LayerNorm(dim)
        self.proj_patch = nn.Parameter(torch.randn(dim, dim) * dim**-0.5)
        self.proj_classes = nn.Parameter(torch.randn(dim, dim) * dim**-0.5)
        self.mask_norm = nn.LayerNorm(num_classes)
        self.apply(_init_weights)
        nn.init.trunc_normal_(self.cls_emb, std=_INIT_STD)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, K)."""
        batch, height, width, _ = tokens.shape
        x = self.proj_dec(tokens).flatten(1, 2)  # (B, N, dim)
        x = torch.cat([x, self.cls_emb.expand(batch, -1, -1)], dim=1)  # (B, N + K, dim)
        x = self.decoder_norm(self.blocks(x))
        patches = x[:, : -self.num_classes] @ self.proj_patch
        classes = x[:, -self.num_classes :] @ self.proj_classes
        masks = F.normalize(patches, dim=-1) @ F.normalize(classes, dim=-1).transpose(1, 2)
        return self.mask_norm(masks).unflatten(1, (height, width))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=_INIT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

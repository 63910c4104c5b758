"""The expensive parts of Mask2Former's transformer decoder, without computing unused outputs.

Each layer attends to the pixels of the mask that the layer before predicted. transformers predicts
that mask at full size and resizes it, copies it for each head, and returns attention weights.
Resizing commutes with the product with the queries: here the features are resized instead, and a
mask at full size is computed only on request.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerMaskPredictor,
    Mask2FormerTransformerModule,
)

from expedite_d2.d2.modeling.upcast import upcast_product


def predict_masks(embeddings: Tensor, features: Tensor) -> Tensor:
    """Returns mask logits of queries (B, Q, C) on features (B, C, h, w): (B, Q, h, w)."""
    masks = upcast_product(
        lambda queries, maps, _: queries @ maps, embeddings, features.flatten(2), None
    )
    return masks.unflatten(2, features.shape[2:])


class MaskPredictor(Mask2FormerMaskPredictor):
    """transformers' module and parameters; returns the arguments of `predict_masks`, not masks."""

    # transformers annotates the size as an int.
    def forward(  # type: ignore[override]
        self,
        outputs: Tensor,
        pixel_embeddings: Tensor,
        attention_mask_target_size: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """Predicts the masks of a layer's queries.

        Args:
            outputs: (Q, B, C), the queries.
            pixel_embeddings: (B, C', H/4, W/4), the mask features.
            attention_mask_target_size: rows and columns that the next layer attends to.

        Returns:
            the queries' mask embeddings (B, Q, C'), and (B, Q, h * w), True where the next layer
            must not attend.
        """
        embeddings = self.mask_embedder(outputs.transpose(0, 1))
        with torch.no_grad():
            resized = F.interpolate(
                pixel_embeddings, attention_mask_target_size, mode="bilinear", align_corners=False
            )
            logits = predict_masks(embeddings, resized).flatten(2)
        return embeddings, logits < 0


class MaskedAttention(nn.MultiheadAttention):
    """PyTorch's module and parameters, through ``scaled_dot_product_attention``."""

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **_: Any
    ) -> tuple[Tensor, None]:
        """Attends to the pixels that a mask leaves.

        Args:
            query: (Q, B, C).
            key, value: (S, B, C).
            attn_mask: (B, Q, S), True where a query must not attend.

        Returns:
            (Q, B, C), and None instead of the weights.
        """
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        queries, keys, values = (
            upcast_product(F.linear, x, weight, bias)
            .unflatten(2, (self.num_heads, self.head_dim))
            .permute(1, 2, 0, 3)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        attended = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=attn_mask.logical_not()[:, None],
            dropout_p=self.dropout if self.training else 0.0,
        )
        attended = attended.permute(2, 0, 1, 3).flatten(2)
        return upcast_product(F.linear, attended, self.out_proj.weight, self.out_proj.bias), None


def use_mask_embeddings(module: Mask2FormerTransformerModule) -> None:
    """Replaces classes in a decoder by these; its output then holds mask embeddings, not masks.

    Names and weights stay.
    """
    decoder: Any = module.decoder
    # The instances keep their weights: new modules would draw initial weights again.
    decoder.mask_predictor.__class__ = MaskPredictor
    for layer in decoder.layers:
        layer.cross_attn.__class__ = MaskedAttention

"""Tiny random Swins: their blocks attend within windows of a map, some of them in shifted ones."""

from __future__ import annotations

from typing import Any

import torch
from official_shaped import SwinTransformer
from torch import Tensor, nn
from transformers import (
    MaskFormerSwinConfig,
    SwinConfig,
    SwinModel,
    Swinv2Config,
    Swinv2Model,
)
from transformers.models.maskformer.modeling_maskformer_swin import MaskFormerSwinModel

from family_cases.case import Case, randomised


class SwinCase(Case):
    size = (104, 150)  # 7x10 tokens in the third stage: ragged windows
    alpha, clusters = 4, (4, 4)
    others = [(96, 96), (70, 134)]

    def blocks(self, model: Any) -> list[nn.Module]:
        return [block for stage in model.layers for block in stage.blocks]

    def run(self, model: Any, x: Tensor) -> Tensor:
        return model(x)["res4"]


SWIN = {"embed_dim": 16, "depths": [1, 1, 6, 1], "num_heads": [1, 2, 2, 4], "window_size": 6}


class TransformersSwinCase(SwinCase):
    def blocks(self, model: Any) -> list[nn.Module]:
        return [block for stage in model.encoder.layers for block in stage.blocks]

    def run(self, model: Any, x: Tensor) -> Tensor:
        return model(x).last_hidden_state


class SwinModelCase(TransformersSwinCase):
    def run(self, model: Any, x: Tensor) -> Tensor:
        # As backbones call it: its windows are then no smaller on a small map.
        return model(x, always_partition=True).last_hidden_state


def transformers_swin(model: Any, config: Any, **changes: Any) -> Any:
    # Windows of SwinV2 are no larger than a stage's map of the configured image.
    settings = {**SWIN, "image_size": 768, "drop_path_rate": 0.0, **changes}
    model = randomised(model, config(**settings), add_pooling_layer=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "relative_position" not in name:
                parameter.mul_(0.6)  # or tokens have other nearest centres in half types
    return model


CASES: dict[str, Case] = {
    "official swin": SwinCase(lambda: randomised(SwinTransformer)),
    "transformers swin": SwinModelCase(lambda: transformers_swin(SwinModel, SwinConfig)),
    "transformers swin, eager": SwinModelCase(
        lambda: transformers_swin(SwinModel, SwinConfig, attn_implementation="eager")
    ),
    "transformers maskformer swin": TransformersSwinCase(
        lambda: transformers_swin(MaskFormerSwinModel, MaskFormerSwinConfig)
    ),
    "transformers swin v2": TransformersSwinCase(
        lambda: transformers_swin(Swinv2Model, Swinv2Config, pretrained_window_sizes=[0, 0, 4, 0]),
        # Padding makes NaN of transformers' own SwinV2 in float16.
        size=(192, 192),
        others=[(104, 150), (70, 134)],
    ),
}

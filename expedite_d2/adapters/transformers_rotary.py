"""transformers' DINOv3 and Sapiens2, alone or in a model for a task."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from expedite_d2.adapters.family import Family, Size
from expedite_d2.adapters.registry import register_family
from expedite_d2.adapters.rotary import Rotary
from expedite_d2.adapters.tokens import GridFromCall, TokenSequence
from expedite_d2.adapters.transformers import configured_grid, is_eager, sides


def _grid(encoder: Any, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Size:
    rows, columns = sides(encoder.config.patch_size)
    return pixel_values.shape[-2] // rows, pixel_values.shape[-1] // columns


DINOV3 = register_family(
    Family(
        name="transformers DINOv3ViTModel",
        library="transformers",
        classes=("DINOv3ViTModel", "DINOv3ViTBackbone"),
        blocks=lambda encoder: list(encoder.model.layer),
        tokens=TokenSequence(lambda encoder: 1 + encoder.config.num_register_tokens),
        grid=GridFromCall(
            # Where the image becomes a sequence.
            place=lambda encoder, span: (encoder.embeddings, "forward"),
            read=_grid,
            configured=configured_grid,
        ),
        positions=Rotary("position_embeddings"),
        image_size=lambda encoder: sides(encoder.config.image_size),
        attention=lambda layer: (layer.norm1, layer.attention),
        eager=is_eager,
    )
)
SAPIENS2 = register_family(
    replace(
        DINOV3,
        name="transformers Sapiens2Model",
        classes=("Sapiens2Model", "Sapiens2Backbone"),
    )
)

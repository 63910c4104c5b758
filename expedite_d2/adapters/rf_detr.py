"""transformers' RF-DETR, whose windows lie side by side in the batch, each with its class token.

To the reduction each window is an image. Layers of global attention join the windows of an image
for their attention, whatever the number of tokens in each.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from expedite_d2.adapters.family import Attention, Family, Size
from expedite_d2.adapters.registry import register_family
from expedite_d2.adapters.tokens import GridFromCall, TokenSequence
from expedite_d2.adapters.transformers import configured_grid, sides


def _of_window(encoder: Any, grid: Size) -> Size:
    windows = encoder.config.num_windows
    return grid[0] // windows, grid[1] // windows


def _grid(encoder: Any, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Size:
    rows, columns = sides(encoder.config.patch_size)
    grid = pixel_values.shape[-2] // rows, pixel_values.shape[-1] // columns
    return _of_window(encoder, grid)


def _attention(layer: Any) -> Attention | None:
    # In layers of global attention, the norm takes the joined windows.
    return None if layer.global_attention else (layer.norm1, layer.attention)


RF_DETR = register_family(
    Family(
        name="transformers RfDetrDinov2Backbone",
        library="transformers",
        classes=("RfDetrDinov2Backbone",),
        blocks=lambda encoder: list(encoder.encoder.layer),
        tokens=TokenSequence(),
        grid=GridFromCall(
            # Where the image becomes sequences.
            place=lambda encoder, span: (encoder.embeddings, "forward"),
            read=_grid,
            configured=lambda encoder: _of_window(encoder, configured_grid(encoder)),
        ),
        image_size=lambda encoder: sides(encoder.config.image_size),
        attention=_attention,
    )
)

"""transformers' windowed ViTs of maps: those of SAM, SAM-HQ and SAM 3, and ViTDet."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from expedite_d2.adapters.decomposed import DecomposedPositions
from expedite_d2.adapters.family import BlockCall, Size
from expedite_d2.adapters.map_windows import MapWindows, Spacing
from expedite_d2.adapters.registry import register_family
from expedite_d2.adapters.transformers import is_eager, sides
from expedite_d2.reducers import Reduction


def _image_size(encoder: Any) -> Size:
    return sides(encoder.config.image_size)


def _run(encoder: Any, images: Tensor) -> Any:
    # That of a model for matting takes a fourth channel, and whatever is in it costs the same.
    channels = [channel % 3 for channel in range(encoder.config.num_channels)]
    return encoder(images[:, channels])


SAM = DecomposedPositions(blocks=lambda encoder: encoder.layers).family(
    name="transformers SamVisionEncoder",
    library="transformers",
    classes=("SamVisionEncoder",),
    image_size=_image_size,
    attention=lambda layer: (layer.layer_norm1, layer.attn),
    # Each implementation of attention is a class of its own.
    eager=lambda encoder: "Sdpa" not in type(encoder.layers[0].attn).__name__,
)
SAM_HQ = replace(SAM, name="transformers SamHQVisionEncoder", classes=("SamHQVisionEncoder",))
VITDET = DecomposedPositions(
    blocks=lambda encoder: encoder.encoder.layer,
    attention="attention",
    returns=lambda out: (out,),
).family(
    name="transformers VitDetModel and VitDetBackbone",
    library="transformers",
    classes=("VitDetModel", "VitDetBackbone"),
    channels_first=True,
    image_size=_image_size,
    run=_run,
    attention=lambda layer: (layer.norm1, layer.attention),
    eager=lambda encoder: True,
)


class _RotaryPositions(MapWindows):
    """Rotary positions at the centres of the clusters, which each layer of SAM 3 holds as a buffer.

    They count tokens in windows; in global layers, all rows of the configured image are as many as
    those of one window.
    """

    kind = "rotary"

    def check(self, encoder: Any, reduction: Reduction) -> None:
        """Refuses oblong grids of clusters in windows, and oblong images."""
        super().check(encoder, reduction)
        height, width = _image_size(encoder)
        if height != width:
            raise ValueError(
                f"image_size of {type(encoder).__name__} must be square, got {height}x{width}: "
                "its global layers have the positions of columns and rows exchanged"
            )

    def between(self, call: BlockCall, spacing: Spacing) -> dict[str, Any]:
        """The positions of the layer, columns before rows: (N, 2)."""
        layer: Any = call.block.owner
        scale = 1.0
        if not layer.window_size:
            config = call.encoder.config
            scale = config.window_size / (
                sides(config.image_size)[0] // sides(config.patch_size)[0]
            )
        axes = []
        for cells, tokens, clusters in zip(
            spacing.cells, spacing.square, spacing.clusters, strict=True
        ):
            centre = torch.arange(cells, device=call.x.device) + 0.5
            axes.append((centre * (tokens / clusters) - 0.5) * scale)
        return {"position_ids": torch.cartesian_prod(*axes).flip(-1)}


SAM_3 = _RotaryPositions(blocks=lambda encoder: encoder.layers).family(
    name="transformers Sam3ViTModel",
    library="transformers",
    classes=("Sam3ViTModel",),
    image_size=_image_size,
    attention=lambda layer: (layer.layer_norm1, layer.attention),
    eager=is_eager,
)

for _family in (SAM, SAM_HQ, VITDET, SAM_3):
    register_family(_family)

"""timm's VisionTransformerSAM, the image encoder of Segment Anything."""

from __future__ import annotations

from typing import Any

from expedite_d2.adapters.decomposed import DecomposedPositions
from expedite_d2.adapters.family import Size
from expedite_d2.adapters.registry import register_family


def _image_size(encoder: Any) -> Size:
    height, width = encoder.patch_embed.img_size
    return height, width


VISION_TRANSFORMER_SAM = register_family(
    DecomposedPositions(blocks=lambda encoder: encoder.blocks).family(
        name="timm VisionTransformerSAM",
        library="timm",
        classes=("VisionTransformerSAM",),
        # Rotary positions, which no pretrained model has.
        matches=lambda encoder: encoder.rope_global is None,
        image_size=_image_size,
        attention=lambda block: (block.norm1, block.attn),
        eager=lambda encoder: not encoder.blocks[0].attn.fused_attn,
    )
)

"""Segment Anything's own ImageEncoderViT, whose file SAM-HQ, MedSAM and others have a copy of."""

from __future__ import annotations

from typing import Any

from torch import nn

from expedite_d2.adapters.decomposed import DecomposedPositions
from expedite_d2.adapters.registry import register_family


def _has_windows(encoder: Any) -> bool:
    # EfficientSAM's class of this name is a plain ViT.
    blocks = getattr(encoder, "blocks", None)
    return isinstance(blocks, nn.ModuleList) and all(
        hasattr(block, "window_size") and hasattr(getattr(block, "attn", None), "use_rel_pos")
        for block in blocks
    )


IMAGE_ENCODER = register_family(
    DecomposedPositions(
        blocks=lambda encoder: encoder.blocks,
        returns=lambda out: out,
    ).family(
        name="Segment Anything ImageEncoderViT",
        library="",
        classes=("ImageEncoderViT",),
        matches=_has_windows,
        image_size=lambda encoder: (encoder.img_size, encoder.img_size),
        attention=lambda block: (block.norm1, block.attn),
        eager=lambda encoder: True,
    )
)

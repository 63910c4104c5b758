"""Detectron2's ViT (ViTDet)."""

from __future__ import annotations

from expedite_d2.adapters.decomposed import DecomposedPositions
from expedite_d2.adapters.registry import register_family

VIT = register_family(
    DecomposedPositions(
        blocks=lambda encoder: encoder.blocks,
        returns=lambda out: out,
    ).family(
        name="Detectron2 ViT",
        library="detectron2",
        classes=("ViT",),
        inside=False,
        attention=lambda block: (block.norm1, block.attn),
        eager=lambda encoder: True,
    )
)

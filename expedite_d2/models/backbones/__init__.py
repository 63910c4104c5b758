"""Backbones of `BACKBONE_REGISTRY` that may run their last blocks on clusters of tokens."""

from __future__ import annotations

from expedite_d2.models.backbones.expedited import ExpeditedBackbone
from expedite_d2.models.backbones.fpn import build_expedited_fpn_backbone
from expedite_d2.models.backbones.swin import ExpeditedSwinTransformer
from expedite_d2.models.backbones.vit import ExpeditedViT

__all__ = [
    "ExpeditedBackbone",
    "ExpeditedSwinTransformer",
    "ExpeditedViT",
    "build_expedited_fpn_backbone",
]

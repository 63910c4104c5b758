"""Backbones of `BACKBONE_REGISTRY` that may run their last blocks on clusters of tokens."""

from __future__ import annotations

from expedite_d2.d2.modeling.backbone.expedited import ExpeditedBackbone
from expedite_d2.d2.modeling.backbone.fpn import build_expedited_fpn_backbone
from expedite_d2.d2.modeling.backbone.swin import ExpeditedSwinTransformer
from expedite_d2.d2.modeling.backbone.vit import ExpeditedViT

__all__ = [
    "ExpeditedBackbone",
    "ExpeditedSwinTransformer",
    "ExpeditedViT",
    "build_expedited_fpn_backbone",
]

"""Backbones of `BACKBONE_REGISTRY` that may run their last blocks on clusters of tokens."""

from __future__ import annotations

from expedite_d2.models.backbones.swin import ExpeditedSwinTransformer

__all__ = ["ExpeditedSwinTransformer"]

"""Expediting third-party models: the last blocks of their encoder run on clusters of its tokens.

Their classes are recognised by name, so importing this package imports no other library.
"""

from __future__ import annotations

from expedite_d2.adapters import (  # noqa: F401 (registration)
    data2vec,
    detectron2,
    dinov2,
    dinov3,
    eomt,
    rf_detr,
    segment_anything,
    swin,
    timm,
    timm_eva,
    timm_sam,
    timm_swin,
    torchvision,
    torchvision_swin,
    transformers,
    transformers_rotary,
    transformers_swin,
    transformers_windows,
    yolos,
)
from expedite_d2.adapters.core import expect_module, expedite, is_expedited, remember, restore
from expedite_d2.adapters.family import Family
from expedite_d2.adapters.registry import families, register_family
from expedite_d2.reducers import clustering_of

__all__ = [
    "Family",
    "clustering_of",
    "expect_module",
    "expedite",
    "families",
    "is_expedited",
    "register_family",
    "remember",
    "restore",
]

"""Backbones and meta-architectures; importing this registers them with Detectron2."""

from __future__ import annotations

from expedite_d2.d2.modeling import backbone as backbones
from expedite_d2.d2.modeling import meta_arch

__all__ = ["backbones", "meta_arch"]

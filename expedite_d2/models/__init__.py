"""Backbones and meta-architectures; importing this fills Detectron2's registries with them."""

from __future__ import annotations

from expedite_d2.models import backbones, meta_arch

__all__ = ["backbones", "meta_arch"]

"""Backbones and meta-architectures; importing this registers them with Detectron2."""

from __future__ import annotations

from expedite_d2.models import backbones, meta_arch

__all__ = ["backbones", "meta_arch"]

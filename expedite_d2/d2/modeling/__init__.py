"""Backbones and meta-architectures; importing this registers them with Detectron2."""

from __future__ import annotations

from expedite_d2.d2.modeling import backbone, meta_arch

__all__ = ["backbone", "meta_arch"]

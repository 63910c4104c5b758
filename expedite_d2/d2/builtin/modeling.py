"""Registries of backbones and whole models, and what a backbone promises."""

from __future__ import annotations

from abc import ABCMeta, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from fvcore.common.registry import Registry
from torch import nn

from expedite_d2.d2.builtin.config import CfgNode

# name -> callable (cfg, input ShapeSpec) that returns a Backbone
BACKBONE_REGISTRY = Registry("BACKBONE")
# name -> callable (cfg) that returns the whole model
META_ARCH_REGISTRY = Registry("META_ARCH")


@dataclass
class ShapeSpec:
    """What is known of a feature map before any image is seen; None where it depends on it."""

    channels: int | None = None
    height: int | None = None
    width: int | None = None
    stride: int | None = None


class Backbone(nn.Module, metaclass=ABCMeta):
    """A network that turns images into named feature maps."""

    # Set by a subclass that does not define output_shape() itself.
    _out_features: list[str]
    _out_feature_channels: dict[str, int]
    _out_feature_strides: dict[str, int]

    def __init__(self) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Return the feature maps by name, e.g. ``{"res2": (B, C, H/4, W/4), …}``."""

    @property
    def size_divisibility(self) -> int:
        """What the height and width of the input must be multiples of; 0 for no such demand."""
        return 0

    @property
    def padding_constraints(self) -> dict[str, int]:
        """How to pad the input: optionally ``size_divisibility`` and ``square_size``."""
        return {}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of every feature map that ``forward`` returns."""
        return {
            name: ShapeSpec(
                channels=self._out_feature_channels[name], stride=self._out_feature_strides[name]
            )
            for name in self._out_features
        }


def build_backbone(cfg: CfgNode, input_shape: ShapeSpec | None = None) -> Backbone:
    """Build the backbone that ``MODEL.BACKBONE.NAME`` names.

    Args:
        cfg: the whole config.
        input_shape: shape of the images; by default, as many channels as ``MODEL.PIXEL_MEAN``.
    """
    if input_shape is None:
        input_shape = ShapeSpec(channels=len(cfg.MODEL.PIXEL_MEAN))
    name = cfg.MODEL.BACKBONE.NAME
    backbone = BACKBONE_REGISTRY.get(name)(cfg, input_shape)
    if not isinstance(backbone, Backbone):
        raise TypeError(f"{name} must build a Backbone, got {type(backbone).__name__}")
    return backbone


def build_model(cfg: CfgNode) -> nn.Module:
    """Build the model that ``MODEL.META_ARCHITECTURE`` names on ``MODEL.DEVICE``; loads nothing."""
    model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    return model.to(torch.device(cfg.MODEL.DEVICE))

"""Semantic segmentation on a feature pyramid: the heads of Panoptic FPN and of HTC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import Conv2dNormActivation

from expedite_d2.d2.modeling.backbone.fpn import GROUPS, normalisation
from expedite_d2.d2.modeling.backbone.settings import check_features
from expedite_d2.d2.modeling.meta_arch.losses import semantic_loss
from expedite_d2.d2.provider import CfgNode, ShapeSpec


class _SemanticHead(nn.Module):
    """Base of both heads: the keys of ``MODEL.SEM_SEG_HEAD``, and the loss."""

    def __init__(self, cfg: CfgNode, shapes: Mapping[str, ShapeSpec]) -> None:
        super().__init__()
        head = cfg.MODEL.SEM_SEG_HEAD
        check_features("MODEL.SEM_SEG_HEAD.IN_FEATURES", head.IN_FEATURES, shapes)
        norm = normalisation(head.NORM, "MODEL.SEM_SEG_HEAD.NORM")
        if norm is not None and head.CONVS_DIM % GROUPS:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.CONVS_DIM must be a multiple of {GROUPS} (the groups of "
                f"GroupNorm), got {head.CONVS_DIM}"
            )
        self.in_features = list(head.IN_FEATURES)
        self.stride = head.COMMON_STRIDE
        self.ignore_value = head.IGNORE_VALUE
        self.weight = head.LOSS_WEIGHT
        self.norm = norm
        self.predictor = nn.Conv2d(head.CONVS_DIM, head.NUM_CLASSES, 1)

    def loss(
        self, logits: Tensor, batched_inputs: Sequence[Mapping[str, Any]], size: tuple[int, int]
    ) -> Tensor:
        """Returns the weighted cross-entropy of logits (B, K, H/s, W/s) against ``"sem_seg"``."""
        return self.weight * semantic_loss(logits.float(), batched_inputs, size, self.ignore_value)


class SemanticFPN(_SemanticHead):
    """Panoptic FPN's head: all levels are convolved and upsampled to one stride, added, classified.

    "Panoptic Feature Pyramid Networks", arXiv 1901.02446, with Detectron2's ``SemSegFPNHead`` keys.

    Args:
        cfg: ``MODEL.SEM_SEG_HEAD``.
        shapes: channels and stride of the pyramid's maps.
    """

    def __init__(self, cfg: CfgNode, shapes: Mapping[str, ShapeSpec]) -> None:
        super().__init__(cfg, shapes)
        width = cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM
        finest = min(shapes[name].stride or 0 for name in self.in_features)
        if finest % self.stride:
            raise ValueError(
                "MODEL.SEM_SEG_HEAD.COMMON_STRIDE must divide the strides of its IN_FEATURES, "
                f"{finest} and more, got {self.stride}"
            )
        self.scales = nn.ModuleList()
        for name in self.in_features:
            ratio = (shapes[name].stride or 1) // self.stride
            layers: list[nn.Module] = []
            channels = shapes[name].channels or 0
            for _ in range(max(ratio.bit_length() - 1, 1)):
                layers.append(Conv2dNormActivation(channels, width, norm_layer=self.norm))
                if ratio > 1:
                    layers.append(nn.Upsample(scale_factor=2, mode="bilinear"))
                channels = width
            self.scales.append(nn.Sequential(*layers))
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module is not self.predictor:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """The pyramid's maps -> logits (B, K, H/s, W/s) at ``COMMON_STRIDE``."""
        levels = [
            scale(features[name]) for name, scale in zip(self.in_features, self.scales, strict=True)
        ]
        return self.predictor(torch.stack(levels).sum(0))


class SemanticBranch(_SemanticHead):
    """HTC's head: all levels are resized to one and convolved, for logits and for regions.

    Args:
        cfg: ``MODEL.SEM_SEG_HEAD`` and ``MODEL.HTC.SEMANTIC_CONVS``.
        shapes: channels and stride of the pyramid's maps.
    """

    def __init__(self, cfg: CfgNode, shapes: Mapping[str, ShapeSpec]) -> None:
        super().__init__(cfg, shapes)
        width = cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM
        strides = [shapes[name].stride for name in self.in_features]
        if self.stride not in strides:
            raise ValueError(
                "MODEL.SEM_SEG_HEAD.COMMON_STRIDE must be the stride of one of its IN_FEATURES, "
                f"{strides}, got {self.stride}"
            )
        self.fused = strides.index(self.stride)
        channels = shapes[self.in_features[0]].channels or 0
        self.laterals = nn.ModuleList(
            Conv2dNormActivation(channels, width, 1, norm_layer=self.norm) for _ in self.in_features
        )
        self.convs = nn.Sequential(
            *(
                Conv2dNormActivation(width, width, norm_layer=self.norm)
                for _ in range(cfg.MODEL.HTC.SEMANTIC_CONVS)
            )
        )
        self.embedding = Conv2dNormActivation(width, channels, 1, norm_layer=None)
        for module in [*self.laterals.modules(), *self.convs.modules()]:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The pyramid's maps -> hidden (B, D, H/s, W/s), and (B, C, …) to add to regions."""
        maps = [features[name] for name in self.in_features]
        size = maps[self.fused].shape[-2:]
        hidden = [
            F.interpolate(lateral(level), size=size, mode="bilinear", align_corners=False)
            for lateral, level in zip(self.laterals, maps, strict=True)
        ]
        shared = self.convs(torch.stack(hidden).sum(0))
        return shared, self.embedding(shared)

"""timm's Eva: EVA02, DINOv3, Perception Encoder, and further ViTs with rotary positions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from expedite_d2.adapters.family import Size
from expedite_d2.adapters.registry import register_family
from expedite_d2.adapters.rotary import Rotary
from expedite_d2.adapters.timm import VISION_TRANSFORMER, grid_of_patches, refuse_patch_dropout


def _grid(encoder: Any, x: Tensor) -> Size:
    refuse_patch_dropout(encoder)
    return grid_of_patches(encoder, x)


EVA = register_family(
    replace(
        VISION_TRANSFORMER,
        name="timm Eva",
        classes=("Eva",),
        grid=replace(VISION_TRANSFORMER.grid, read=_grid, onto=lambda out: out[0]),  # type: ignore[arg-type]
        positions=Rotary("rope"),
    )
)

"""timm's Swin (also Swin-S3) and SwinV2, whole or as a network of features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expedite_d2.adapters.attention import attend_by_direction, for_batch, split_heads
from expedite_d2.adapters.family import BlockCall, Size
from expedite_d2.adapters.override import Override
from expedite_d2.adapters.registry import register_family
from expedite_d2.adapters.relative_position import continuous_bias
from expedite_d2.adapters.shifted_windows import ShiftedWindows, Windows, table_between

_STAGES = ("SwinTransformerStage", "SwinTransformerV2Stage")


def _run_in(call: BlockCall, windows: Windows) -> Tensor:
    changes = {
        "window_size": windows.sides,
        "window_area": math.prod(windows.sides),
        "shift_size": windows.shifts,
        # Instead of the mask for tokens, whether it is kept or made in each forward.
        "dynamic_mask": False,
        "attn_mask": windows.mask(call.cells, call.x),
    }
    return call.block.original_with(changes, call.x)


def _shifts(call: BlockCall, window: Size) -> Sequence[bool]:
    # timm has decided where one window covers a stage's map of the configured image.
    block: Any = call.block.owner
    return [shift > 0 for shift in block.shift_size]


def _attend(attention: Override, cells: Size, x: Tensor, mask: Tensor | None = None) -> Tensor:
    owner: Any = attention.owner
    if not _is_v2(owner):
        changes = {**table_between(owner, cells), "window_area": math.prod(cells)}
        return attention.original_with({**changes, "fused_attn": True}, x, mask)
    added = None if owner.q_bias is None else torch.cat([owner.q_bias, owner.k_bias, owner.v_bias])
    parts = split_heads(F.linear(x, owner.qkv.weight, added), owner.num_heads)
    bias = continuous_bias(owner.cpb_mlp, owner.window_size, cells, owner.pretrained_window_size)
    dropout = owner.attn_drop.p if owner.training else 0.0
    mask = for_batch(mask, x.shape[0])
    out = attend_by_direction(*parts, bias, mask, dropout, owner.logit_scale)
    return owner.proj_drop(owner.proj(out))


def _is_v2(attention: Any) -> bool:
    return hasattr(attention, "cpb_mlp")


def _is_stage(module: nn.Module) -> bool:
    return type(module).__name__ in _STAGES


def _feature_stages(encoder: nn.Module) -> list[nn.Module]:
    return [module for module in encoder.children() if _is_stage(module)]


def _writes_out(encoder: Any) -> bool:
    # The first version's asks a switch of timm's, the second's has none.
    attention = next(module for module in encoder.modules() if hasattr(module, "num_heads"))
    return not getattr(attention, "fused_attn", False)


_WINDOWS = ShiftedWindows(
    stages=lambda encoder: encoder.layers,
    attention=lambda block: block.attn,
    run_in=_run_in,
    attend=_attend,
    shifts=_shifts,
    square=False,
    kind="relative, from tables; SwinV2's from a network",
)
_family = partial(
    ShiftedWindows.family,
    library="timm",
    image_size=lambda encoder: tuple(encoder.patch_embed.img_size),
    attention=lambda block: None if _is_v2(block.attn) else (block.norm1, block.attn),
    eager=_writes_out,
)
SWIN = register_family(
    _family(
        _WINDOWS,
        name="timm SwinTransformer and SwinTransformerV2",
        classes=("SwinTransformer", "SwinTransformerV2"),
    )
)
FEATURES = register_family(
    _family(
        # `features_only=True` takes the encoder apart, and keeps its stages.
        replace(_WINDOWS, stages=_feature_stages),
        name="timm features of SwinTransformer and SwinTransformerV2",
        classes=("FeatureDictNet", "FeatureHookNet"),
        matches=lambda network: bool(_feature_stages(network)),
    )
)

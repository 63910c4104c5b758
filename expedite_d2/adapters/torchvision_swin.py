"""torchvision's Swin, first and second version, and its Swin for videos, SwinTransformer3d.

Their attentions take maps, which they pad, roll and cut into windows by themselves, and they write
out the matrix of pairs; on clusters they run by a fused kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from expedite_d2.adapters.attention import attend, attend_by_direction, for_batch, split_heads
from expedite_d2.adapters.family import BlockCall, Size
from expedite_d2.adapters.override import Override
from expedite_d2.adapters.registry import register_family
from expedite_d2.adapters.relative_position import continuous_bias
from expedite_d2.adapters.shifted_windows import (
    ShiftedWindows,
    Windows,
    is_shifted_beyond,
    table_bias,
)
from expedite_d2.adapters.tokens import TokenClip
from expedite_d2.adapters.windows import in_windows


def _run_in(call: BlockCall, windows: Windows) -> Tensor:
    block: Any = call.block.owner
    return call.block.original_with({"attn": partial(block.attn, windows=windows)}, call.x)


def _run_clip_in(call: BlockCall, windows: Windows) -> Tensor:
    attention: Any = call.block.owner.attn
    side, shift = attention.window_size[0], attention.shift_size[0]
    return _run_in(call, windows.of_frames(call, side, shift))


def _shifts(call: BlockCall, window: Size) -> Sequence[bool]:
    block: Any = call.block.owner
    return is_shifted_beyond(block.attn.shift_size[-2:], call, window)


def _bias(attention: Any, cells: Size, lengths: Sequence[int]) -> Tensor:
    """Returns the bias for each pair of clusters in windows of `lengths`: (heads, N, N)."""
    tokens = tuple(attention.window_size)
    if _is_v2(attention):
        return continuous_bias(attention.cpb_mlp, tokens, cells, tokens)
    # In a video, cells are one frame apart.
    return table_bias(attention, (*tokens[:-2], *cells), lengths)


def _attend(attention: Override, cells: Size, x: Tensor, windows: Windows) -> Tensor:
    owner: Any = attention.owner
    bias = _bias(owner, cells, windows.sides)
    added: Tensor | None = owner.qkv.bias
    if added is not None and _is_v2(owner):  # in which keys have none
        query, key, value = added.chunk(3)
        added = torch.cat([query, torch.zeros_like(key), value])
    dropout = owner.attention_dropout if owner.training else 0.0

    def within(tokens: Tensor, mask: Tensor | None) -> Tensor:
        parts = split_heads(F.linear(tokens, owner.qkv.weight, added), owner.num_heads)
        mask = for_batch(mask, tokens.shape[0])
        if _is_v2(owner):
            out = attend_by_direction(*parts, bias, mask, dropout, owner.logit_scale)
        else:
            out = attend(*parts, bias, mask, dropout, None)
        return F.dropout(owner.proj(out), owner.dropout, owner.training)

    return in_windows(x, windows.sides, windows.shifts, within)


def _is_v2(attention: Any) -> bool:
    return hasattr(attention, "cpb_mlp")


def _clip(encoder: Any, images: Tensor) -> Tensor:
    """Repeats images in as many frames as a window has: (B, 3, H, W) to (B, 3, T, H, W)."""
    attention = encoder.features[0][0].attn
    frames = attention.window_size[0] * encoder.patch_embed.tuple_patch_size[0]
    return images[:, :, None].expand(-1, -1, frames, -1, -1)


_WINDOWS = ShiftedWindows(
    # After the patch embedding; each but the last is followed by a patch merging.
    stages=lambda encoder: encoder.features[1::2],
    attention=lambda block: block.attn,
    run_in=_run_in,
    attend=_attend,
    blocks=list,
    shifts=_shifts,
    window=lambda attention: tuple(attention.window_size[-2:]),
    square=False,
    kind="relative, from tables; SwinV2's from a network",
)
SWIN = register_family(
    _WINDOWS.family(
        name="torchvision SwinTransformer",
        library="torchvision",
        classes=("SwinTransformer",),
        attention=lambda block: None if _is_v2(block.attn) else (block.norm1, block.attn),
        eager=lambda encoder: True,
    )
)
SWIN_3D = register_family(
    replace(
        _WINDOWS,
        stages=lambda encoder: encoder.features[::2],
        run_in=_run_clip_in,
        kind=ShiftedWindows.kind,
    ).family(
        name="torchvision SwinTransformer3d",
        library="torchvision",
        classes=("SwinTransformer3d",),
        tokens=TokenClip(),
        run=lambda encoder, images: encoder(_clip(encoder, images)),
        attention=lambda block: (block.norm1, block.attn),
        eager=lambda encoder: True,
    )
)

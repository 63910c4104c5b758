"""Official Swin: of Mask2Former and Detectron2, of videos, and their copies in other projects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from expedite_d2.adapters.attention import attend, for_batch, split_heads
from expedite_d2.adapters.family import BlockCall, Size
from expedite_d2.adapters.override import Override
from expedite_d2.adapters.registry import register_family
from expedite_d2.adapters.shifted_windows import (
    ShiftedWindows,
    Windows,
    is_shifted_beyond,
    table_bias,
    with_table,
)
from expedite_d2.adapters.tokens import TokenClip

# What official Swin's attention consists of; copies in other projects may hold more.
_PARTS = {"qkv", "attn_drop", "proj", "proj_drop", "softmax"}


def _run_in(call: BlockCall, windows: Windows) -> Tensor:
    rows, columns = call.cells
    changes = {
        "H": rows,
        "W": columns,
        "window_size": windows.sides[0],
        "shift_size": windows.shifts[0],
    }
    # Instead of the stage's mask, which is for tokens.
    return call.block.original_with(changes, call.x, windows.mask(call.cells, call.x))


def _run_clip_in(call: BlockCall, windows: Windows) -> Tensor:
    block: Any = call.block.owner
    windows = windows.of_frames(call, block.window_size[0], block.shift_size[0])
    changes = {"window_size": windows.sides, "shift_size": windows.shifts}
    mask = windows.mask((call.x.shape[1], *call.cells), call.x)
    return call.block.original_with(changes, call.x, mask)


def _clip_shifts(call: BlockCall, window: Size) -> Sequence[bool]:
    block: Any = call.block.owner
    return is_shifted_beyond(block.shift_size[1:], call, window)


def _attend(attention: Override, cells: Size, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Official Swin's attention writes out its matrix; on clusters a fused kernel does the same."""
    owner: Any = attention.owner
    whole = (*owner.window_size[:-2], *cells)  # in a video, cells are one frame apart
    if {name for name, _ in owner.named_children()} != _PARTS:
        return with_table(attention, whole, x, mask)
    parts = split_heads(owner.qkv(x), owner.num_heads)
    dropout = owner.attn_drop.p if owner.training else 0.0
    # A window of a video that is cut to a small clip or map has the first rows of a whole one's.
    bias = table_bias(owner, whole)[:, : x.shape[1], : x.shape[1]]
    out = attend(*parts, bias, for_batch(mask, x.shape[0]), dropout, owner.scale)
    return owner.proj_drop(owner.proj(out))


def _is_stage(module: Any, part: str) -> bool:
    return type(module).__name__ == "BasicLayer" and all(hasattr(b, part) for b in module.blocks)


def _is_official(encoder: nn.Module, part: str) -> bool:
    # The file was copied to many projects, so the library is not known. timm, torchvision and
    # transformers have a class of this name, too, but blocks without this part.
    stages = getattr(encoder, "layers", None)
    return isinstance(stages, nn.ModuleList) and all(_is_stage(stage, part) for stage in stages)


def _clip(encoder: Any, images: Tensor) -> Tensor:
    """Repeats images in as many frames as a window has: (B, 3, H, W) to (B, 3, T, H, W)."""
    frames = encoder.layers[0].window_size[0] * encoder.patch_embed.proj.stride[0]
    return images[:, :, None].expand(-1, -1, frames, -1, -1)


_WINDOWS = ShiftedWindows(
    stages=lambda encoder: encoder.layers,
    attention=lambda block: block.attn,
    run_in=_run_in,
    attend=_attend,
)
SWIN = register_family(
    _WINDOWS.family(
        name="Mask2Former and Detectron2 SwinTransformer",
        library="",
        classes=("SwinTransformer",),
        matches=lambda encoder: _is_official(encoder, "H"),
        # The size of the map is an argument of the stage.
        read=lambda encoder, x, H, W: (H, W),
        attention=lambda block: (block.norm1, block.attn),
        eager=lambda encoder: True,
    )
)
SWIN_3D = register_family(
    replace(
        _WINDOWS,
        run_in=_run_clip_in,
        shifts=_clip_shifts,
        window=lambda attention: tuple(attention.window_size[1:]),
        square=False,
    ).family(
        name="Video-Swin-Transformer SwinTransformer3D",
        library="",
        classes=("SwinTransformer3D",),
        matches=lambda encoder: _is_official(encoder, "forward_part1"),
        tokens=TokenClip(),
        run=lambda encoder, images: encoder(_clip(encoder, images)),
        attention=lambda block: (block.norm1, block.attn),
        eager=lambda encoder: True,
    )
)

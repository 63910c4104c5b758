"""Official Swin: those of Mask2Former and Detectron2, and their copies in other projects."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from expedite_d2.adapters.attention import attend, for_batch, split_heads
from expedite_d2.adapters.family import BlockCall, Size
from expedite_d2.adapters.override import Override
from expedite_d2.adapters.registry import register_family
from expedite_d2.adapters.shifted_windows import ShiftedWindows, Windows, table_bias, with_table

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


def _attend(attention: Override, cells: Size, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Official Swin's attention writes out its matrix; on clusters a fused kernel does the same."""
    owner: Any = attention.owner
    if {name for name, _ in owner.named_children()} != _PARTS:
        return with_table(attention, cells, x, mask)
    parts = split_heads(owner.qkv(x), owner.num_heads)
    dropout = owner.attn_drop.p if owner.training else 0.0
    bias = table_bias(owner, cells)
    out = attend(*parts, bias, for_batch(mask, len(x)), dropout, owner.scale)
    return owner.proj_drop(owner.proj(out))


def _is_stage(module: Any) -> bool:
    return type(module).__name__ == "BasicLayer" and all(hasattr(b, "H") for b in module.blocks)


def _is_official(encoder: nn.Module) -> bool:
    # The file was copied to many projects, so the library is not known. timm, torchvision and
    # transformers have a class of this name, too, but blocks that are not told the map's size.
    stages = getattr(encoder, "layers", None)
    return isinstance(stages, nn.ModuleList) and all(map(_is_stage, stages))


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
        matches=_is_official,
        # The size of the map is an argument of the stage.
        read=lambda encoder, x, H, W: (H, W),
        attention=lambda block: (block.norm1, block.attn),
        eager=lambda encoder: True,
    )
)

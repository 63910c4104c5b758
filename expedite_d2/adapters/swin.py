"""Official Swin: those of Mask2Former and Detectron2, and their copies in other projects."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from expedite_d2.adapters.family import BlockCall
from expedite_d2.adapters.registry import register_family
from expedite_d2.adapters.shifted_windows import ShiftedWindows, Windows


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

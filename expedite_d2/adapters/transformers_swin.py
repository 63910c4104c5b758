"""transformers' Swin and SwinV2, and the copies of MaskFormer and Donut, alone or in a model."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from expedite_d2.adapters.family import BlockCall, Size
from expedite_d2.adapters.registry import register_family
from expedite_d2.adapters.relative_position import log_spaced
from expedite_d2.adapters.shifted_windows import (
    ShiftedWindows,
    Windows,
    is_shifted,
    table_between,
)
from expedite_d2.adapters.windows import relative_position_index


def _run_in(call: BlockCall, windows: Windows) -> Any:
    changes = {
        "window_size": windows.side,
        "shift_size": windows.shift,
        "get_attn_mask": lambda *args, **kwargs: windows.mask,
        # It would make smaller windows of a small map: `_shifts` decides instead.
        "set_shift_and_window_size": lambda *args: None,
    }
    return call.block.original_with(changes, call.x, call.cells, *call.args[1:], **call.kwargs)


def _shifts(call: BlockCall, window: Size) -> bool:
    if hasattr(call.block.owner, "set_shift_and_window_size"):
        # Outside of a backbone, nothing is shifted on a map that is no larger than a window.
        backbone = call.kwargs.get("always_partition", False)
        return is_shifted(call, window) and (backbone or min(call.state.grid) > window[0])
    return is_shifted(call, window)


def _between(attention: Any, side: int) -> dict[str, Any]:
    """Swin's bias of each pair of clusters, for which the attention calls a module."""
    values = table_between(attention.relative_position_bias, side)
    bias = values["relative_position_bias_table"][
        values["relative_position_index"]
    ]  # (N, N, heads)
    bias = bias.permute(2, 0, 1)[None].contiguous()
    return {"relative_position_bias": lambda: bias}


def _between_v2(attention: Any, side: int) -> dict[str, Any]:
    """SwinV2's coordinates of the offsets between clusters, and which of them a pair has."""
    (rows, _), (pretrained, _) = attention.window_size, attention.pretrained_window_size
    weight: Tensor = attention.continuous_position_bias_mlp[0].weight
    coordinates = log_spaced(rows, side, max((pretrained or rows) - 1, 1), weight.device)
    return {
        "window_size": (side, side),
        "relative_coords_table": coordinates.to(weight.dtype),
        "relative_position_index": relative_position_index((side, side), weight.device),
    }


def _image_size(encoder: Any) -> Size:
    size = encoder.config.image_size
    rows, columns = (size, size) if isinstance(size, int) else size
    return rows, columns


_windows = partial(
    ShiftedWindows, stages=lambda encoder: encoder.encoder.layers, run_in=_run_in, shifts=_shifts
)
_family = partial(
    ShiftedWindows.family,
    read=lambda encoder, x, size, *args, **kwargs: size,
    library="transformers",
    image_size=_image_size,
    run=lambda encoder, images: encoder(images, interpolate_pos_encoding=True),
)
SWIN = register_family(
    _family(
        _windows(
            attention=lambda block: block.attention,
            window=lambda attention: attention.relative_position_bias.window_size,
            between=_between,
        ),
        name="transformers SwinModel",
        classes=("SwinModel",),
        # As a backbone, which takes maps that are smaller than a window.
        run=lambda encoder, images: encoder(
            images, interpolate_pos_encoding=True, always_partition=True
        ),
    )
)
COPIES = register_family(
    _family(
        _windows(attention=lambda block: block.attention.self),
        name="transformers MaskFormerSwinModel and DonutSwinModel",
        classes=("MaskFormerSwinModel", "DonutSwinModel"),
    )
)
SWIN_V2 = register_family(
    _family(
        _windows(attention=lambda block: block.attention.self, between=_between_v2),
        name="transformers Swinv2Model and Swinv2Backbone",
        classes=("Swinv2Model", "Swinv2Backbone"),
    )
)

"""transformers' Swin and SwinV2, and the copies of MaskFormer and Donut, alone or in a model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from expedite_d2.adapters.attention import attend, attend_by_direction, for_batch
from expedite_d2.adapters.family import BlockCall, Size
from expedite_d2.adapters.override import Override
from expedite_d2.adapters.registry import register_family
from expedite_d2.adapters.relative_position import continuous_bias, log_spaced
from expedite_d2.adapters.shifted_windows import (
    ShiftedWindows,
    Windows,
    is_shifted,
    table_bias,
    with_table,
)
from expedite_d2.adapters.transformers import is_eager, sides
from expedite_d2.adapters.windows import relative_position_index


def _run_in(call: BlockCall, windows: Windows) -> Any:
    changes = {
        "window_size": windows.sides[0],
        "shift_size": windows.shifts[0],
        "get_attn_mask": lambda *args, **kwargs: windows.mask(call.cells, call.x),
        # It would make smaller windows of a small map: `_shifts` decides instead.
        "set_shift_and_window_size": lambda *args: None,
    }
    return call.block.original_with(changes, call.x, call.cells, *call.args[1:], **call.kwargs)


def _shifts(call: BlockCall, window: Size) -> Sequence[bool]:
    small = False
    if hasattr(call.block.owner, "set_shift_and_window_size"):
        # Outside of a backbone, nothing is shifted on a map that is no larger than a window.
        backbone = call.kwargs.get("always_partition", False)
        small = not backbone and min(call.state.grid) <= window[0]
    return [shifted and not small for shifted in is_shifted(call, window)]


def _attend(attention: Override, cells: Size, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Swin's attention calls a module for the bias of each pair of clusters."""
    owner: Any = attention.owner
    bias = table_bias(owner.relative_position_bias, cells)[None]
    return attention.original_with({"relative_position_bias": lambda: bias}, x, *args, **kwargs)


def _attend_copy(
    attention: Override, cells: Size, x: Tensor, mask: Tensor | None = None, *args: Any
) -> Any:
    """The copies', which write out their matrix; here only for those who read or change that."""
    owner: Any = attention.owner
    if _reads_matrix(args):
        return with_table(attention, cells, x, mask, *args)
    bias, dropout = table_bias(owner, cells), _dropout(owner)
    return (attend(*_heads(owner, x), bias, for_batch(mask, x.shape[0]), dropout, None),)


def _attend_v2(
    attention: Override, cells: Size, x: Tensor, mask: Tensor | None = None, *args: Any
) -> Any:
    """SwinV2's, which writes out its matrix; here only for those who read or change that."""
    owner: Any = attention.owner
    network = owner.continuous_position_bias_mlp
    places = (owner.window_size, cells, owner.pretrained_window_size)
    if _reads_matrix(args):
        changes = {
            "window_size": cells,
            "relative_coords_table": log_spaced(*places, network[0].weight),
            "relative_position_index": relative_position_index(cells, x.device),
        }
        return attention.original_with(changes, x, mask, *args)
    bias, mask = continuous_bias(network, *places), for_batch(mask, x.shape[0])
    parts, dropout = _heads(owner, x), _dropout(owner)
    return (attend_by_direction(*parts, bias, mask, dropout, owner.logit_scale),)


def _reads_matrix(args: Sequence[Any]) -> bool:
    """Whether an attention's further arguments ask for its matrix, or mask some of its heads."""
    return any(value is not None and value is not False for value in args)


def _heads(owner: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns query, key and value, each (windows, heads, N, C / heads)."""
    query, key, value = (
        project(x).unflatten(-1, (owner.num_attention_heads, -1)).transpose(1, 2)
        for project in (owner.query, owner.key, owner.value)
    )
    return query, key, value


def _dropout(owner: Any) -> float:
    return owner.dropout.p if owner.training else 0.0


_windows = partial(
    ShiftedWindows, stages=lambda encoder: encoder.encoder.layers, run_in=_run_in, shifts=_shifts
)
_family = partial(
    ShiftedWindows.family,
    read=lambda encoder, x, size, *args, **kwargs: size,
    library="transformers",
    image_size=lambda encoder: sides(encoder.config.image_size),
    run=lambda encoder, images: encoder(images, interpolate_pos_encoding=True),
)
SWIN = register_family(
    _family(
        _windows(
            attention=lambda block: block.attention,
            window=lambda attention: attention.relative_position_bias.window_size,
            attend=_attend,
        ),
        name="transformers SwinModel",
        classes=("SwinModel",),
        # As a backbone, which takes maps that are smaller than a window.
        run=lambda encoder, images: encoder(
            images, interpolate_pos_encoding=True, always_partition=True
        ),
        eager=is_eager,
    )
)
COPIES = register_family(
    _family(
        _windows(attention=lambda block: block.attention.self, attend=_attend_copy),
        name="transformers MaskFormerSwinModel and DonutSwinModel",
        classes=("MaskFormerSwinModel", "DonutSwinModel"),
        eager=lambda encoder: True,
    )
)
SWIN_V2 = register_family(
    _family(
        _windows(
            attention=lambda block: block.attention.self,
            attend=_attend_v2,
            kind="relative, from a network",
        ),
        name="transformers Swinv2Model and Swinv2Backbone",
        classes=("Swinv2Model", "Swinv2Backbone"),
        eager=lambda encoder: True,
    )
)

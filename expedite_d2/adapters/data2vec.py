"""transformers' Data2VecVision: BEiT's tables, in attentions that look them up by themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from expedite_d2.adapters.family import Size
from expedite_d2.adapters.hourglass import Hourglass
from expedite_d2.adapters.override import Override
from expedite_d2.adapters.positions import Table
from expedite_d2.adapters.registry import register_family
from expedite_d2.adapters.transformers import BEIT, bias_of_tables


class _WithoutTable(Override):
    """An attention without its own table: what is passed to it on clusters includes it."""

    def call(self, *args: Any, **kwargs: Any) -> Any:
        return self.original_with({"has_relative_position_bias": False}, *args, **kwargs)


class _Tables(Table):
    def overrides(self, hourglass: Hourglass) -> list[Override]:
        layers: Any = hourglass.family.blocks(hourglass.encoder)
        attentions = [layers[number].attention.attention for number in hourglass.span]
        return [
            _WithoutTable(attention, "forward")
            for attention in attentions
            if attention.has_relative_position_bias
        ]


def _bias(encoder: Any, layer: Any, grid: Size, cells: Size) -> Tensor | None:
    owners = (layer.attention.attention, encoder.encoder)
    tables = [getattr(owner, "relative_position_bias", None) for owner in owners]
    return bias_of_tables(tables, grid, cells)


DATA2VEC = register_family(
    replace(
        BEIT,
        name="transformers Data2VecVisionModel",
        classes=("Data2VecVisionModel",),
        blocks=lambda encoder: list(encoder.encoder.layer),
        grid=replace(BEIT.grid, onto=lambda out: out[0]),  # type: ignore[arg-type]
        positions=_Tables(bias=_bias, argument="relative_position_bias", own=lambda layer: None),
        attention=lambda layer: (layer.layernorm_before, layer.attention),
    )
)

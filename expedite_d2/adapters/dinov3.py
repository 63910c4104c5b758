"""DINOv3's own DinoVisionTransformer, whose blocks take a tensor, or a list of several."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from expedite_d2.adapters.dinov2 import DINOV2
from expedite_d2.adapters.family import BlockCall
from expedite_d2.adapters.hourglass import Hourglass
from expedite_d2.adapters.override import Override
from expedite_d2.adapters.registry import register_family
from expedite_d2.adapters.rotary import Rotary
from expedite_d2.adapters.tokens import TokenSequence
from expedite_d2.reducers import Points

# Name of the blocks' second argument.
_ROPE = "rope_or_rope_list"


class _Each(Override):
    """Runs a block on each tensor of a list by itself."""

    def call(self, x: Any, rope: Any = None) -> Any:
        if isinstance(x, Tensor):
            return self.original(x, **{_ROPE: rope})
        ropes = [None] * len(x) if rope is None else rope
        return [self.original(t, **{_ROPE: r}) for t, r in zip(x, ropes, strict=True)]


class _RotaryInLists(Rotary):
    def overrides(self, hourglass: Hourglass) -> list[Override]:
        blocks = hourglass.family.blocks(hourglass.encoder)
        return [_Each(block, "forward") for block in blocks[: hourglass.span.stop]]

    def run(self, call: BlockCall) -> Any:
        block: Any = call.block.owner
        grouped = isinstance(call.state.layout, Points) and call.state.layout.groups is not None
        if grouped and block.training and block.sample_drop_ratio > 0:
            # Its attention is then called in another way.
            raise ValueError(
                "grouped attention (rounds > 0) takes DINOv3 in training with drop_path_rate=0 "
                f"alone, got {block.sample_drop_ratio}"
            )
        return super().run(call)


DINOV3 = register_family(
    replace(
        DINOV2,
        name="DINOv3 DinoVisionTransformer",
        tokens=TokenSequence(lambda encoder: 1 + encoder.n_storage_tokens),
        grid=replace(DINOV2.grid, onto=lambda out: out[0]),  # type: ignore[arg-type]
        positions=_RotaryInLists(_ROPE),
        # DINOv2's class of this name adds positions to the tokens.
        matches=lambda encoder: hasattr(encoder, "rope_embed"),
    )
)

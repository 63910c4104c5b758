"""torchvision's VisionTransformer."""

from __future__ import annotations

from typing import Any

from expedite_d2.adapters.family import Family, Size
from expedite_d2.adapters.registry import register_family
from expedite_d2.adapters.tokens import GridFromCall, TokenSequence


def _configured(encoder: Any) -> Size:
    side = encoder.image_size // encoder.patch_size
    return side, side


VISION_TRANSFORMER = register_family(
    Family(
        name="torchvision VisionTransformer",
        library="torchvision",
        classes=("VisionTransformer",),
        blocks=lambda encoder: list(encoder.encoder.layers),
        tokens=TokenSequence(),
        grid=GridFromCall(
            # The dropout is the last module before the blocks.
            place=lambda encoder, span: (encoder.encoder.dropout, "forward"),
            read=lambda encoder, x: _configured(encoder),
            configured=_configured,
            varies=lambda encoder: False,
        ),
        image_size=lambda encoder: (encoder.image_size, encoder.image_size),
        attention=lambda block: (block.ln_1, block.self_attention),
    )
)

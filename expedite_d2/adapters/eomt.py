"""transformers' EoMT, EoMT-DINOv3 and VidEoMT: encoders that queries join before the last layers.

Tokens are reduced in the layers before: the masks are predicted from the map of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from expedite_d2.adapters.family import Family
from expedite_d2.adapters.registry import register_family
from expedite_d2.adapters.rotary import Rotary
from expedite_d2.adapters.tokens import GridFromCall, TokenSequence
from expedite_d2.adapters.transformers import configured_grid, is_eager, sides


def _to_queries(encoder: Any, blocks: Sequence[nn.Module], first: int) -> int:
    """Ends the span before the queries join the tokens."""
    end = len(blocks) - encoder.config.num_blocks
    if first >= end:
        raise ValueError(
            f"alpha must be less than {end} for {type(encoder).__name__}, whose queries join the "
            f"tokens before block {end}, got {first}"
        )
    return end


def _run(encoder: Any, images: Tensor) -> Any:
    if not images.is_meta:
        return encoder(images)
    # Where nothing has a value, it cannot ask whether queries have masks: those of trained models
    # have none.
    return functional_call(
        encoder, {"attn_mask_probs": torch.zeros(encoder.config.num_blocks)}, images
    )


EOMT = Family(
    name="transformers EomtForUniversalSegmentation",
    library="transformers",
    classes=("EomtForUniversalSegmentation",),
    blocks=lambda encoder: list(encoder.layers),
    tokens=TokenSequence(lambda encoder: 1 + encoder.config.num_register_tokens),
    grid=GridFromCall(
        # Where the image becomes a sequence.
        place=lambda encoder, span: (encoder.embeddings, "forward"),
        read=lambda encoder, *args, **kwargs: configured_grid(encoder),
        configured=configured_grid,
        varies=lambda encoder: False,
    ),
    span=_to_queries,
    image_size=lambda encoder: sides(encoder.config.image_size),
    run=_run,
    attention=lambda layer: (layer.norm1, layer.attention),
    eager=is_eager,
)
EOMT_DINOV3 = replace(
    EOMT,
    name="transformers EomtDinov3ForUniversalSegmentation",
    classes=("EomtDinov3ForUniversalSegmentation",),
    grid=replace(EOMT.grid, then=lambda encoder: [encoder.dropout]),  # type: ignore[arg-type]
    positions=Rotary("position_embeddings"),
)
VIDEOMT = replace(
    EOMT,
    name="transformers VideomtForUniversalSegmentation",
    classes=("VideomtForUniversalSegmentation",),
    run=lambda encoder, images: encoder(images[:, None]),  # videos of one frame
)
for _family in (EOMT, EOMT_DINOV3, VIDEOMT):
    register_family(_family)

"""DINOv2's own DinoVisionTransformer, whose file Depth Anything and others have a copy of."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from expedite_d2.adapters.family import Family, Size
from expedite_d2.adapters.registry import register_family
from expedite_d2.adapters.tokens import GridFromCall, TokenSequence


def _blocks(encoder: Any) -> list[nn.Module]:
    # For sharding, blocks may lie in chunks, which begin with an Identity for each block before.
    chunks = encoder.blocks if encoder.chunked_blocks else [encoder.blocks]
    return [block for chunk in chunks for block in chunk if not isinstance(block, nn.Identity)]


def _grid(encoder: Any, images: Tensor, masks: Any = None) -> Size:
    rows, columns = encoder.patch_embed.patch_size
    return images.shape[-2] // rows, images.shape[-1] // columns


def _configured(encoder: Any) -> Size:
    rows, columns = encoder.patch_embed.patches_resolution
    return rows, columns


def _image_size(encoder: Any) -> Size:
    height, width = encoder.patch_embed.img_size
    return height, width


DINOV2 = register_family(
    Family(
        name="DINOv2 DinoVisionTransformer",
        library="",
        classes=("DinoVisionTransformer",),
        blocks=_blocks,
        # Copies from before there were registers do not have the attribute.
        tokens=TokenSequence(lambda encoder: 1 + getattr(encoder, "num_register_tokens", 0)),
        grid=GridFromCall(
            # Where the image becomes a sequence.
            place=lambda encoder, span: (encoder, "prepare_tokens_with_masks"),
            read=_grid,
            configured=_configured,
        ),
        image_size=_image_size,
        attention=lambda block: (block.norm1, block.attn),
        # DINOv3's class of this name has rotary positions, and its blocks take lists.
        matches=lambda encoder: hasattr(encoder, "pos_embed"),
    )
)

"""timm's VisionTransformer (plain, distilled, hybrid, with registers), NaFlexVit and Beit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from expedite_d2.adapters.family import Attention, Family, Size
from expedite_d2.adapters.positions import Table
from expedite_d2.adapters.registry import register_family
from expedite_d2.adapters.relative_position import relative_bias
from expedite_d2.adapters.rotary import Rotary
from expedite_d2.adapters.tokens import GridFromCall, TokenSequence


def _blocks(encoder: Any) -> list[nn.Module]:
    return list(encoder.blocks)


def _attention(block: Any) -> Attention | None:
    # Others run attention and MLP in parallel, or have their norm after the attention.
    if type(block).__name__ not in ("Block", "EvaBlock"):
        return None
    return block.norm1, block.attn


def _configured(encoder: Any) -> Size:
    rows, columns = encoder.patch_embed.grid_size
    return rows, columns


def _image_size(encoder: Any) -> Size:
    height, width = encoder.patch_embed.img_size
    return height, width


def grid_of_patches(encoder: Any, x: Tensor) -> Size:
    """Returns rows and columns of patches, from a map of them, or from the encoder's settings."""
    return (x.shape[1], x.shape[2]) if x.dim() == 4 else encoder.patch_embed.grid_size


def _is_eager(encoder: Any) -> bool:
    # Parallel blocks hold no attention of their own, or are one.
    block = encoder.blocks[0]
    return not getattr(getattr(block, "attn", block), "fused_attn", True)


VISION_TRANSFORMER = Family(
    name="timm VisionTransformer",
    library="timm",
    classes=("VisionTransformer",),
    blocks=_blocks,
    tokens=TokenSequence(lambda encoder: encoder.num_prefix_tokens),
    grid=GridFromCall(
        # Where the map of patches becomes a sequence.
        place=lambda encoder, span: (encoder, "_pos_embed"),
        read=grid_of_patches,
        then=lambda encoder: [encoder.norm_pre],
        configured=_configured,
        varies=lambda encoder: encoder.dynamic_img_size,
    ),
    image_size=_image_size,
    attention=_attention,
    eager=_is_eager,
)


def refuse_patch_dropout(encoder: Any) -> None:
    """Raises if an encoder is about to drop patches at random."""
    if encoder.training and encoder.patch_drop is not None:
        raise ValueError(
            f"an expedited {type(encoder).__name__} drops no patches, without which there is no "
            "grid: train it with patch_drop_rate=0"
        )


def _grid_of_images(encoder: Any, images: Tensor, patch_coord: Any = None, **kwargs: Any) -> Size:
    if patch_coord is not None:
        raise ValueError(
            "an expedited NaFlexVit takes images (B, 3, H, W), got patches, which lie on a grid of "
            "their own for each image"
        )
    refuse_patch_dropout(encoder)
    rows, columns = encoder.embeds.dynamic_feat_size(images.shape[-2:])
    return rows, columns


NAFLEX = replace(
    VISION_TRANSFORMER,
    name="timm NaFlexVit",
    classes=("NaFlexVit",),
    grid=GridFromCall(
        place=lambda encoder, span: (encoder, "_forward_embeds"),
        read=_grid_of_images,
        onto=lambda out: out["patches"],
    ),
    positions=Rotary("rope", "absolute, or rotary"),
    image_size=lambda encoder: None,
)


def beit_bias(encoder: Any, block: Any, grid: Size, cells: Size) -> Tensor | None:
    """Returns the bias of the logits in one block of timm's Beit, on a grid of clusters.

    Args:
        encoder: timm's Beit.
        block: one of its blocks.
        grid: rows and columns of the image's tokens, (H, W).
        cells: rows and columns of the clusters, (h, w); for a bias between tokens, those of the
            tokens.

    Returns:
        The sum of the block's own bias, (1, heads, 1 + h * w, 1 + h * w), and the shared one, which
        has no first axis. These are timm's shapes, so that attention computes the same to the bit.
        None for a model that has neither.
    """
    bias = None
    for owner in (block.attn, encoder.rel_pos_bias):
        table = None if owner is None else owner.relative_position_bias_table
        if table is None:
            continue
        rows, columns = owner.window_size
        offsets = table[:-3].view(2 * rows - 1, 2 * columns - 1, -1)
        part = relative_bias(offsets, table[-3:], grid, cells)
        if owner is block.attn:
            bias = part[None]
        else:
            bias = part if bias is None else bias + part
    return bias


def _own_bias(block: Any) -> tuple[nn.Module, str] | None:
    attention = block.attn
    if attention.relative_position_bias_table is None:
        return None
    return attention, "_get_rel_pos_bias"


BEIT = Family(
    name="timm Beit",
    library="timm",
    classes=("Beit",),
    blocks=_blocks,
    tokens=TokenSequence(),
    grid=GridFromCall(
        # The dropout is the last module before the blocks.
        place=lambda encoder, span: (encoder.pos_drop, "forward"),
        read=lambda encoder, x: encoder.patch_embed.grid_size,
        configured=_configured,
        varies=lambda encoder: not encoder.patch_embed.strict_img_size,
    ),
    positions=Table(bias=beit_bias, argument="shared_rel_pos_bias", own=_own_bias),
    image_size=_image_size,
)

for _family in (VISION_TRANSFORMER, NAFLEX, BEIT):
    register_family(_family)

"""timm's VisionTransformer (plain, distilled, hybrid, with registers) and Beit."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from expedite_d2.patch.adapter import BlockCall, SequenceAdapter, inherits, refuse_masks
from expedite_d2.patch.override import Override, PassOn
from expedite_d2.patch.relative_position import relative_bias
from expedite_d2.patch.travel import Travel, attach


class TimmVisionTransformer(SequenceAdapter):
    family = "timm VisionTransformer"

    def matches(self, module: nn.Module) -> bool:
        return inherits(module, "timm", "VisionTransformer")

    def prefixes(self, encoder: Any) -> int:
        return encoder.num_prefix_tokens

    def fixed_grid(self, encoder: Any) -> tuple[int, int] | None:
        return None if encoder.dynamic_img_size else tuple(encoder.patch_embed.grid_size)

    def overrides(self, encoder: Any, span: range) -> list[Override]:
        return [_PositionEmbedding(encoder, "_pos_embed"), PassOn(encoder.norm_pre, "forward")]


class _PositionEmbedding(Override):
    """Sends the grid along: this is where the map of patches becomes a sequence."""

    def __call__(self, x: Tensor) -> Tensor:
        owner: Any = self.owner
        rows, columns = x.shape[1:3] if x.dim() == 4 else owner.patch_embed.grid_size
        return attach(self.original(x), Travel((rows, columns)))


class TimmBeit(SequenceAdapter):
    family = "timm Beit"

    def matches(self, module: nn.Module) -> bool:
        return inherits(module, "timm", "Beit")

    def fixed_grid(self, encoder: Any) -> tuple[int, int] | None:
        embed = encoder.patch_embed
        return tuple(embed.grid_size) if embed.strict_img_size else None

    def overrides(self, encoder: Any, span: range) -> list[Override]:
        overrides: list[Override] = [_LastDropout(encoder.pos_drop, encoder.patch_embed)]
        for number in span:
            attention = encoder.blocks[number].attn
            if attention.relative_position_bias_table is not None:
                overrides.append(_NoBias(attention, "_get_rel_pos_bias"))
        return overrides

    def run(self, call: BlockCall) -> Tensor:
        refuse_masks(*call.args)
        bias = beit_bias(call.encoder, call.block.owner, call.grid, call.cells)
        return call.block.original(call.x, **{**call.kwargs, "shared_rel_pos_bias": bias})


class _LastDropout(Override):
    """Sends the grid along, with the dropout that is the last module before the blocks."""

    def __init__(self, dropout: nn.Module, patch_embed: Any) -> None:
        super().__init__(dropout, "forward")
        self.patch_embed = patch_embed

    def __call__(self, x: Tensor) -> Tensor:
        rows, columns = self.patch_embed.grid_size
        return attach(self.original(x), Travel((rows, columns)))


class _NoBias(Override):
    """No bias from a block's own table: `run` gives the block what the table says of clusters."""

    def __call__(self) -> Tensor:
        owner: Any = self.owner
        return owner.relative_position_bias_table.new_zeros(1)


def beit_bias(
    encoder: Any, block: Any, grid: tuple[int, int], cells: tuple[int, int]
) -> Tensor | None:
    """What timm Beit adds to the logits of one block, on a grid of clusters.

    Args:
        encoder: timm's Beit.
        block: one of its blocks.
        grid: rows and columns of the image's tokens, (H, W).
        cells: rows and columns of its clusters, (h, w); the tokens' own for a bias between tokens.

    Returns:
        The sum of the block's own bias, (1, heads, 1 + h * w, 1 + h * w), and the shared one, which
        has no first axis: timm's own shapes, so that attention takes the same path to the bit. None
        for a model that has neither.
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

"""transformers' ViT, BEiT and DPT's ViT, each by itself or inside a model for some task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from expedite_d2.patch.adapter import (
    BlockCall,
    SequenceAdapter,
    inherits,
    refuse_masks,
    without_masks,
)
from expedite_d2.patch.override import Gate, Override
from expedite_d2.patch.relative_position import relative_bias
from expedite_d2.patch.travel import Travel, attach


class TransformersViT(SequenceAdapter):
    family = "transformers ViTModel"

    def matches(self, module: nn.Module) -> bool:
        return inherits(module, "transformers", "ViTModel")

    def blocks(self, encoder: Any) -> Sequence[nn.Module]:
        return list(encoder.layers)

    def overrides(self, encoder: Any, span: range) -> list[Override]:
        return [_CallersMask(encoder), _Embeddings(encoder.embeddings, "forward")]

    def run(self, call: BlockCall) -> Tensor:
        if not torch.compiler.is_compiling():
            refuse_masks(*call.args, call.kwargs.get("attention_mask"))
        # While it is traced, the encoder makes a mask for its blocks even where the caller gives
        # none, whose values cannot be seen then: `_CallersMask` has refused every other.
        call = without_masks(call)
        return call.block.original(call.x, *call.args, **call.kwargs)


class TransformersDPT(TransformersViT):
    family = "transformers DPTModel"

    def matches(self, module: nn.Module) -> bool:
        return inherits(module, "transformers", "DPTModel")

    def blocks(self, encoder: Any) -> Sequence[nn.Module]:
        return list(encoder.encoder.layer)

    def overrides(self, encoder: Any, span: range) -> list[Override]:
        return [_Embeddings(encoder.embeddings, "forward")]  # which takes no mask at all


class TransformersBeit(TransformersViT):
    family = "transformers BeitModel"

    def matches(self, module: nn.Module) -> bool:
        return inherits(module, "transformers", "BeitModel")

    def overrides(self, encoder: Any, span: range) -> list[Override]:
        own = [encoder.layers[number].relative_position_bias for number in span]
        return [
            *super().overrides(encoder, span),
            *(_NoBias(bias, "forward") for bias in own if bias is not None),
        ]

    def run(self, call: BlockCall) -> Tensor:
        # The shared bias arrives as a mask.
        if call.encoder.shared_position_bias is None and not torch.compiler.is_compiling():
            refuse_masks(*call.args, call.kwargs.get("attention_mask"))
        bias = _bias(call.encoder, call.block.owner, call.grid, call.cells)
        return call.block.original(call.x, **{**call.kwargs, "attention_mask": bias})


class _CallersMask(Gate):
    """Refuses the caller's own mask, here where it can be told from the one that is made of it."""

    def look(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # After pixels, masked positions and interpolation, by place or by name.
        for mask in (*args[3:], kwargs.get("attention_mask")):
            # A mask of padding, (B, N), is 0 or not whatever its type.
            padding = isinstance(mask, Tensor) and mask.dim() == 2
            refuse_masks(mask.bool() if padding else mask)


class _Embeddings(Override):
    """Sends the grid along: this is where the image becomes a sequence."""

    def __call__(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        owner: Any = self.owner
        out = self.original(pixel_values, *args, **kwargs)
        height, width = pixel_values.shape[-2:]
        # Those of DPT's hybrid have no patches of their own.
        patch = getattr(owner, "patch_embeddings", owner).patch_size
        rows, columns = (patch, patch) if isinstance(patch, int) else patch
        tokens = out if isinstance(out, Tensor) else out.last_hidden_states
        attach(tokens, Travel((height // rows, width // columns)))
        return out


class _NoBias(Override):
    """No bias from a layer's own table: `run` gives the layer what the table says of clusters."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        owner: Any = self.owner
        return owner.relative_position_bias_table.new_zeros(1)


def _bias(encoder: Any, layer: Any, grid: tuple[int, int], cells: tuple[int, int]) -> Tensor | None:
    """What BEiT adds to the logits of one layer, (1, heads, 1 + h * w, 1 + h * w), if anything."""
    bias = None
    for owner in (layer.relative_position_bias, encoder.shared_position_bias):
        if owner is None:
            continue
        rows, columns = owner.window_size
        table = owner.relative_position_bias_table
        # transformers takes the table for one of columns by rows; as a rule both are the same.
        offsets = table[:-3].view(2 * columns - 1, 2 * rows - 1, -1)
        part = relative_bias(offsets, table[-3:], grid, cells)[None]
        bias = part if bias is None else bias + part
    return bias

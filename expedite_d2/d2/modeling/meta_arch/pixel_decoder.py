"""Mask2Former's pixel decoder with its attention computed by this project's operator.

Under autocast it multiplies in 16 bits, but sums and samples in float32: half types cannot
distinguish neighbouring pixels of a large map. In transformers the type of sampling points follows
that of the projected maps, so that these have to stay float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoder,
    Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention,
)

from expedite_d2.d2.modeling.autocast import autocast_to
from expedite_d2.ops.ms_deform_attn import ms_deform_attn


class DeformableAttention(Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention):
    """transformers' module and parameters, with all samples taken by one kernel.

    transformers samples every level with ``grid_sample``. That copies the maps and all samples,
    which takes most of the pixel decoder's time.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes_list: Sequence[tuple[int, int]] = (),
        level_start_index: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Attends to the maps around each query's reference point.

        Args:
            hidden_states: (B, Q, C), the queries.
            attention_mask: (B, S), True where a map has no content.
            encoder_hidden_states: (B, S, C), the maps of all levels.
            encoder_attention_mask: not used, as in transformers.
            position_embeddings: (B, Q, C), added to the queries.
            reference_points: (B, Q, levels, 2), x and y from 0 to 1.
            spatial_shapes_list: (h, w) of each level.
            level_start_index: not used; the levels follow one another.
            output_attentions: not used; the weights are always returned.

        Returns:
            the queries' new states (B, Q, C) and the weights (B, Q, heads, levels, points).
        """
        assert encoder_hidden_states is not None and reference_points is not None
        queries = hidden_states
        if position_embeddings is not None:
            queries = queries + position_embeddings
        value = self.value_proj(encoder_hidden_states)
        if attention_mask is not None:
            value = value.masked_fill(attention_mask[..., None], 0.0)
        value = value.unflatten(-1, (self.n_heads, -1))

        points = (self.n_heads, self.n_levels, self.n_points)
        logits = self.attention_weights(queries).to(queries.dtype)
        weights = logits.unflatten(-1, (self.n_heads, -1)).softmax(-1).unflatten(-1, points[1:])
        with autocast_to(torch.float32, queries.device):
            offsets = self.sampling_offsets(queries).unflatten(-1, (*points, 2))  # in pixels
        # Filled on the device: making a tensor from numbers would be a copy that synchronises.
        sides = [side for height, width in spatial_shapes_list for side in (width, height)]
        sizes = torch.cat([offsets.new_full((1,), side) for side in sides]).view(-1, 1, 2)
        locations = reference_points[:, :, None, :, None].addcdiv(offsets, sizes)
        samples = ms_deform_attn(value, spatial_shapes_list, None, locations, weights)
        return self.output_proj(samples), weights


class ExactGroupNorm(nn.GroupNorm):
    """PyTorch's GroupNorm, which normalises 16-bit maps in float32."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape, float32 or float64."""
        return super().forward(input.to(torch.promote_types(input.dtype, torch.float32)))


def use_operator(decoder: Mask2FormerPixelDecoder) -> None:
    """Replaces classes in a decoder by these; names and weights stay."""
    # The instances keep their weights: new modules would draw initial weights again.
    projections: Any = (*decoder.input_projections, *decoder.lateral_convolutions)
    for projection in projections:
        projection[1].__class__ = ExactGroupNorm
    layers: Any = decoder.encoder.layers
    for layer in layers:
        layer.self_attn.__class__ = DeformableAttention

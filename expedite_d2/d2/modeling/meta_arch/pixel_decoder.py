"""Mask2Former's pixel decoder with its attention computed by this project's operator.

Under autocast it multiplies in 16 bits, but sums and samples in float32: half types cannot
distinguish neighbouring pixels of a large map. In transformers the type of sampling points follows
that of the projected maps, so that these have to stay float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoder,
    Mask2FormerPixelDecoderEncoderLayer,
    Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention,
    Mask2FormerPixelDecoderOutput,
)

from expedite_d2.d2.modeling.autocast import autocast_to
from expedite_d2.d2.modeling.in_parts import in_parts
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


class PixelDecoderLayer(Mask2FormerPixelDecoderEncoderLayer):
    """transformers' module and parameters, without masks."""

    def forward(  # type: ignore[override]
        self,
        tokens: Tensor,
        positions: Tensor,
        places: Tensor,
        shapes: Sequence[tuple[int, int]],
    ) -> Tensor:
        """Runs one layer.

        Args:
            tokens: (B, S, C), those of all maps, one after the other.
            positions: (1, S, C), added to the queries.
            places: (1, S, levels, 2), x and y of the tokens from 0 to 1.
            shapes: (h, w) of each map.

        Returns:
            (B, S, C).
        """
        attended, _ = self.self_attn(
            hidden_states=tokens,
            encoder_hidden_states=tokens,
            position_embeddings=positions,
            reference_points=places,
            spatial_shapes_list=shapes,
        )
        x = self.self_attn_layer_norm(tokens + F.dropout(attended, self.dropout, self.training))
        return in_parts(self._feed_forward, x, self.fc1.out_features)

    def _feed_forward(self, x: Tensor) -> Tensor:
        hidden = F.dropout(F.relu_(self.fc1(x)), self.activation_dropout, self.training)
        return self.final_layer_norm(x + F.dropout(self.fc2(hidden), self.dropout, self.training))


class PixelDecoder(Mask2FormerPixelDecoder):
    """transformers' module and parameters, without masks: all of a batch is content.

    The maps stay channels-last, as backbones give them: sums of two layouts are several times
    slower on a CPU.
    """

    def forward(self, features: Sequence[Tensor]) -> Mask2FormerPixelDecoderOutput:  # type: ignore[override]
        """Decodes the maps of a backbone.

        Args:
            features: (B, C, h, w) each, from the largest to the smallest.

        Returns:
            mask_features (B, D, H / 4, W / 4), and multi_scale_features, three smaller maps.
        """
        levels = self.num_feature_levels
        maps = [
            project(x)
            for project, x in zip(self.input_projections, features[::-1][:levels], strict=True)
        ]
        shapes = [(x.shape[2], x.shape[3]) for x in maps]
        positions = [
            _flat(self.position_embedding(x.shape, x.device, x.dtype)) + self.level_embed[number]
            for number, x in enumerate(maps)
        ]
        embedding = torch.cat(positions, dim=1)
        tokens = torch.cat([_flat(x) for x in maps], dim=1)
        places = _centres(shapes, tokens)[:, None].expand(-1, levels, -1)[None]
        layers: Any = self.encoder.layers
        for layer in layers:
            tokens = layer(tokens, embedding, places, shapes)
        outputs = [
            x.transpose(1, 2).unflatten(2, shape).clone(memory_format=torch.channels_last)
            for x, shape in zip(tokens.split([h * w for h, w in shapes], 1), shapes, strict=True)
        ]
        largest = features[: self.num_fpn_levels][::-1]
        steps = zip(largest, self.lateral_convolutions, self.output_convolutions, strict=True)
        for feature, lateral, output in steps:
            x = lateral(feature)
            size = x.shape[-2:]
            above = F.interpolate(outputs[-1], size=size, mode="bilinear", align_corners=False)
            outputs.append(output(x + above))
        return Mask2FormerPixelDecoderOutput(
            mask_features=self.mask_projection(outputs[-1]),
            multi_scale_features=tuple(outputs[:levels]),
        )


def _flat(maps: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h * w, C)."""
    return maps.flatten(2).transpose(1, 2)


def _centres(shapes: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    """Returns x and y of the pixels' centres in maps of some sizes, from 0 to 1: (S, 2)."""
    places = []
    for height, width in shapes:
        rows, columns = (
            (torch.arange(side, device=like.device, dtype=like.dtype) + 0.5) / side
            for side in (height, width)
        )
        places.append(torch.cartesian_prod(rows, columns).flip(-1))
    return torch.cat(places)


def use_operator(decoder: Mask2FormerPixelDecoder) -> None:
    """Replaces classes in a decoder by these; names and weights stay."""
    # The instances keep their weights: new modules would draw initial weights again.
    decoder.__class__ = PixelDecoder
    projections: Any = (*decoder.input_projections, *decoder.lateral_convolutions)
    for projection in projections:
        projection[1].__class__ = ExactGroupNorm
    layers: Any = decoder.encoder.layers
    for layer in layers:
        layer.__class__ = PixelDecoderLayer
        layer.self_attn.__class__ = DeformableAttention

"""Reference of ms_deform_attn and of its gradient.

What non-finite numbers do, here and in the kernels:

- A sample within its map, or less than a pixel beyond it, reads those of the four pixels around it
  that exist, even with a share of 0. A non-finite pixel, attention weight or incoming gradient
  propagates to everything that is computed from it.
- Any other sample reads 0. A NaN weight times this 0 makes the output NaN. But the gradients of the
  sample's location and weight are 0, and it adds nothing to the gradient of any pixel, whatever its
  weight and the incoming gradient are.
- A sample with a NaN location makes the output of its query and head NaN, and the gradients of its
  location and weight. It adds nothing to the gradient of any pixel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from expedite_d2.ops.reference._windows import no_autocast, precise


class _Level(NamedTuple):
    """Maps, samples and weights of one level; R = B * heads."""

    maps: Tensor  # (R, D, h, w)
    grid: Tensor  # (R, Q, points, 2), coordinates of grid_sample
    weights: Tensor  # (R, 1, Q, points)
    present: Tensor  # (R, Q, points): the sample has a pixel
    absent: Tensor  # (R, Q, points), the gradients of a sample that has none: NaN or 0


def _levels(
    value: Tensor,
    spatial_shapes: Sequence[int],
    level_start: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Iterator[_Level]:
    """Yields the levels one by one, in float32 or better."""
    value = precise(value)
    for level, start in enumerate(level_start):
        height, width = spatial_shapes[2 * level], spatial_shapes[2 * level + 1]
        maps = value[:, start : start + height * width].permute(0, 2, 3, 1).flatten(0, 1)
        at = sampling_locations[:, :, :, level].transpose(1, 2).flatten(0, 1).to(value.dtype)
        weights = attention_weights[:, :, :, level].transpose(1, 2).flatten(0, 1).to(value.dtype)
        x, y = at[..., 0] * width - 0.5, at[..., 1] * height - 0.5
        present = (x > -1) & (x < width) & (y > -1) & (y < height)
        unknown = x.isnan() | y.isnan()
        # The derivative of NaN's square is NaN, too: autograd finds what the formula says.
        nan = torch.where(unknown, at.sum(-1), 0.0).square()
        absent = torch.where(unknown, weights * nan, 0.0)
        yield _Level(
            maps.unflatten(2, (height, width)),
            # Values far outside, and NaN, would overflow grid_sample's integers; -1 is outside.
            2 * torch.where(present[..., None], at, -1.0) - 1,
            # Detached, as no gradient passes through the weight of an absent sample.
            torch.where(present, weights, weights.detach() + absent)[:, None],
            present,
            absent,
        )


def ms_deform_attn_ref(
    value: Tensor,
    spatial_shapes: Sequence[int],
    level_start: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Reference of :func:`expedite_d2.ops.ms_deform_attn`; spatial_shapes as h0, w0, h1, w1 ..."""
    with no_autocast(value):
        batch, _, heads, channels = value.shape
        queries = sampling_locations.shape[1]
        out = precise(value).new_zeros(batch * heads, channels, queries)
        for level in _levels(
            value, spatial_shapes, level_start, sampling_locations, attention_weights
        ):
            samples = torch.nn.functional.grid_sample(level.maps, level.grid, align_corners=False)
            out = out + (samples * level.weights).sum(-1)
        out = out.view(batch, heads * channels, queries).transpose(1, 2)
        return out.to(value.dtype).contiguous()


def ms_deform_attn_backward_ref(
    grad: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    level_start: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights for ``grad`` (B, Q, heads * D)."""
    with no_autocast(value):
        batch, _, heads, channels = value.shape
        grad = precise(grad).mT.reshape(batch * heads, channels, grad.shape[1], 1)
        grad_value = torch.zeros_like(precise(value), memory_format=torch.contiguous_format)
        grad_locations, grad_weights = [], []
        for start, level in zip(
            level_start,
            _levels(value, spatial_shapes, level_start, sampling_locations, attention_weights),
            strict=True,
        ):
            samples = torch.nn.functional.grid_sample(level.maps, level.grid, align_corners=False)
            grad_weights.append(torch.where(level.present, (grad * samples).sum(1), level.absent))
            grad_maps, grad_grid = torch.ops.aten.grid_sampler_2d_backward(
                grad * level.weights, level.maps, level.grid, 0, 0, False, [True, True]
            )
            grad_locations.append(
                torch.where(level.present[..., None], 2 * grad_grid, level.absent[..., None])
            )
            rows = grad_maps.flatten(2).unflatten(0, (batch, heads)).permute(0, 3, 1, 2)
            grad_value[:, start : start + rows.shape[1]] += rows

        def per_query(grads: list[Tensor], like: Tensor) -> Tensor:
            return (
                torch.stack(grads, 2).unflatten(0, (batch, heads)).transpose(1, 2)
                .to(like.dtype).contiguous()
            )  # fmt: skip

        return (
            grad_value.to(value.dtype),
            per_query(grad_locations, sampling_locations),
            per_query(grad_weights, attention_weights),
        )

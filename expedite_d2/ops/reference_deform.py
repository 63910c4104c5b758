"""ms_deform_attn in plain PyTorch: oracle of the kernels, and fallback where none is built."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from expedite_d2.ops.reference import no_autocast, precise


class _Level(NamedTuple):
    """What one level adds to the samples of :func:`ms_deform_attn_ref`; R = B * heads."""

    maps: Tensor  # (R, D, h, w)
    grid: Tensor  # (R, Q, points, 2), as grid_sample has it
    weights: Tensor  # (R, 1, Q, points)
    inside: Tensor  # (R, Q, points, 2): where the grid follows the location
    nan: Tensor  # (R, Q, points): NaN where the location has one, else 0


def _levels(
    value: Tensor,
    spatial_shapes: Sequence[int],
    level_start: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Iterator[_Level]:
    """The levels one by one, in float32 or better."""
    value = precise(value)
    for level, start in enumerate(level_start):
        height, width = spatial_shapes[2 * level], spatial_shapes[2 * level + 1]
        maps = value[:, start : start + height * width].permute(0, 2, 3, 1).flatten(0, 1)
        at = sampling_locations[:, :, :, level].transpose(1, 2).flatten(0, 1).to(value.dtype)
        # All is zero outside of -1 ... 2, and far outside grid_sample's integers overflow.
        bounded = at.clamp(-1, 2)
        weights = attention_weights[:, :, :, level].transpose(1, 2).flatten(0, 1).to(value.dtype)
        # What grid_sample makes of NaN depends on the device; here it makes NaN.
        nan = bounded.sum(-1) * 0
        yield _Level(
            maps.unflatten(2, (height, width)),
            (2 * bounded - 1).nan_to_num(0.0),
            (weights + nan)[:, None],
            at == bounded,
            nan,
        )


def ms_deform_attn_ref(
    value: Tensor,
    spatial_shapes: Sequence[int],
    level_start: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Twin of :func:`expedite_d2.ops.ms_deform_attn`; spatial_shapes as h0, w0, h1, w1 ..."""
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
            grad_weights.append((grad * samples).sum(1) + level.nan)
            grad_maps, grad_grid = torch.ops.aten.grid_sampler_2d_backward(
                grad * level.weights, level.maps, level.grid, 0, 0, False, [True, True]
            )
            grad_locations.append(
                torch.where(level.inside, 2 * grad_grid, 0.0) + level.nan[..., None]
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

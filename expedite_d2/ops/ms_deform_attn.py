"""Multi-scale deformable attention: each query sums weighted samples of several feature maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from expedite_d2.ops._checks import check_levels, check_like, check_map, check_samples
from expedite_d2.ops._registration import define, for_type_of
from expedite_d2.ops.reference import ms_deform_attn_backward_ref, ms_deform_attn_ref

# spatial_shapes as h0, w0, h1, w1 ...: schemas have no nested lists.
_ARGUMENTS = (
    "Tensor value, SymInt[] spatial_shapes, SymInt[] level_start, Tensor sampling_locations, "
    "Tensor attention_weights"
)

_ms_deform_attn = define("ms_deform_attn", f"({_ARGUMENTS}) -> Tensor", ms_deform_attn_ref)
_ms_deform_attn_backward = define(
    "_ms_deform_attn_backward",
    f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    ms_deform_attn_backward_ref,
)


@torch.library.register_fake(_ms_deform_attn)
def _fake(
    value: Tensor,
    spatial_shapes: Sequence[int],
    level_start: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    batch, _, heads, channels = value.shape
    return value.new_empty((batch, sampling_locations.shape[1], heads * channels))


@torch.library.register_fake(_ms_deform_attn_backward)
def _backward_fake(
    grad: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    level_start: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (value, sampling_locations, attention_weights)
    value, locations, weights = (x.new_empty(x.shape) for x in inputs)
    return value, locations, weights


@register_flop_formula(torch.ops.expedite_d2.ms_deform_attn)
def _flops(
    value: Sequence[int],
    spatial_shapes: Sequence[int],
    level_start: Sequence[int],
    sampling_locations: Sequence[int],
    *_: object,
    **__: object,
) -> int:
    """Twice the multiply-adds of bilinear sampling, four for each value that is sampled."""
    return 2 * 4 * math.prod(sampling_locations[:-1]) * value[-1]


@register_flop_formula(torch.ops.expedite_d2._ms_deform_attn_backward)
def _backward_flops(grad: Sequence[int], *arguments: Any, **_: object) -> int:
    """Four times the forward: samples, gradients of the maps, and slopes along x and y."""
    return 4 * _flops(*arguments)


def _setup_context(ctx, inputs, output) -> None:
    value, spatial_shapes, level_start, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)
    ctx.levels = spatial_shapes, level_start


def _backward(ctx, grad: Tensor):
    value, locations, weights = ctx.saved_tensors
    grads = _ms_deform_attn_backward(grad, value, *ctx.levels, locations, weights)
    needs = (ctx.needs_input_grad[i] for i in (0, 3, 4))
    value, locations, weights = (x if need else None for x, need in zip(grads, needs, strict=True))
    return value, None, None, locations, weights


torch.library.register_autograd(_ms_deform_attn, _backward, setup_context=_setup_context)


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[Sequence[int]] | Tensor,
    level_start: Sequence[int] | Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Sums, for each query and head, bilinear samples of feature maps of several sizes.

    The sum over levels l and points p of A * V_l(phi), with the attention weight A and the value
    V_l at the sampling location phi ("Deformable DETR", arXiv 2010.04159, equation 3, between its
    two projections). Pixel centres lie at (i + 1/2) / size and outside a map there are zeros, as
    in ``grid_sample`` with ``align_corners=False``.

    Args:
        value: (B, S, heads, D), the maps of all levels, each flattened row by row; float32,
            bfloat16, float16 or float64, of any stride.
        spatial_shapes: (h, w) of each level, as integers. They are needed on the host, to check
            that no kernel reads beyond a map: an integer tensor (levels, 2) is accepted too, but
            only on the CPU, and not under ``torch.compile``.
        level_start: the row of ``value`` at which each level begins, in the same form; None: the
            levels follow one another from the first row and fill ``value``.
        sampling_locations: (B, Q, heads, levels, points, 2), x and y, from 0 to 1 over the map;
            float32 or of the type of ``value``. Half types cannot tell neighbouring pixels of a
            large map apart.
        attention_weights: (B, Q, heads, levels, points), of the type of ``sampling_locations``.

    Returns:
        (B, Q, heads * D), of the type of ``value``. Differentiable in ``value``,
        ``sampling_locations`` and ``attention_weights``.

    Raises:
        ValueError, TypeError: For an argument of wrong shape, value or type.

    Note:
        Coordinates and sums are float32 (float64 for float64 values), also under autocast.
        Deterministic, except for the gradient of ``value`` on CUDA: it is summed in no fixed order,
        which ``torch.use_deterministic_algorithms`` reports.

        A NaN among the locations or weights of a query and head makes its output NaN. The
        gradients of a NaN location and of its weight are NaN, but it adds nothing to the gradient
        of ``value``. A sample a pixel or more beyond its map, or infinitely far, has no gradient
        and adds nothing to that of ``value``, even where its weight or the incoming gradient is
        NaN.
    """
    op = "ms_deform_attn"
    check_map(op, "value", value, "(B, S, heads, D)")
    shapes, starts = check_levels(op, value, spatial_shapes, level_start)
    check_samples(op, value, len(starts), sampling_locations)
    check_like(
        op,
        "attention_weights",
        attention_weights,
        sampling_locations.shape[:-1],
        sampling_locations,
        "sampling_locations",
    )
    run = for_type_of(value, _ms_deform_attn, ms_deform_attn_ref)
    return run(value, shapes, starts, sampling_locations, attention_weights)

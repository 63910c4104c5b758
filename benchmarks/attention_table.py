"""Multi-scale deformable attention for `benchmarks.operators`: shapes, inputs and work.

Its reference is the chain of `grid_sample` calls that models without such a kernel run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.common import difference
from benchmarks.operator_table import KERNELS, Operator, Suite, Work
from expedite_d2.ops import reference


class Case(NamedTuple):
    """A query for each pixel of all maps, as in a pixel decoder's encoder."""

    shapes: tuple[tuple[int, int], ...]
    batch: int = 1
    heads: int = 8
    channels: int = 32  # of a head
    points: int = 4


CASES = {
    # Mask2Former: strides 32, 16 and 8.
    "mask2former_1024": Case(((32, 32), (64, 64), (128, 128))),
    "mask2former_1024_batch8": Case(((32, 32), (64, 64), (128, 128)), batch=8),
    "mask2former_640": Case(((20, 20), (40, 40), (80, 80))),
    "quick_maps": Case(((2, 3), (4, 6)), heads=2, channels=8),
}


class Inputs(NamedTuple):
    """The operator's arguments, and the gradient of its output."""

    value: Tensor
    shapes: list[int]
    starts: list[int]
    locations: Tensor
    weights: Tensor
    grad: Tensor


def make_inputs(case: Case, device: str, dtype: torch.dtype) -> Inputs:
    """Offsets of a few pixels around each query's own place; locations and weights in float32."""
    sizes = [height * width for height, width in case.shapes]
    centres = torch.cat(
        [
            torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(1)
            for h, w in case.shapes
        ]
    ).to(device)
    samples = (case.batch, sum(sizes), case.heads, len(sizes), case.points)
    pixels = torch.tensor(case.shapes, device=device).flip(1)[:, None]
    offsets = 2 * torch.randn(*samples, 2, device=device) / pixels
    value = torch.randn(case.batch, sum(sizes), case.heads, case.channels, device=device)
    return Inputs(
        value.to(dtype),
        [side for shape in case.shapes for side in shape],
        [sum(sizes[:level]) for level in range(len(sizes))],
        centres[:, None, None, None] + offsets,
        torch.randn(samples, device=device).flatten(3).softmax(-1).view(samples),
        torch.randn_like(value).flatten(2).to(dtype),
    )


def _forward_work(x: Inputs) -> Work:
    """Four pixels of each sample."""
    samples, size = x.weights.numel(), x.value.element_size()
    return Work(2 * x.value.numel() * size + 12 * samples, 4 * samples * x.value.shape[3])


def _backward_work(x: Inputs) -> Work:
    """A product with each pixel for the locations and weights, and a sum for its gradient."""
    samples, size = x.weights.numel(), x.value.element_size()
    return Work(3 * x.value.numel() * size + 24 * samples, 8 * samples * x.value.shape[3])


def _largest_difference(result: Any, expected: Any) -> float:
    return max(difference(a, b) for a, b in zip(result, expected, strict=True))


ATTENTION = Suite(
    CASES,
    make_inputs,
    {
        "ms_deform_attn": Operator(
            KERNELS.ms_deform_attn.default,
            reference.ms_deform_attn_ref,
            lambda x: x[:5],
            _forward_work,
        ),
        "ms_deform_attn backward": Operator(
            KERNELS._ms_deform_attn_backward.default,
            reference.ms_deform_attn_backward_ref,
            lambda x: (x.grad, *x[:5]),
            _backward_work,
            difference=_largest_difference,
        ),
    },
)

"""Inputs that the tests of ms_deform_attn share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import expedite_d2.ops  # noqa: F401 (defines the operators)

KERNEL = torch.ops.expedite_d2.ms_deform_attn.default
BACKWARD = torch.ops.expedite_d2._ms_deform_attn_backward.default


class Case(NamedTuple):
    batch: int
    queries: int
    heads: int
    channels: int  # of a head
    shapes: tuple[tuple[int, int], ...]
    points: int = 4

    @property
    def flat(self) -> list[int]:
        return [side for shape in self.shapes for side in shape]

    @property
    def starts(self) -> list[int]:
        sizes = [h * w for h, w in self.shapes]
        return [sum(sizes[:level]) for level in range(len(sizes))]


CASES = {
    "mask2former": Case(2, 70, 8, 32, ((4, 4), (8, 8), (16, 16))),
    "odd": Case(2, 7, 3, 9, ((5, 3), (1, 7)), 3),
    "one_query": Case(1, 1, 2, 16, ((6, 5),), 1),
    "one_pixel": Case(3, 5, 1, 4, ((1, 1), (1, 2), (2, 1)), 2),
    "one_channel": Case(1, 9, 2, 1, ((3, 4), (5, 6)), 4),
    "half_a_vector": Case(1, 11, 2, 20, ((7, 6),), 5),
    "more_than_a_warp": Case(1, 6, 2, 300, ((4, 5), (3, 3)), 2),
    "many_points": Case(1, 5, 2, 8, ((9, 4), (2, 6)), 19),
    "many_images": Case(300, 2, 1, 8, ((2, 3),), 1),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def make_args(
    case: Case, device: str = "cpu", dtype: torch.dtype = torch.float32, margin: float = 0.3
) -> tuple[Any, ...]:
    """The operator's arguments; locations reach beyond the maps by `margin`."""
    generator = torch.Generator().manual_seed(0)
    rows = sum(h * w for h, w in case.shapes)
    samples = (case.batch, case.queries, case.heads, len(case.shapes), case.points)
    value = torch.randn(case.batch, rows, case.heads, case.channels, generator=generator)
    locations = torch.rand(*samples, 2, generator=generator) * (1 + 2 * margin) - margin
    weights = torch.randn(samples, generator=generator).flatten(3).softmax(-1).view(samples)
    return (
        value.to(device, dtype),
        case.flat,
        case.starts,
        locations.to(device),
        weights.to(device),
    )


def double(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.double() if isinstance(a, Tensor) else a for a in args)


def strided(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same numbers: heads before rows, coordinates apart, weights with gaps."""
    value, shapes, starts, locations, weights = args
    value = value.transpose(1, 2).contiguous().transpose(1, 2)
    locations = locations.movedim(-1, 0).contiguous().movedim(0, -1)
    weights = torch.stack([weights, weights + 1], -1)[..., 0]
    return value, shapes, starts, locations, weights


def gradients(run: Callable[..., Tensor], args: tuple[Any, ...], weight: Tensor) -> list[Tensor]:
    """Of value, locations and weights, for the output weighted by `weight`."""
    leaves = [a.detach().clone().requires_grad_() if isinstance(a, Tensor) else a for a in args]
    (run(*leaves) * weight.to(leaves[0].dtype)).sum().backward()
    return [leaf.grad for leaf in leaves if isinstance(leaf, Tensor)]

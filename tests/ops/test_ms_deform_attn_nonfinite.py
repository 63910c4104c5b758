"""ms_deform_attn with NaN and infinity in every argument: which results they reach, and no other.

The meaning is written out once more, in plain loops over the pixels around each sample.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from deform_cases import BACKWARD, KERNEL, gradients
from op_cases import assert_kernel, each_dtype
from torch import Tensor

from expedite_d2.ops.reference import ms_deform_attn_backward_ref, ms_deform_attn_ref

# Sides are powers of two: every place below is exact in each of the types.
SHAPES = ((2, 4), (1, 2))
STARTS = [0, 8]
ROWS, HEADS, CHANNELS, QUERIES, POINTS = 10, 2, 3, 4, 2

#: x and y of the sample that is looked at, in pixels of a map of 2 x 4: 0 is the first's centre.
PLACES = {
    "inside": (1.25, 0.5),
    "at_a_centre": (2.0, 1.0),
    "across_the_left_rim": (-0.5, 0.25),
    "across_the_lower_right_corner": (3.5, 1.75),
    "at_the_far_side_of_the_left_rim": (-1.0, 0.5),
    "at_the_far_side_of_the_lower_rim": (1.5, 2.0),
    "outside": (-2.5, 0.5),
    "far_outside": (1e4, 1e4),
    "infinitely_far": (math.inf, 0.5),
    "nan": (math.nan, 0.5),
    "nan_and_infinitely_far": (-math.inf, math.nan),
}
BADS = [math.nan, math.inf, -math.inf]
#: Query, head, level, point of the sample; its pixels' neighbours belong to others, too.
WHERE = (2, 1, 0, 1)


class Inputs(NamedTuple):
    value: Tensor
    locations: Tensor
    weights: Tensor
    grad: Tensor

    def args(self) -> tuple:
        flat = [side for shape in SHAPES for side in shape]
        return self.value, flat, STARTS, self.locations, self.weights

    def to(self, device: str, dtype: torch.dtype) -> Inputs:
        return Inputs(*(x.to(device, dtype) for x in self))


def in_map(place: tuple[float, float]) -> tuple[float, float]:
    """A place as the operator has it, from 0 to 1."""
    return (place[0] + 0.5) / 4, (place[1] + 0.5) / 2


def make_inputs(place: tuple[float, float]) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    samples = (1, QUERIES, HEADS, len(SHAPES), POINTS)
    # Eighths: centres of pixels, halves between them, and places beyond each rim.
    locations = torch.randint(-3, 12, (*samples, 2), generator=generator) / 8
    q, h, level, p = WHERE
    locations[0, q, h, level, p] = torch.tensor(in_map(place))
    return Inputs(
        torch.rand(1, ROWS, HEADS, CHANNELS, generator=generator) + 0.5,
        locations,
        torch.rand(samples, generator=generator) + 0.5,
        torch.rand(1, QUERIES, HEADS * CHANNELS, generator=generator) + 0.5,
    )


def pixels(level: int, x: float, y: float) -> list[int]:
    """The rows of value of the pixels around a place; none for a sample outside."""
    height, width = SHAPES[level]
    x, y = x * width - 0.5, y * height - 0.5
    if not (-1 < x < width and -1 < y < height):
        return []
    corners = itertools.product((0, 1), (0, 1))
    found = [(math.floor(y) + dy, math.floor(x) + dx) for dy, dx in corners]
    rows = [STARTS[level] + r * width + c for r, c in found if 0 <= r < height and 0 <= c < width]
    assert rows
    return rows


class Reached(NamedTuple):
    """Where the output and gradients are not finite."""

    out: Tensor
    value: Tensor
    locations: Tensor
    weights: Tensor


def reached(inputs: Inputs) -> Reached:
    grad = ~inputs.grad.isfinite().view(1, QUERIES, HEADS, CHANNELS)
    value, weights = ~inputs.value.isfinite(), ~inputs.weights.isfinite()
    hit = Reached(*(torch.zeros_like(x) for x in (grad, value, inputs.locations > 0, weights)))
    for index in itertools.product(*(range(n) for n in weights.shape)):
        b, q, h, level, _ = index
        x, y = inputs.locations[index].tolist()
        rows = pixels(level, x, y)
        if math.isnan(x) or math.isnan(y):
            hit.out[b, q, h] = hit.weights[index] = True
            hit.locations[index] = True
        hit.out[b, q, h] |= weights[index]
        if rows:
            hit.out[b, q, h] |= value[b, rows, h].any(0)
            hit.value[b, rows, h] |= weights[index] | grad[b, q, h]
            hit.weights[index] |= (grad[b, q, h] | value[b, rows, h]).any()
            hit.locations[index] |= hit.weights[index] | weights[index]
    return hit._replace(out=hit.out.flatten(2))


def check(inputs: Inputs, expected: Reached, found: list[Tensor], bad: float) -> None:
    for name, mask, x in zip(Reached._fields, expected, found, strict=True):
        assert torch.equal(~x.isfinite().cpu(), mask), name
        if math.isnan(bad):
            assert torch.equal(x.isnan().cpu(), mask), name


def spoil(inputs: Inputs, what: str, bad: float) -> None:
    q, h, level, p = WHERE
    if what == "value":  # the pixel in row 1, column 2
        inputs.value[0, 6, h, 1] = bad
    elif what == "value beside":  # which no place reaches but those across the lower right corner
        inputs.value[0, 7, h, 0] = bad
    elif what == "weight":
        inputs.weights[0, q, h, level, p] = bad
    elif what == "grad":
        inputs.grad[0, q, h * CHANNELS + 2] = bad


@pytest.mark.parametrize("what", ["nothing", "value", "value beside", "weight", "grad"])
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
@each_dtype
def test_ms_deform_attn_reach_of_nan_and_infinity(dtype, place, what, device):
    for name in ("ms_deform_attn", "_ms_deform_attn_backward"):
        assert_kernel(name, device)
    for bad in BADS if what != "nothing" else [math.nan]:
        inputs = make_inputs(place)
        spoil(inputs, what, bad)
        expected = reached(inputs)
        typed = inputs.to(device, dtype)
        for run, backward in (
            (KERNEL, BACKWARD),
            (ms_deform_attn_ref, ms_deform_attn_backward_ref),
        ):
            found = [run(*typed.args()), *backward(typed.grad, *typed.args())]
            check(inputs, expected, found, bad)
        # What autograd makes of the reference, which is how float64 is differentiated.
        exact = inputs.to(device, torch.float64)
        args = exact.args()
        found = [ms_deform_attn_ref(*args), *gradients(ms_deform_attn_ref, args, exact.grad)]
        check(inputs, expected, found, bad)


def test_ms_deform_attn_places_are_where_their_names_say():
    counts = {name: len(pixels(0, *in_map(place))) for name, place in PLACES.items()}
    assert {name: count for name, count in counts.items() if count} == {
        "inside": 4,
        "at_a_centre": 2,
        "across_the_left_rim": 2,
        "across_the_lower_right_corner": 1,
    }

"""A NaN or infinity in an argument of a token operator does the same in kernel and reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from op_cases import CASES, Sample, assert_kernel, each_dtype, make_sample
from torch import Tensor

from expedite_d2.ops import reference

BADS = [math.nan, math.inf, -math.inf]
each_bad = pytest.mark.parametrize("bad", BADS, ids=str)
# Small windows, ragged ones of fewer cells than are asked for, one of a single cell, whole images.
each_name = pytest.mark.parametrize(
    "name", ["windows", "ragged", "ragged_odd", "one_cluster", "one_channel", "image_odd"]
)

#: What each operator is given a bad number in.
ARGUMENTS = {
    "token_spread": ["tokens"],
    "token_cluster": ["tokens", "spread"],
    "token_match": ["tokens", "centres", "spread"],
    "token_reduce": ["tokens"],
    "token_reconstruct": ["tokens", "centres", "refined", "weights"],
    "token_pool": ["tokens"],
}


def spoilt(sample: Sample, what: str, bad: float) -> Sample:
    """The sample with one number replaced, in its first image."""
    changed = getattr(sample, what).clone(memory_format=torch.contiguous_format)
    first = changed[0].view(-1)
    first[first.numel() // 3] = bad
    return sample._replace(**{what: changed})


def arguments(operator: str, sample: Sample) -> tuple[Any, ...]:
    return getattr(sample, operator.removeprefix("token_") + "_args")()


def run_both(operator: str, args: tuple[Any, ...]) -> list[tuple[Tensor, Tensor]]:
    found = getattr(torch.ops.expedite_d2, operator)(*args)
    expected = getattr(reference, operator + "_ref")(*args)
    if isinstance(found, Tensor):
        found, expected = (found,), (expected,)
    return list(zip(found, expected, strict=True))


@each_name
@each_dtype
@pytest.mark.parametrize(
    "operator, what", [(name, what) for name, all_of in ARGUMENTS.items() for what in all_of]
)
def test_nan_and_infinity_reach_the_same_as_in_reference(operator, what, name, dtype, device):
    assert_kernel(operator, device)
    for bad in BADS:
        sample = spoilt(make_sample(CASES[name], device, dtype), what, bad)
        for found, expected in run_both(operator, arguments(operator, sample)):
            if found.dtype == torch.int32:
                assert torch.equal(found, expected)
            else:
                assert torch.equal(found.isnan(), expected.isnan())
                assert torch.equal(found.isfinite(), expected.isfinite())
                if len(found) > 1:  # the other image
                    assert found[1].isfinite().all()


each_run = pytest.mark.parametrize("run", ["kernel", "reference"])


@each_run
@each_bad
def test_token_match_of_a_centre_that_is_not_finite(bad, run, device):
    """An infinite centre is infinitely far, on whichever side; one at NaN spoils who takes it."""
    match = reference.token_match_ref if run == "reference" else torch.ops.expedite_d2.token_match
    tokens = torch.tensor([-3.0, -1, 0, 1, 2, 5], device=device).view(1, 1, 6, 1)
    centres = torch.tensor([bad, 1.0, 4.0], device=device).view(1, 1, 3, 1)
    for topk in (1, 2, 3):
        indices, weights = match(tokens, centres, (1, 3), None, topk, 0.1, None)
        order = [[1, 2, 0]] * 5 + [[2, 1, 0]]
        assert indices.view(6, topk).tolist() == [row[:topk] for row in order]
        if topk == 3 and math.isnan(bad):
            assert weights.isnan().all()
        else:
            torch.testing.assert_close(weights.sum(-1), torch.ones(1, 1, 6, device=device))
            assert (weights[..., 2:] == 0).all() and (weights[..., :2] > 0).all()


@each_run
@each_bad
def test_token_match_pads_with_nan_beside_nan(bad, run, device):
    """A window of one cell: the places that repeat it are NaN where its own weight is."""
    case = CASES["one_cluster"]
    args = spoilt(make_sample(case, device), "tokens", bad).match_args()
    match = reference.token_match_ref if run == "reference" else torch.ops.expedite_d2.token_match
    weights = match(*args)[1]
    nan = weights.isnan()
    assert torch.equal(nan.any(-1), nan.all(-1)) and nan.any(-1).sum() == 1
    assert (weights[~nan.any(-1)] == torch.tensor([1.0, 0, 0, 0], device=device)).all()


@each_run
def test_token_cluster_of_an_infinite_spread_is_the_mean_of_candidates(run, device):
    """A temperature of 0 makes all candidates equal, and no NaN."""
    case = CASES["windows"]
    sample = make_sample(case, device)
    sample = sample._replace(spread=torch.full_like(sample.spread, math.inf))
    kernel = torch.ops.expedite_d2.token_cluster
    cluster = reference.token_cluster_ref if run == "reference" else kernel
    out = cluster(*sample.cluster_args())
    tokens, rest = sample.cluster_args()[0], sample.cluster_args()[1:5]
    expected = reference.token_cluster_ref(tokens.double(), *rest, 1e-30, None)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)

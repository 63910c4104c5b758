from __future__ import annotations

import math

import pytest
import torch
from op_cases import (
    CASES,
    TEMPERATURE,
    assert_kernel,
    double,
    each_case,
    each_dtype,
    make_sample,
    make_tokens,
    squared_distance,
)

from expedite_d2.ops import token_match
from expedite_d2.ops.reference import token_match_ref


def row(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, 1, -1, 1)


LN2 = math.log(2)
# tokens, centres, clusters, window, topk, temperature, indices, weights
LITERALS = {
    # Token 2 is as far from all three centres, token 5 from the last two: the lower index wins.
    "ties": (
        row(0, 2, 5), row(0, 4, 4), (1, 3), None, 2, LN2 / 16,
        [[0, 1], [0, 1], [1, 2]], [[2 / 3, 1 / 3], [0.5, 0.5], [0.5, 0.5]],
    ),
    "fewer_centres_than_topk": (
        row(0, 1, 3), row(0, 2), (1, 2), None, 3, LN2 / 4,
        [[0, 1, 0], [0, 1, 0], [1, 0, 1]],
        [[2 / 3, 1 / 3, 0], [0.5, 0.5, 0], [4 / 5, 1 / 5, 0]],
    ),
    # Windows of 2 tokens and 2 cells; the last has one of each. Indices count along the whole map.
    "ragged_windows": (
        row(0, 4, 1, 1, 7), row(0, 4, 1, 1, 7), (1, 2), (1, 2), 2, LN2 / 16,
        [[0, 1], [1, 0], [2, 3], [2, 3], [4, 4]],
        [[2 / 3, 1 / 3], [2 / 3, 1 / 3], [0.5, 0.5], [0.5, 0.5], [1, 0]],
    ),
    # All raw exponentials underflow, but the weights still sum to 1.
    "far": (row(0, 0), row(1000, 1000), (1, 2), None, 2, 1.0, [[0, 1]] * 2, [[0.5, 0.5]] * 2),
    "one_centre": (row(0, 5), row(1), (1, 1), None, 1, 3.0, [[0], [0]], [[1], [1]]),
}  # fmt: skip


@pytest.mark.parametrize("literal", LITERALS.values(), ids=LITERALS.keys())
@pytest.mark.parametrize("columns", [False, True], ids=["along_width", "along_height"])
def test_token_match_literals(literal, columns, device):
    tokens, centres, clusters, window, topk, temperature, indices, weights = literal
    if columns:
        tokens, centres = tokens.transpose(1, 2), centres.transpose(1, 2)
        clusters, window = clusters[::-1], window and window[::-1]
    args = (tokens.to(device), centres.to(device), clusters, window, topk, temperature, None)
    for run in (token_match_ref, torch.ops.expedite_d2.token_match.default):
        out_indices, out_weights = run(*args)
        assert out_indices.dtype == torch.int32 and out_weights.dtype == torch.float32
        assert out_indices.flatten(0, 2).tolist() == indices
        expected = torch.tensor(weights, dtype=torch.float32)
        torch.testing.assert_close(out_weights.flatten(0, 2).cpu(), expected, rtol=1e-5, atol=1e-6)


def test_token_match_indices_of_windows_are_linear_in_the_map(device):
    # A map of 2 x 2 windows with 2 x 2 cells each; token and centre of a place are the same.
    x = torch.arange(16.0, device=device).view(1, 4, 4, 1).square()
    for run in (token_match_ref, torch.ops.expedite_d2.token_match.default):
        indices, weights = run(x, x, (2, 2), (2, 2), 1, 1.0, None)
        assert indices.flatten().tolist() == list(range(16))
        assert weights.flatten().tolist() == [1.0] * 16


@each_case
@each_dtype
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
def test_token_match_kernel_equals_reference(case, dtype, strided, device):
    assert_kernel("token_match", device)
    sample = make_sample(case, device, dtype, strided)
    for topk in (1, 4, 11):
        args = sample.match_args(topk)
        indices, weights = torch.ops.expedite_d2.token_match(*args)
        assert indices.is_contiguous() and weights.is_contiguous()
        expected_indices, expected_weights = token_match_ref(*double(args))
        found = squared_distance(sample.tokens, sample.centres, indices)
        best = squared_distance(sample.tokens, sample.centres, expected_indices)
        # Another centre in the same place is right where it is as near.
        scale = sample.spread.view(-1, 1, 1, 1).double()
        different = indices != expected_indices
        assert ((found - best).abs() <= 1e-4 * scale)[different].all()
        torch.testing.assert_close(weights, expected_weights, rtol=1e-3, atol=1e-4)
        _assert_distinct_where_enough(indices, weights)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def _assert_distinct_where_enough(indices: torch.Tensor, weights: torch.Tensor) -> None:
    """A centre comes twice only as the nearest one, repeated with weight 0."""
    repeated = (indices == indices[..., :1]).clone()
    repeated[..., 0] = False
    assert (weights[repeated] == 0).all()
    stand_in = -1 - torch.arange(indices.shape[-1], device=indices.device)
    rest = torch.where(repeated, stand_in, indices)
    ordered = rest.sort(-1).values
    assert (ordered[..., 1:] != ordered[..., :-1]).all()


@each_case
def test_token_match_reference_float32_equals_float64(case):
    args = make_sample(case).match_args()
    _, weights = token_match_ref(*args)
    torch.testing.assert_close(weights, token_match_ref(*double(args))[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["windows", "image", "ragged"])
def test_token_match_with_large_offset(name, device):
    assert_kernel("token_match", device)
    case = CASES[name]
    tokens = make_tokens(case, offset=300.0).to(device)
    sample = make_sample(case, device)
    centres = sample.centres + 298.0
    args = (case.clusters, case.window, 4, TEMPERATURE, sample.spread)
    _, weights = torch.ops.expedite_d2.token_match(tokens, centres, *args)
    _, expected = token_match_ref(tokens.double(), centres.double(), *args)
    torch.testing.assert_close(weights, expected, rtol=1e-2, atol=1e-3)


def test_token_match_empty_batch(device):
    tokens, centres = torch.zeros(0, 9, 8, 3, device=device), torch.zeros(0, 5, 4, 3, device=device)
    indices, weights = token_match(tokens, centres, (2, 2), window=(4, 4), temperature=1.0)
    assert indices.shape == weights.shape == (0, 9, 8, 4)
    assert indices.dtype == torch.int32 and weights.dtype == torch.float32


@pytest.mark.parametrize("run", ["kernel", "reference"])
@pytest.mark.parametrize("name", ["windows", "ragged", "image"])
def test_token_match_nan(name, run, device):
    case = CASES[name]
    sample = make_sample(case, device)
    function = token_match_ref if run == "reference" else torch.ops.expedite_d2.token_match
    cells = case.map_size[0] * case.map_size[1]
    tokens = sample.tokens.clone()
    tokens[0, -1, -1] = torch.nan
    tokens[0, 1, 2, 0] = torch.nan
    args = (case.clusters, case.window, 4, TEMPERATURE, sample.spread)
    indices, weights = function(tokens, sample.centres, *args)
    assert 0 <= indices.min() and indices.max() < cells
    spoilt = weights.isnan().any(-1)
    assert spoilt[0, -1, -1] and spoilt[0, 1, 2] and spoilt.sum() == 2

    # A centre at NaN is the last choice: with enough others, nobody's.
    centres = sample.centres.clone()
    centres[0, 0, 0] = torch.nan
    indices, weights = function(sample.tokens, centres, *args)
    assert 0 <= indices.min() and indices.max() < cells
    assert not weights.isnan().any() and not (indices[0] == 0).any()

    indices, weights = function(tokens * torch.nan, centres * torch.nan, *args)
    assert 0 <= indices.min() and indices.max() < cells
    assert weights[..., 0].isnan().all()


def test_token_match_of_many_windows(device):
    for shape in ((1, 257, 257, 2), (65537, 1, 2, 2)):
        tokens = torch.rand(shape, device=device)
        indices, weights = token_match(
            tokens, tokens, (1, 1), window=(1, 1), topk=2, temperature=1.0
        )
        place = torch.arange(shape[1] * shape[2], device=device).view(shape[1:3])[..., None]
        assert (indices == place).all()
        assert (weights[..., 0] == 1).all() and (weights[..., 1] == 0).all()


def test_token_match_does_not_require_grad(device):
    sample = make_sample(CASES["windows"], device)
    for tokens, centres in (
        (sample.tokens.requires_grad_(), sample.centres.requires_grad_()),
        (sample.tokens.double(), sample.centres.double()),
    ):
        indices, weights = token_match(tokens, centres, (8, 8), window=(12, 12), temperature=1.0)
        assert not indices.requires_grad and not weights.requires_grad

from __future__ import annotations

import math

import pytest
import torch
from op_cases import (
    CASES,
    TEMPERATURE,
    assert_centres_close,
    assert_kernel,
    double,
    each_case,
    each_dtype,
    make_sample,
    make_tokens,
)

from expedite_d2.ops import token_cluster
from expedite_d2.ops.reference import token_cluster_ref


def row(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, 1, -1, 1)


LN3 = math.log(3)
# tokens, clusters, window, iterations, neighbourhood, temperature, spread, centres
LITERALS = {
    "pooling": (row(0, 1, 4, 6), (1, 2), None, 0, 5, 1.0, None, row(0.5, 5)),
    # Cells of 3 tokens in 2: the middle one belongs to both.
    "overlapping_pooling": (row(0, 2, 6), (1, 2), None, 0, 5, 1.0, None, row(1, 4)),
    # Home cells alone: the averages are already the answer.
    "home_only": (row(0, 1, 4, 6), (1, 2), None, 3, 1, 1.0, None, row(0.5, 5)),
    # Distances to 0.5 and 1.5 differ by 2, 0, 0, 2: responsibilities 3/4, 1/2, 1/2, 1/4.
    "one_iteration": (row(0, 1, 1, 2), (1, 2), None, 1, 3, LN3 / 2, None, row(0.75, 1.25)),
    "spread": (
        row(0, 1, 1, 2), (1, 2), None, 1, 3, LN3, torch.tensor([2.0]), row(0.75, 1.25),
    ),
    # Windows do not see each other; the last has one token, hence one of its two cells.
    "ragged_window": (
        row(0, 1, 1, 2, 9), (1, 2), (1, 4), 1, 3, LN3 / 2, None, row(0.75, 1.25, 9),
    ),
    # exp(-2500) is 0: the cell {0, 100} gets nothing and keeps its average.
    "dead_by_distance": (row(0, 0, 100, 100), (1, 3), None, 2, 3, 1.0, None, row(0, 50, 100)),
    # More cells than tokens: the last is nobody's home and keeps its token.
    "dead_by_place": (row(3, 5), (1, 3), None, 1, 1, 1.0, None, row(3, 5, 5)),
    # A spread of the smallest normal float: the temperature overflows, but equals stay equal.
    "constant": (
        row(3, 3, 3, 3), (1, 2), None, 5, 5, 32.0, torch.tensor([1.1754944e-38]), row(3, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("literal", LITERALS.values(), ids=LITERALS.keys())
@pytest.mark.parametrize("columns", [False, True], ids=["along_width", "along_height"])
def test_token_cluster_literals(literal, columns, device):
    tokens, clusters, window, *settings, spread, expected = literal
    if columns:
        tokens, expected = tokens.transpose(1, 2), expected.transpose(1, 2)
        clusters, window = clusters[::-1], window and window[::-1]
    spread = None if spread is None else spread.to(device)
    for run in (token_cluster_ref, torch.ops.expedite_d2.token_cluster.default):
        out = run(tokens.to(device), clusters, window, *settings, spread)
        torch.testing.assert_close(out.cpu(), expected, rtol=1e-6, atol=1e-6)


@each_case
@each_dtype
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
def test_token_cluster_kernel_equals_reference(case, dtype, strided, device):
    assert_kernel("token_cluster", device)
    sample = make_sample(case, device, dtype, strided)
    for iterations in (0, 1, 5):
        args = sample.cluster_args(iterations)
        out = torch.ops.expedite_d2.token_cluster(*args)
        expected = token_cluster_ref(*double(args))
        assert out.is_contiguous() and out.shape[1:3] == case.map_size
        assert_centres_close(out, expected)


@each_case
def test_token_cluster_reference_float32_equals_float64(case):
    args = make_sample(case).cluster_args()
    assert_centres_close(token_cluster_ref(*args), token_cluster_ref(*double(args)))


@pytest.mark.parametrize("name", ["windows", "image", "ragged"])
def test_token_cluster_with_large_offset(name, device):
    assert_kernel("token_cluster", device)
    case = CASES[name]
    tokens = make_tokens(case, offset=300.0).to(device)
    spread = torch.ops.expedite_d2.token_spread(tokens, case.clusters, case.window, 5)
    args = (case.clusters, case.window, 5, 5, 32.0, spread)
    out = torch.ops.expedite_d2.token_cluster(tokens, *args)
    expected = token_cluster_ref(tokens.double(), *args).float()
    # 300 is stored to 3e-5; without subtracting a mean first, errors are a hundred times that.
    torch.testing.assert_close(out, expected, rtol=0, atol=5e-4)


@pytest.mark.parametrize("name", ["windows", "image", "ragged"])
def test_token_cluster_sharp_temperature(name, device):
    assert_kernel("token_cluster", device)
    sample = make_sample(CASES[name], device)
    args = list(sample.cluster_args())
    args[5] = 1e4
    out = torch.ops.expedite_d2.token_cluster(*args)
    assert out.isfinite().all()
    expected = token_cluster_ref(*double(tuple(args))).float()
    # As hard k-means: a token on the edge may fall to either side, a few centres may differ.
    same = torch.isclose(out, expected, rtol=1e-3, atol=1e-3).float().mean()
    assert same > 0.97


def test_token_cluster_empty_batch(device):
    tokens = torch.zeros(0, 9, 8, 3, device=device)
    out = token_cluster(tokens, (2, 2), window=(4, 4), temperature=1.0)
    assert out.shape == (0, 5, 4, 3)


@pytest.mark.parametrize("run", ["kernel", "reference"])
@pytest.mark.parametrize("name", ["windows", "image"])
def test_token_cluster_nan_stays_in_its_window(name, run, device):
    case = CASES[name]
    tokens = make_tokens(case).to(device)
    tokens[1, 2, 3, 0] = torch.nan
    args = (case.clusters, case.window, 3, 5, TEMPERATURE, None)
    function = token_cluster_ref if run == "reference" else torch.ops.expedite_d2.token_cluster
    out = function(tokens, *args)
    spoilt = out.isnan().any(-1)
    assert not spoilt[0].any()
    # The cell that holds the token, and never a cell of another window.
    window = case.window or case.shape[1:3]
    assert spoilt[1, 2 * case.clusters[0] // window[0], 3 * case.clusters[1] // window[1]]
    assert not spoilt[1, case.clusters[0] :].any() and not spoilt[1, :, case.clusters[1] :].any()


def test_token_cluster_of_many_windows(device):
    for shape in ((1, 257, 257, 2), (65537, 2, 1, 2)):
        tokens = torch.arange(math.prod(shape), dtype=torch.float32, device=device).view(shape)
        out = token_cluster(tokens, (1, 1), window=(1, 1), temperature=1.0)
        torch.testing.assert_close(out, tokens, rtol=1e-6, atol=0)


@each_case
def test_token_cluster_gradient_is_the_references(case, device):
    sample = make_sample(case, device)
    exact = sample.tokens.double().requires_grad_()
    expected = token_cluster_ref(exact, *sample.cluster_args()[1:])
    weight = torch.linspace(-1, 1, expected.numel(), device=device).view(expected.shape)
    (expected * weight).sum().backward()

    tokens = sample.tokens.clone().requires_grad_()
    out = torch.ops.expedite_d2.token_cluster(tokens, *sample.cluster_args()[1:])
    (out * weight).sum().backward()
    torch.testing.assert_close(tokens.grad, exact.grad.float(), rtol=1e-3, atol=2e-4)


def test_token_cluster_without_grad_saves_nothing(device):
    sample = make_sample(CASES["windows"], device)
    assert torch.ops.expedite_d2.token_cluster(*sample.cluster_args()).grad_fn is None
    with torch.no_grad():
        tokens = sample.tokens.requires_grad_()
        assert token_cluster(tokens, (8, 8), window=(12, 12), temperature=1.0).grad_fn is None

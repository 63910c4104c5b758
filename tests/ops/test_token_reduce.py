from __future__ import annotations

import math

import pytest
import torch
from op_cases import (
    CASES,
    TEMPERATURE,
    Case,
    assert_centres_close,
    assert_kernel,
    each_dtype,
    make_tokens,
    squared_distance,
)

from expedite_d2.ops import token_cluster, token_match, token_reduce, token_spread
from expedite_d2.ops.reference import token_match_ref, token_reduce_ref, token_spread_ref

TINY = torch.finfo(torch.float32).tiny
# Windows with channels enough for the path on CUDA that shares their distances, and whole images
# that are small enough for it.
SHARED = {
    "swin": Case((1, 24, 24, 384), (8, 8), (12, 12)),
    "swin_ragged": Case((2, 13, 26, 288), (8, 8), (12, 12)),
    "swin_tiny": Case((2, 15, 14, 320), (5, 5), (7, 7)),
    "ragged_many": Case((2, 17, 23, 320), (2, 3), (5, 4)),
    "ragged_odd_channels": Case((1, 19, 7, 333), (5, 3), (8, 5), 3),
    "more_squares_than_warps": Case((1, 14, 15, 516), (5, 5), (14, 14)),
    "more_cells_than_tokens": Case((1, 4, 6, 400), (5, 6), (3, 3), 1),
    "home_alone": Case((1, 12, 12, 240), (3, 3), (6, 6), 1),
    "one_cluster_shared": Case((2, 12, 12, 260), (1, 1), (6, 6)),
    "small_image": Case((2, 10, 11, 300), (7, 6), None),
}
ALL = CASES | SHARED
each_case = pytest.mark.parametrize("case", ALL.values(), ids=ALL.keys())
each_temperature = pytest.mark.parametrize("automatic", [False, True], ids=["fixed", "automatic"])


def arguments(case: Case, automatic: bool, iterations: int = 5, topk: int = 4) -> tuple:
    # Squared distances grow with the channels: a fixed temperature about as sharp as the other.
    temperature = TEMPERATURE if automatic else 3 * TEMPERATURE / case.shape[3]
    settings = (case.neighbourhood, topk, temperature, automatic)
    return case.clusters, case.window, iterations, *settings


def run(tokens: torch.Tensor, args: tuple) -> tuple[torch.Tensor, ...]:
    return torch.ops.expedite_d2.token_reduce(tokens, *args)


@pytest.mark.cuda
def test_token_reduce_has_a_kernel():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    assert_kernel("token_reduce", "cuda")


@each_case
@each_dtype
@each_temperature
def test_token_reduce_equals_reference(case, dtype, automatic, device):
    tokens = make_tokens(case).to(device, dtype)
    for iterations, topk in ((0, 1), (5, 4), (1, 11)):
        args = arguments(case, automatic, iterations, topk)
        spread, centres, indices, weights = run(tokens, args)
        exact = token_reduce_ref(tokens.double(), *args)
        torch.testing.assert_close(spread, exact[0], rtol=2e-5, atol=0)
        assert centres.dtype == dtype and centres.shape[1:3] == case.map_size
        assert all(x.is_contiguous() for x in (spread, centres, indices, weights))
        assert_centres_close(centres, exact[1])
        # Tokens of half types may be matched to the centres before those are rounded.
        precise = run(tokens.float(), args)[1]
        assert any(
            _are_matches(tokens, s, args, exact[0], indices, weights) for s in (centres, precise)
        )
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def _are_matches(tokens, centres, args, spread, indices, weights) -> bool:
    """Whether they are the nearest ones of these centres, with their weights."""
    clusters, window, _, neighbourhood, topk, temperature, _ = args
    exact = tokens.double()
    expected = token_match_ref(exact, centres.double(), *args[:2], topk, temperature, spread)
    found = squared_distance(tokens, centres, indices)
    best = squared_distance(tokens, centres, expected[0])
    # Distances from products are as precise as the tokens are far from their mean: to the last bits
    # of the deviation. Another centre in the same place is right where it is as near.
    deviation = (exact - exact.mean((1, 2), keepdim=True)).square().sum(-1).mean((1, 2))
    scale = token_spread_ref(exact, clusters, window, neighbourhood).double()
    rounded = (1e-4 * scale + 2e-6 * deviation).view(-1, 1, 1, 1)
    different = indices != expected[0]
    nearest = ((found - best).abs() <= rounded)[different].all()
    # Where the spread is at its floor, so is the precision.
    sharp = (temperature * 1e-6 * deviation / spread).view(-1, 1, 1, 1)
    close = (weights - expected[1]).abs() <= 1e-4 + 1e-3 * expected[1] + sharp
    return bool(nearest and close.all())


@pytest.mark.parametrize("name", ["swin", "ragged_many", "image"])
def test_token_reduce_is_its_parts(name, device):
    case = ALL[name]
    tokens = make_tokens(case).to(device)
    spread, centres, indices, weights = run(tokens, arguments(case, True))
    expected = token_spread(tokens, case.clusters, window=case.window)
    torch.testing.assert_close(spread, expected, rtol=2e-5, atol=0)
    rest = {"window": case.window, "temperature": TEMPERATURE, "spread": spread}
    expected = token_cluster(tokens, case.clusters, **rest)
    assert_centres_close(centres, expected.double())
    expected_indices, expected = token_match(tokens, centres, case.clusters, **rest)
    assert (indices == expected_indices).float().mean() > 0.999
    torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["swin", "swin_ragged"])
def test_token_reduce_with_large_offset(name, device):
    case = ALL[name]
    tokens = make_tokens(case, offset=300.0).to(device)
    args = arguments(case, True)
    spread, centres, _, weights = run(tokens, args)
    exact = token_reduce_ref(tokens.double(), *args)
    torch.testing.assert_close(spread, exact[0], rtol=1e-4, atol=0)
    # 300 is stored to 3e-5; without subtracting a mean first, errors are a hundred times that.
    torch.testing.assert_close(centres, exact[1].float(), rtol=0, atol=5e-4)
    torch.testing.assert_close(weights, exact[3], rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("run", [token_reduce_ref, torch.ops.expedite_d2.token_reduce])
@each_temperature
def test_token_reduce_of_a_constant_image(run, automatic, device):
    case = SHARED["swin_ragged"]
    tokens = torch.full(case.shape, 3.0, device=device)
    spread, centres, indices, weights = run(tokens, *arguments(case, automatic))
    # What rounding leaves of the distance to the mean.
    assert ((spread >= TINY) & (spread < 1e-12)).all() if automatic else (spread == 1).all()
    torch.testing.assert_close(centres, torch.full_like(centres, 3.0), rtol=1e-6, atol=0)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert 0 <= indices.min() and indices.max() < math.prod(case.map_size)


@pytest.mark.parametrize("name", ["swin", "one_window"])
def test_token_reduce_floor_of_spread(name, device):
    """Windows that are constant each: the spread is a millionth of the variance between them."""
    case = ALL[name]._replace(shape=(2, 24, 24, 256), window=(12, 12))
    tokens = torch.zeros(case.shape, device=device)
    tokens[:, :12, 12:, ::2] = 5.0
    tokens[1, 12:] = -1.0
    args = arguments(case, True)
    torch.testing.assert_close(
        run(tokens, args)[0], token_reduce_ref(tokens.double(), *args)[0], rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("name", ["swin_tiny", "windows", "image"])
@pytest.mark.parametrize("run", [token_reduce_ref, torch.ops.expedite_d2.token_reduce])
def test_token_reduce_nan_stays_in_its_window(name, run, device):
    case = ALL[name]
    good = make_tokens(case).to(device)
    bad = good.clone()
    bad[1, 2, 3, 0] = torch.nan
    window = case.window or case.shape[1:3]
    for automatic in (False, True):
        args = arguments(case, automatic)
        before, after = run(good, *args), run(bad, *args)
        spread, centres, indices, weights = after
        assert spread.isnan().tolist() == [False, automatic]
        assert 0 <= indices.min() and indices.max() < math.prod(case.map_size)
        assert centres[1, : case.clusters[0], : case.clusters[1]].isnan().any()
        assert weights[1, 2, 3].isnan().all()
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a[0], b[0])
        if not automatic:
            for n, sides in ((1, case.clusters), (2, window), (3, window)):
                assert torch.equal(before[n][1, sides[0] :], after[n][1, sides[0] :])
                assert torch.equal(before[n][1, :, sides[1] :], after[n][1, :, sides[1] :])


def test_token_reduce_picks_among_all_centres_at_nan(device):
    case = SHARED["swin_tiny"]
    tokens = torch.full(case.shape, torch.nan, device=device)
    _, _, indices, weights = run(tokens, arguments(case, True))
    assert 0 <= indices.min() and indices.max() < math.prod(case.map_size)
    assert weights.isnan().all()


def test_token_reduce_empty_batch(device):
    tokens = torch.zeros(0, 9, 8, 3, device=device)
    out = token_reduce(tokens, (2, 2), window=(4, 4), temperature=1.0, automatic=True)
    assert [x.shape for x in out] == [(0,), (0, 5, 4, 3), (0, 9, 8, 4), (0, 9, 8, 4)]


def test_token_reduce_of_many_windows(device):
    for shape in ((1, 257, 257, 2), (65537, 1, 2, 2)):
        tokens = torch.rand(shape, device=device)
        _, centres, indices, weights = run(tokens, ((1, 1), (1, 1), 1, 5, 2, 1.0, True))
        torch.testing.assert_close(centres, tokens, rtol=1e-6, atol=0)
        place = torch.arange(shape[1] * shape[2], device=device).view(shape[1:3])[..., None]
        assert (indices == place).all()
        assert (weights[..., 0] == 1).all() and (weights[..., 1] == 0).all()


@pytest.mark.parametrize("name", ["swin", "swin_ragged", "windows", "image"])
@each_temperature
def test_token_reduce_gradient_is_that_of_the_centres(name, automatic, device):
    case = ALL[name]
    args = arguments(case, automatic)
    exact = make_tokens(case).to(device).double().requires_grad_()
    expected = token_reduce_ref(exact, *args)[1]
    weight = torch.linspace(-1, 1, expected.numel(), device=device).view(expected.shape)
    (expected * weight).sum().backward()

    tokens = make_tokens(case).to(device).requires_grad_()
    spread, centres, indices, weights = run(tokens, args)
    assert centres.requires_grad
    assert not (spread.requires_grad or indices.requires_grad or weights.requires_grad)
    (centres * weight).sum().backward()
    torch.testing.assert_close(tokens.grad, exact.grad.float(), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("name", ["swin", "swin_ragged"])
def test_token_reduce_of_tokens_off_alignment(name, device):
    """The tokens begin in the middle of what is read at once where they are aligned."""
    case = ALL[name]
    aligned = make_tokens(case).to(device)
    tokens = torch.empty(aligned.numel() + 1, device=device)[1:].view(case.shape).copy_(aligned)
    args = arguments(case, True)
    for a, b in zip(run(tokens, args), run(aligned, args), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

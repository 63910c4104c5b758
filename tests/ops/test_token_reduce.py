from __future__ import annotations

import math

import pytest
import torch
from op_cases import (
    CASES,
    DTYPES,
    TEMPERATURE,
    Case,
    assert_centres_close,
    assert_kernel,
    assert_matches_of_reduction,
    each_dtype,
    make_tokens,
)

from expedite_d2.ops import reference, token_cluster, token_match, token_reduce, token_spread
from expedite_d2.ops.reference import token_reduce_ref

TINY = torch.finfo(torch.float32).tiny
# Windows with channels enough for several blocks each on the path on CUDA that shares their
# distances, and an image as small.
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


def public(tokens: torch.Tensor, *args) -> tuple[torch.Tensor, ...]:
    clusters, window, iterations, neighbourhood, topk, temperature, automatic = args
    settings = {"window": window, "iterations": iterations, "neighbourhood": neighbourhood}
    settings |= {"topk": topk, "temperature": temperature, "automatic": automatic}
    return token_reduce(tokens, clusters, **settings)


each_run = pytest.mark.parametrize("run", [public, token_reduce_ref])


def test_token_reduce_has_a_kernel(device):
    assert_kernel("token_reduce", device)


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
        assert_matches_of_reduction(case, tokens, args, (spread, centres, indices, weights))
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


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


@each_run
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


@each_run
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_token_reduce_matches_to_centres_before_they_are_rounded(run, dtype, device):
    """Two cells of two tokens each, whose means lie halfway between two numbers of the type."""
    step = torch.finfo(dtype).eps
    values = [1, 1 + step, 1 + 2 * step, 1 + 5 * step]
    tokens = torch.tensor(values, dtype=dtype, device=device).view(1, 1, 4, 1)
    for window in (None, (1, 4)):
        _, centres, indices, weights = run(tokens, (1, 2), window, 0, 1, 2, 0.1 / step**2, False)
        # Of 1 + step / 2 and 1 + 7 step / 2, the even neighbours.
        assert centres.flatten().tolist() == [1, 1 + 4 * step]
        assert indices.view(4, 2).tolist() == [[0, 1], [0, 1], [0, 1], [1, 0]]
        # Distances to the nearer and to the other one, in steps.
        distances = [(0.5, 3.5), (0.5, 2.5), (1.5, 1.5), (1.5, 4.5)]
        expected = [1 / (1 + math.exp(0.1 * (a**2 - b**2))) for a, b in distances]
        assert weights.view(4, 2)[:, 0].tolist() == pytest.approx(expected, rel=1e-5)


@each_run
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("name, iterations, neighbourhood, topk", [
    ("windows", 1, 1, 4), ("wide", 5, 5, 4), ("swin_tiny", 0, 1, 4), ("home_only", 5, 1, 4),
    ("ragged", 0, 3, 11), ("ragged_many", 1, 1, 4), ("ragged_odd_channels", 2, 3, 2),
    ("more_cells_than_tokens", 0, 1, 40), ("large_window", 1, 3, 3), ("one_channel", 1, 1, 1),
])  # fmt: skip
def test_token_reduce_of_a_window_with_a_token_that_is_not_finite(
    name, iterations, neighbourhood, topk, bad, dtype, run, device
):
    """Its centres and weights are NaN, its indices the first cells; other windows keep theirs."""
    case = ALL[name]
    good = make_tokens(case).to(device, dtype)
    spoilt = good.clone()
    spoilt[-1, 2, 3, -1] = bad
    window = case.token_windows()[2, 3]
    for automatic in (False, True):
        args = (case.clusters, case.window, iterations, neighbourhood, topk, 3.0, automatic)
        before, after = run(good, *args), run(spoilt, *args)
        assert after[0].isnan().tolist() == [False] * (case.shape[0] - 1) + [automatic]
        for n, windows in enumerate(
            (case.cell_windows(), case.token_windows(), case.token_windows()), start=1
        ):
            lost = windows == window
            # All of an image hangs on its spread.
            kept = ~lost & (not automatic)
            assert torch.equal(before[n][-1][kept], after[n][-1][kept])
            assert torch.equal(before[n][:-1], after[n][:-1])
            if n != 2:
                assert after[n][-1][lost].isnan().all() and before[n].isfinite().all()
        cells = (case.cell_windows() == window).flatten().nonzero().flatten()[:topk].tolist()
        cells += cells[:1] * (topk - len(cells))
        lost = after[2][-1][case.token_windows() == window]
        assert (lost == torch.tensor(cells, device=device)).all()


@pytest.mark.parametrize("parts", [torch.ops.expedite_d2, reference], ids=["kernel", "reference"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("name", ["image", "image_odd", "small_image"])
def test_token_reduce_of_an_image_with_a_token_that_is_not_finite(name, bad, parts, device):
    """Without windows, lost is what its parts lose."""
    reduce, cluster, match = (
        getattr(parts, name + "_ref" * (parts is reference))
        for name in ("token_reduce", "token_cluster", "token_match")
    )
    case = ALL[name]
    tokens = make_tokens(case).to(device)
    tokens[-1, 2, 3, 0] = bad
    for iterations in (0, 1, 5):
        found = reduce(tokens, case.clusters, None, iterations, 3, 4, 3.0, False)
        centres = cluster(tokens, case.clusters, None, iterations, 3, 3.0, None)
        expected = (centres, *match(tokens, centres, case.clusters, None, 4, 3.0, None))
        assert found[3][-1, 2, 3].isnan().all()
        for a, b in zip(found[1:], expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


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

"""ms_deform_attn at random shapes, strides, types and values against its reference in float64."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import pytest
import torch
from deform_cases import BACKWARD, KERNEL, Case, double, strided
from op_cases import DTYPES, assert_kernel

from expedite_d2.ops.reference import ms_deform_attn_backward_ref, ms_deform_attn_ref

SEEDS = range(60)


class Fuzz(NamedTuple):
    """Everything about one case but its random numbers."""

    seed: int
    case: Case
    dtype: torch.dtype
    spread: float  # how far locations reach beyond the maps
    is_strided: bool
    bad: float | None  # what a few locations are replaced by


def draw(seed: int) -> Fuzz:
    rng = random.Random(seed)
    most = rng.choice([1, 3, 20])
    shapes = tuple(
        (rng.randint(1, most), rng.randint(1, most)) for _ in range(rng.choice([1, 1, 2, 3, 16]))
    )
    case = Case(
        rng.choice([1, 2, 3, 400]),
        rng.choice([1, 2, 63, 64, 65]),
        rng.choice([1, 2, 8]),
        rng.choice([1, 2, 4, 7, 8, 15, 16, 31, 32, 33, 64, 70]),
        shapes,
        rng.choice([1, 2, 4, 5, 17]),
    )
    if case.batch == 400:
        case = case._replace(queries=min(case.queries, 3), shapes=shapes[:2], channels=4)
    return Fuzz(
        seed,
        case,
        rng.choice(DTYPES),
        rng.choice([0.0, 0.3, 3.0]),
        rng.random() < 0.5,
        rng.choice([None, None, float("nan"), float("inf"), -float("inf"), 1e30]),
    )


def make(fuzz: Fuzz) -> tuple[tuple[Any, ...], torch.Tensor, torch.Tensor]:
    """The arguments, the gradient of the output, and the mask (B, Q, heads) of NaN locations."""
    case, generator = fuzz.case, torch.Generator().manual_seed(fuzz.seed)
    rows = sum(h * w for h, w in case.shapes)
    samples = (case.batch, case.queries, case.heads, len(case.shapes), case.points)
    value = torch.randn(case.batch, rows, case.heads, case.channels, generator=generator)
    locations = torch.rand(*samples, 2, generator=generator) * (1 + 2 * fuzz.spread) - fuzz.spread
    weights = torch.randn(samples, generator=generator)
    grad = torch.randn(case.batch, case.queries, case.heads * case.channels, generator=generator)
    if fuzz.bad is not None:
        locations.view(-1)[:: max(locations.numel() // 3, 1)] = fuzz.bad
    args = (value.to(fuzz.dtype), case.flat, case.starts, locations, weights)
    return args, grad.to(fuzz.dtype), locations.isnan().flatten(3).any(-1)


@pytest.mark.parametrize("seed", SEEDS)
def test_deform_fuzz(seed, device):
    fuzz = draw(seed)
    print(fuzz)
    for name in ("ms_deform_attn", "_ms_deform_attn_backward"):
        assert_kernel(name, device)
    args, grad, nan = make(fuzz)
    given = strided(args) if fuzz.is_strided else args
    given = tuple(a.to(device) if torch.is_tensor(a) else a for a in given)
    relative = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[fuzz.dtype]

    out = KERNEL(*given).cpu()
    assert out.dtype == fuzz.dtype and out.is_contiguous()
    expected = ms_deform_attn_ref(*double(args))
    heads = out.unflatten(-1, (fuzz.case.heads, fuzz.case.channels))
    assert heads[nan].isnan().all()
    close = {"rtol": relative, "atol": 1e-5 * len(fuzz.case.shapes) * fuzz.case.points}
    expected = expected.view(heads.shape)
    torch.testing.assert_close(heads[~nan].double(), expected[~nan], **close)

    found = [x.cpu().double() for x in BACKWARD(grad.to(device), *given)]
    exact = ms_deform_attn_backward_ref(grad.double(), *double(args))
    # At the rim of a pixel rounding decides which of two slopes a location has.
    location = torch.isclose(found[1], exact[1], rtol=1e-3, atol=1e-3, equal_nan=True).all(-1)
    assert location.float().mean() > 0.999
    for i in (0, 2):
        close = {"rtol": relative, "atol": 1e-5 * exact[i].nan_to_num().abs().max()}
        torch.testing.assert_close(found[i], exact[i], **close, equal_nan=True)


def test_deform_fuzz_covers_what_it_should():
    cases = [draw(seed) for seed in SEEDS]
    assert {f.dtype for f in cases} == set(DTYPES)
    assert {f.case.batch for f in cases} == {1, 2, 3, 400}
    assert any(len(f.case.shapes) == 16 for f in cases)
    assert {f.is_strided for f in cases} == {False, True}
    assert sum(f.bad is not None for f in cases) > 10

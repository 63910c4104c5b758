"""token_merge and token_pool at random shapes, strides, types and values."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch
from fuzz_layouts import LAYOUTS
from merge_checks import assert_merged
from op_cases import DTYPES, assert_kernel, tolerance
from torch import Tensor

from expedite_d2.ops import reference

SEEDS = range(120)
KERNELS = torch.ops.expedite_d2


class Fuzz(NamedTuple):
    """Everything about one case but its random numbers."""

    seed: int
    shape: tuple[int, int, int]
    merged: int
    groups: int  # their number
    dtype: torch.dtype
    values: str
    layout: str
    bad: float | None  # what a token is replaced by


def draw(seed: int) -> Fuzz:
    rng = random.Random(seed)
    batch = rng.choice([1, 1, 2, 3, 400])
    count = rng.choice(
        [1, 2, 3, rng.randint(1, 9), rng.randint(1, 300), rng.choice([128, 129, 255])]
    )
    if batch == 400:
        count = min(count, 9)
    channels = rng.choice([1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 70, 130, 264])
    half = count // 2
    return Fuzz(
        seed,
        (batch, count, channels),
        rng.choice([0, half, max(half - 1, 0), rng.randint(0, half)]),
        rng.choice([1, 2, count, 2 * count, rng.randint(1, count)]),
        rng.choice(DTYPES),
        rng.choice(["noise", "noise", "offset", "ties", "constant", "small", "zeros"]),
        rng.choice(list(LAYOUTS)),
        rng.choice([None, None, torch.nan, torch.inf, -torch.inf]),
    )


def make(fuzz: Fuzz) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, sizes, and groups of which some do not exist."""
    generator = torch.Generator().manual_seed(fuzz.seed)
    x = torch.randn(fuzz.shape, generator=generator)
    if fuzz.values == "offset":
        x += 3.0
    elif fuzz.values == "ties":
        x = x.round()
    elif fuzz.values == "constant" or fuzz.layout == "expanded":
        x = x[:, :1].expand(fuzz.shape)
    elif fuzz.values == "small":
        x *= 1e-3
    elif fuzz.values == "zeros":
        x = x * (torch.rand(fuzz.shape[:2], generator=generator) < 0.5)[..., None]
    sizes = torch.randint(1, 9, fuzz.shape[:2], generator=generator).float()
    groups = torch.randint(-1, fuzz.groups + 1, fuzz.shape[:2], generator=generator)
    return x.to(fuzz.dtype), sizes, groups.int()


def lay_out(fuzz: Fuzz, x: Tensor) -> Tensor:
    """As the case says: (B, N) or (B, N, C) within a map of one row."""
    laid_out = LAYOUTS[fuzz.layout]((x if x.dim() == 3 else x[..., None])[:, None])[:, 0]
    return laid_out if x.dim() == 3 else laid_out[..., 0]


def outputs(fuzz: Fuzz, name: str, args: tuple, device: str) -> tuple[Tensor, ...]:
    """What the kernel gives for arguments that lie in memory as the case says; on the CPU."""
    given = [lay_out(fuzz, a.to(device)) if torch.is_tensor(a) else a for a in args]
    out = getattr(KERNELS, name)(*given)
    for before, after in zip(args, given, strict=True):
        if torch.is_tensor(before):  # nothing is written to
            torch.testing.assert_close(after.cpu(), before, rtol=0, atol=0, equal_nan=True)
    return tuple(x.cpu() for x in ((out,) if torch.is_tensor(out) else out))


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def assert_pooled(fuzz: Fuzz, tokens: Tensor, groups: Tensor, out: Tensor) -> None:
    expected = reference.token_pool_ref(tokens.double(), groups, fuzz.groups)
    largest = tokens.double().abs().max()
    limits = {"rtol": tolerance(fuzz.dtype)["rtol"], "atol": 2e-6 * float(largest)}
    torch.testing.assert_close(out.double(), expected, **limits)


def check_bad_token(fuzz: Fuzz, args: dict[str, tuple], device: str) -> None:
    """It spoils what it is a member of, and nothing else."""
    rng = random.Random(-fuzz.seed - 1)
    image, place = rng.randrange(fuzz.shape[0]), rng.randrange(fuzz.shape[1])
    tokens = args["token_merge"][0].clone()
    tokens[image, place, rng.randrange(fuzz.shape[2])] = fuzz.bad
    out, _, places = outputs(fuzz, "token_merge", (tokens, *args["token_merge"][1:]), device)
    spoilt = torch.zeros(out.shape[:2], dtype=torch.bool)
    spoilt[image, places[image, place].long()] = True
    assert torch.equal(~out.isfinite().all(2), spoilt)
    if place % 2 == 0 and fuzz.merged < (fuzz.shape[1] + 1) // 2:
        assert (places[image] == places[image, place]).sum() == 1

    groups = args["token_pool"][1]
    (out,) = outputs(fuzz, "token_pool", (tokens, *args["token_pool"][1:]), device)
    spoilt = torch.zeros(out.shape[:2], dtype=torch.bool)
    if 0 <= groups[image, place] < fuzz.groups:
        spoilt[image, groups[image, place].long()] = True
    assert torch.equal(~out.isfinite().all(2), spoilt)


@pytest.mark.parametrize("seed", SEEDS)
def test_fuzz_of_merging(seed, device):
    fuzz = draw(seed)
    print(fuzz)
    tokens, sizes, groups = make(fuzz)
    args = {
        "token_merge": (tokens, sizes, fuzz.merged),
        "token_pool": (tokens, groups, fuzz.groups),
    }
    threads = torch.get_num_threads()
    results = {}
    for name, given in args.items():
        assert_kernel(name, device)
        results[name] = outputs(fuzz, name, given, device)
        try:
            torch.set_num_threads(3)
            assert_same(outputs(fuzz, name, given, device), results[name])
        finally:
            torch.set_num_threads(threads)
    assert_merged(*args["token_merge"], results["token_merge"])
    assert_pooled(fuzz, tokens, groups, *results["token_pool"])
    if fuzz.bad is not None:
        check_bad_token(fuzz, args, device)


def test_fuzz_of_merging_covers_what_it_should():
    cases = [draw(seed) for seed in SEEDS]
    assert {f.dtype for f in cases} == set(DTYPES)
    assert {f.layout for f in cases} == set(LAYOUTS)
    assert any(f.shape[1] == 1 for f in cases)
    assert any(f.shape[0] == 400 and f.merged for f in cases)
    assert any(f.merged == f.shape[1] // 2 > 100 for f in cases)
    assert any(f.groups > f.shape[1] > 1 for f in cases)

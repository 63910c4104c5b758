"""Random shapes, strides, types and values: every kernel against its reference in float64.

A seed decides a whole case. A failing test has it in its name, and prints the case.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from fuzz_layouts import LAYOUTS
from op_cases import (
    DTYPES,
    EPSILON,
    Case,
    assert_kernel,
    assert_matches_of_reduction,
    distance_error,
    squared_distance,
)
from torch import Tensor

from expedite_d2.ops import reference

SEEDS = range(120)
KERNELS = torch.ops.expedite_d2
NAMES = ("token_spread", "token_cluster", "token_match", "token_reconstruct")
# Around the widths of registers and tiles.
CHANNELS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 70, 130)


class Fuzz(NamedTuple):
    """Everything about one case but its random numbers."""

    seed: int
    case: Case
    iterations: int
    topk: int
    temperature: float
    automatic: bool  # the temperature is divided by the image's spread
    dtype: torch.dtype
    values: str
    layout: str
    bad: float | None  # what a few tokens are replaced by

    @property
    def grid(self) -> tuple[list[int], list[int] | None]:
        window = self.case.window
        return list(self.case.clusters), None if window is None else list(window)


def draw(seed: int) -> Fuzz:
    rng = random.Random(seed)

    def pair(low: int, high: int) -> tuple[int, int]:
        return rng.randint(low, high), rng.randint(low, high)

    kind = rng.choice(
        ["image", "windows", "tiny_windows", "one_token", "line", "one_cell", "all_cells", "dense"]
    )
    batch, (height, width), channels = rng.randint(1, 3), pair(1, 26), rng.choice(CHANNELS)
    window: tuple[int, int] | None = None if rng.random() < 0.4 else pair(1, 14)
    if kind == "image":
        window = None
    elif kind == "windows":
        window = pair(3, 14)
    elif kind == "tiny_windows":
        batch, (height, width), channels = rng.choice([300, 3000]), pair(1, 3), rng.randint(1, 5)
        window = pair(1, 2)
    elif kind == "one_token":
        height = width = 1
    elif kind == "line":
        height, width = rng.choice([(1, rng.randint(1, 200)), (rng.randint(1, 200), 1)])
    elif kind == "dense":  # every cell is everybody's candidate
        window = None if rng.random() < 0.5 else pair(5, 9)
    side = window or (height, width)
    most = [min(s + 2, 12) for s in side]  # also more cells than tokens
    clusters = (rng.randint(1, most[0]), rng.randint(1, most[1]))
    if kind == "one_cell":
        clusters = (1, 1)
    elif kind == "all_cells":
        clusters = side if side[0] * side[1] <= 400 else (min(side[0], 9), min(side[1], 9))
    neighbourhood = rng.choice([1, 3, 5, 7, 2 * rng.randint(0, 15) + 1])
    if kind == "dense":
        neighbourhood = rng.choice([51, 2**30 - 1])
    topk = rng.choice([1, 2, 4, rng.randint(1, 12), clusters[0] * clusters[1] + 2])
    return Fuzz(
        seed,
        Case((batch, height, width, channels), clusters, window, neighbourhood),
        iterations=rng.choice([0, 1, 2, 5]),
        topk=min(topk, 40),
        temperature=rng.choice([0.3, 8.0, 32.0, 1e4]),
        automatic=rng.random() < 0.7,
        dtype=rng.choice(DTYPES),
        values=rng.choice(["smooth", "smooth", "offset", "ties", "constant", "small"]),
        layout=rng.choice(list(LAYOUTS)),
        bad=rng.choice([None, None, torch.nan, torch.inf, -torch.inf]),
    )


def make_tokens(fuzz: Fuzz, generator: torch.Generator) -> Tensor:
    """(B, H, W, C) of the case's type, finite."""
    shape = fuzz.case.shape
    x = torch.randn(shape, generator=generator)
    if fuzz.values == "smooth":
        steps = torch.linspace(-2, 2, shape[1])[:, None] + torch.linspace(-2, 2, shape[2])
        x = 0.4 * x + steps[..., None] * torch.randn(shape[3], generator=generator)
    elif fuzz.values == "offset":
        x += 100.0
    elif fuzz.values == "ties":
        x = x.round()
    elif fuzz.values == "constant":
        x = x[:, :1, :1].expand(shape)
    elif fuzz.values == "small":
        x *= 1e-3
    if fuzz.layout == "expanded":
        x = x[:, :, :1].expand(shape)
    return x.to(fuzz.dtype)


class Data(NamedTuple):
    """A case's arguments without bad tokens, each made in float64 from those before it."""

    tokens: Tensor
    spread: Tensor
    centres: Tensor
    indices: Tensor
    weights: Tensor
    refined: Tensor


def make_data(fuzz: Fuzz) -> Data:
    generator = torch.Generator().manual_seed(fuzz.seed)
    tokens = make_tokens(fuzz, generator)
    exact = tokens.double()
    spread = reference.token_spread_ref(exact, *fuzz.grid, fuzz.case.neighbourhood)
    given = spread if fuzz.automatic else None
    settings = (fuzz.iterations, fuzz.case.neighbourhood, fuzz.temperature, given)
    centres = reference.token_cluster_ref(exact, *fuzz.grid, *settings).to(fuzz.dtype)
    match = (*fuzz.grid, fuzz.topk, fuzz.temperature, given)
    indices, weights = reference.token_match_ref(exact, centres.double(), *match)
    noise = torch.randn(centres.shape, generator=generator)
    return Data(tokens, spread, centres, indices, weights, centres + noise.to(fuzz.dtype))


class Arguments(NamedTuple):
    """The operators' arguments."""

    token_spread: tuple
    token_cluster: tuple
    token_match: tuple
    token_reconstruct: tuple
    token_reduce: tuple


def arguments(fuzz: Fuzz, data: Data) -> Arguments:
    given = data.spread if fuzz.automatic else None
    neighbourhood, last = fuzz.case.neighbourhood, (fuzz.temperature, given)
    residual = (data.tokens, data.centres) if fuzz.seed % 3 else (None, None)
    return Arguments(
        (data.tokens, *fuzz.grid, neighbourhood),
        (data.tokens, *fuzz.grid, fuzz.iterations, neighbourhood, *last),
        (data.tokens, data.centres, *fuzz.grid, fuzz.topk, *last),
        (data.refined, data.indices, data.weights, *residual),
        (
            *(data.tokens, *fuzz.grid, fuzz.iterations, neighbourhood, fuzz.topk),
            *(fuzz.temperature, fuzz.automatic),
        ),
    )


def outputs(fuzz: Fuzz, name: str, args: Sequence, device: str) -> tuple[Tensor, ...]:
    """What the kernel gives for arguments that lie in memory as the case says; on the CPU."""
    given = [a.to(device) if torch.is_tensor(a) else a for a in args]
    lay_out = LAYOUTS[fuzz.layout]
    given = [lay_out(a) if torch.is_tensor(a) and a.dim() == 4 else a for a in given]
    out = getattr(KERNELS, name)(*given)
    for before, after in zip(args, given, strict=True):
        if torch.is_tensor(before):
            assert_same_bits(before, after.cpu())  # nothing is written to
    return tuple(x.cpu() for x in ((out,) if torch.is_tensor(out) else out))


def bits(x: Tensor) -> Tensor:
    """Integers that are equal where the bits are: NaN equals itself."""
    x = x.contiguous()
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert torch.equal(bits(a), bits(b))


def tolerance(fuzz: Fuzz) -> float:
    """Half a unit in the last place of the type; float32 sums in another order."""
    return {torch.float32: 2e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[fuzz.dtype]


def check_spread(fuzz: Fuzz, data: Data, device: str) -> None:
    args = arguments(fuzz, data).token_spread
    (out,) = outputs(fuzz, "token_spread", args, device)
    assert_spread(fuzz, data, out)


def assert_spread(fuzz: Fuzz, data: Data, out: Tensor) -> None:
    # Averages of n tokens are off by up to n roundings of what the tokens share.
    height, width = fuzz.case.window or fuzz.case.shape[1:3]
    largest = data.tokens.double().square().sum(3).flatten(1).amax(1)
    error = 1e-4 * data.spread + (height * width * EPSILON) ** 2 * largest + 1e-37
    assert ((out.double() - data.spread.double()).abs() <= error).all()


def check_cluster(fuzz: Fuzz, data: Data, device: str) -> None:
    args = arguments(fuzz, data).token_cluster
    (out,) = outputs(fuzz, "token_cluster", args, device)
    assert_centres(fuzz, data, out, args[1:])


def assert_centres(fuzz: Fuzz, data: Data, out: Tensor, settings: Sequence) -> None:
    """Those of token_cluster_ref."""
    assert_averages(fuzz, data, out)
    # What float32 itself makes of the case tells how much its rounding is amplified.
    exact = reference.token_cluster_ref(data.tokens.double(), *settings)
    rounded = reference.token_cluster_ref(data.tokens.float(), *settings)
    amplified = (rounded - exact).abs().max()
    slack = tolerance(fuzz) * data.tokens.double().abs().max()
    assert ((out - exact).abs() <= slack + 30 * amplified).all()


def assert_averages(fuzz: Fuzz, data: Data, out: Tensor) -> None:
    """Centres of this form, within the range of their window's tokens."""
    assert out.is_contiguous() and out.shape[1:3] == fuzz.case.map_size
    inside, cells = fuzz.case.token_windows(), fuzz.case.cell_windows()
    tokens = data.tokens.double()
    slack = tolerance(fuzz) * tokens.abs().max()
    for w in range(int(inside.max()) + 1):
        z, s = tokens[:, inside == w], out[:, cells == w].double()
        assert (s <= z.amax(1, keepdim=True) + slack).all()
        assert (s >= z.amin(1, keepdim=True) - slack).all()


def check_match(fuzz: Fuzz, data: Data, device: str) -> None:
    args = arguments(fuzz, data).token_match
    indices, weights = outputs(fuzz, "token_match", args, device)
    assert_indices_in_window(fuzz, indices)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    error = distance_error(fuzz.case, data.tokens, data.centres)
    found = squared_distance(data.tokens, data.centres, indices)
    best = squared_distance(data.tokens, data.centres, data.indices)
    assert ((found - best).abs() <= 2 * error).all()
    tau = torch.full((fuzz.case.shape[0],), fuzz.temperature)
    tau = (tau / data.spread if fuzz.automatic else tau).double().view(-1, 1, 1, 1)
    # A weight is at most as wrong as an exponent.
    assert ((weights - data.weights).abs() <= 1e-5 + 2 * (tau * error).nan_to_num(1.0)).all()


def check_reconstruct(fuzz: Fuzz, data: Data, device: str) -> None:
    args = arguments(fuzz, data).token_reconstruct
    (out,) = outputs(fuzz, "token_reconstruct", args, device)
    assert out.is_contiguous()
    exact = [a.double() if torch.is_tensor(a) and a.dtype == fuzz.dtype else a for a in args]
    exact[2] = args[2]
    expected = reference.token_reconstruct_ref(*exact)
    largest = max(a.abs().max() for a in exact if torch.is_tensor(a) and a.is_floating_point())
    assert ((out - expected).abs() <= tolerance(fuzz) * expected.abs() + 1e-6 * largest).all()


def check_reduce(fuzz: Fuzz, data: Data, device: str) -> None:
    tokens, *args = arguments(fuzz, data).token_reduce
    found = outputs(fuzz, "token_reduce", (tokens, *args), device)
    spread, centres, indices, weights = found
    if fuzz.automatic:
        assert_spread(fuzz, data, spread)
    else:
        assert (spread == 1).all()
    assert_centres(fuzz, data, centres, (*args[:4], fuzz.temperature, spread))
    assert_indices_in_window(fuzz, indices)
    assert_matches_of_reduction(fuzz.case, tokens, tuple(args), found)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def assert_indices_in_window(fuzz: Fuzz, indices: Tensor) -> None:
    cells = fuzz.case.cell_windows()
    assert 0 <= indices.min() and indices.max() < cells.numel()
    assert (cells.flatten()[indices.long()] == fuzz.case.token_windows()[..., None]).all()


def spoil(fuzz: Fuzz, data: Data) -> tuple[Tensor, Tensor]:
    """Tokens with a few bad numbers, and the mask (B, H, W) of the tokens that have one."""
    assert fuzz.bad is not None
    rng = random.Random(-fuzz.seed - 1)
    batch, height, width, channels = fuzz.case.shape
    tokens = data.tokens.clone()
    mask = torch.zeros(batch, height, width, dtype=torch.bool)
    for _ in range(rng.choice([1, 3])):
        at = rng.randrange(batch), rng.randrange(height), rng.randrange(width)
        tokens[(*at, rng.randrange(channels))] = fuzz.bad
        mask[at] = True
    return tokens, mask


def check_bad_tokens(fuzz: Fuzz, data: Data, device: str) -> None:
    tokens, mask = spoil(fuzz, data)
    spoilt = data._replace(tokens=tokens)
    good, bad = arguments(fuzz, data), arguments(fuzz, spoilt)
    windows = torch.zeros(
        fuzz.case.shape[0], int(fuzz.case.token_windows().max()) + 1, dtype=torch.bool
    )
    b, y, x = mask.nonzero(as_tuple=True)
    windows[b, fuzz.case.token_windows()[y, x]] = True

    (spread,) = outputs(fuzz, "token_spread", bad.token_spread, device)
    assert torch.equal(spread.isnan(), mask.flatten(1).any(1))

    # The cell that holds the token is lost; what lies in other windows keeps its bits.
    (clean,) = outputs(fuzz, "token_cluster", good.token_cluster, device)
    (out,) = outputs(fuzz, "token_cluster", bad.token_cluster, device)
    side = fuzz.case.window or fuzz.case.shape[1:3]
    row, column = (
        p // s * m + p % s * m // s
        for p, s, m in zip((y, x), side, fuzz.case.clusters, strict=True)
    )
    assert not out[b, row, column].isfinite().all(1).any()
    kept = ~windows[:, fuzz.case.cell_windows()]
    assert_same_bits(out[kept], clean[kept])

    indices, weights = outputs(fuzz, "token_match", bad.token_match, device)
    assert_indices_in_window(fuzz, indices)
    assert weights[mask].isnan().any(1).all()
    assert torch.equal(weights.isnan().any(-1), mask)
    torch.testing.assert_close(weights.sum(-1)[~mask], torch.ones_like(weights[..., 0][~mask]))
    kept = ~windows[:, fuzz.case.token_windows()]
    for a, c in zip(
        (indices, weights), outputs(fuzz, "token_match", good.token_match, device), strict=True
    ):
        assert_same_bits(a[kept], c[kept])
    # All of an image hangs on its spread, otherwise all of a window on its tokens.
    first, second = (outputs(fuzz, "token_reduce", a.token_reduce, device) for a in (good, bad))
    assert_indices_in_window(fuzz, second[2])
    if fuzz.case.window is not None:
        expected = reference.token_reduce_ref(*bad.token_reduce)
        assert second[1][windows[:, fuzz.case.cell_windows()]].isnan().all()
        assert second[3][~kept].isnan().all()
        assert torch.equal(second[2][~kept], expected[2][~kept])
    kept &= ~(fuzz.automatic & mask.flatten(1).any(1))[:, None, None]
    for a, c in zip(second[2:], first[2:], strict=True):
        assert_same_bits(a[kept], c[kept])
    # And where all centres are lost, too.
    lost = (bad.token_match[0], torch.full_like(data.centres, fuzz.bad), *bad.token_match[2:])
    assert_indices_in_window(fuzz, outputs(fuzz, "token_match", lost, device)[0])

    # A refined centre that is bad spoils those that look at it, and nobody else.
    refined = data.refined.clone()
    refined[0, -1, -1, -1] = fuzz.bad
    (clean,) = outputs(fuzz, "token_reconstruct", good.token_reconstruct, device)
    args = (refined, *good.token_reconstruct[1:])
    (out,) = outputs(fuzz, "token_reconstruct", args, device)
    looks = (data.indices == fuzz.case.cell_windows().numel() - 1).any(-1)
    looks[1:] = False
    assert not out[..., -1][looks].isfinite().any()
    assert_same_bits(out[~looks], clean[~looks])


def check_bits(fuzz: Fuzz, data: Data, device: str) -> None:
    """The same input gives the same bits, wherever it lies and whatever the number of threads."""
    threads = torch.get_num_threads()
    for name, args in arguments(fuzz, data)._asdict().items():
        first = outputs(fuzz, name, args, device)
        try:
            torch.set_num_threads(3)
            second = outputs(fuzz, name, args, device)
        finally:
            torch.set_num_threads(threads)
        for a, b in zip(first, second, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("seed", SEEDS)
def test_fuzz(seed, device):
    fuzz = draw(seed)
    print(fuzz)
    for name in NAMES:
        assert_kernel(name, device)
    data = make_data(fuzz)
    check_spread(fuzz, data, device)
    check_cluster(fuzz, data, device)
    check_match(fuzz, data, device)
    check_reconstruct(fuzz, data, device)
    check_reduce(fuzz, data, device)
    check_bits(fuzz, data, device)
    if fuzz.bad is not None:
        check_bad_tokens(fuzz, data, device)


def test_fuzz_covers_what_it_should():
    cases = [draw(seed) for seed in SEEDS]
    assert {f.dtype for f in cases} == set(DTYPES)
    assert {f.layout for f in cases} == set(LAYOUTS)
    assert any(f.case.shape[0] == 3000 for f in cases)
    assert any(f.case.shape[1:3] == (1, 1) for f in cases)
    assert any(f.case.clusters == (f.case.window or f.case.shape[1:3]) for f in cases)
    assert any(f.case.clusters == (1, 1) for f in cases)
    assert any(f.topk > f.case.clusters[0] * f.case.clusters[1] for f in cases)
    assert any(f.case.neighbourhood == 2**30 - 1 for f in cases)

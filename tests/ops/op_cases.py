"""Inputs that all operators' tests share, and the assertion that a kernel really runs."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from expedite_d2 import _ext
from expedite_d2.ops import reference

# The operators of clustering one by one, and all on tokens.
PARTS = ["token_spread", "token_cluster", "token_match", "token_reconstruct"]
NAMES = [*PARTS, "token_reduce", "token_merge", "token_pool"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TEMPERATURE = 8.0
EPSILON = torch.finfo(torch.float32).eps


class Case(NamedTuple):
    """One shape: tokens (B, H, W, C), cells of the grid or window, window or None."""

    shape: tuple[int, int, int, int]
    clusters: tuple[int, int]
    window: tuple[int, int] | None
    neighbourhood: int = 5

    @property
    def map_size(self) -> tuple[int, int]:
        m_h, m_w = self.window or self.shape[1:3]
        rows, columns = self.shape[1] * self.clusters[0], self.shape[2] * self.clusters[1]
        return -(-rows // m_h), -(-columns // m_w)

    def window_of(self, size: tuple[int, int], side: tuple[int, int]) -> Tensor:
        """Number of the window of each place of a map of `size`, `side` places in each window."""
        columns = -(-self.shape[2] // (self.window or self.shape[1:3])[1])
        rows = torch.arange(size[0]) // side[0]
        return rows[:, None] * columns + torch.arange(size[1]) // side[1]

    def token_windows(self) -> Tensor:
        """(H, W)"""
        size = self.shape[1:3]
        return self.window_of(size, self.window or size)

    def cell_windows(self) -> Tensor:
        """(h', w')"""
        return self.window_of(self.map_size, self.clusters)


CASES = {
    "windows": Case((2, 24, 36, 40), (8, 8), (12, 12)),
    "wide": Case((1, 24, 24, 192), (8, 8), (12, 12)),
    "ragged": Case((2, 17, 23, 9), (2, 3), (5, 4)),
    "ragged_odd": Case((1, 19, 7, 33), (5, 3), (8, 5), 3),
    "small_map": Case((1, 5, 7, 16), (8, 8), (12, 12)),
    "one_window": Case((1, 9, 9, 7), (4, 4), (9, 9)),
    "image": Case((2, 20, 20, 64), (14, 14), None),
    "image_odd": Case((1, 17, 11, 50), (5, 7), None, 3),
    "image_global": Case((1, 10, 12, 8), (3, 4), None, 9),
    "large_window": Case((1, 40, 36, 8), (5, 5), (34, 34)),
    "home_only": Case((2, 12, 12, 8), (3, 3), (6, 6), 1),
    "one_cluster": Case((2, 6, 8, 5), (1, 1), (6, 4)),
    "one_cluster_image": Case((2, 6, 8, 5), (1, 1), None),
    "all_clusters": Case((1, 8, 8, 6), (4, 4), (4, 4)),
    "one_token": Case((2, 1, 1, 3), (1, 1), None),
    "one_channel": Case((1, 9, 10, 1), (2, 2), (4, 5)),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))


class Sample(NamedTuple):
    """Inputs of every operator for one case, each made in float64 from those before it."""

    case: Case
    tokens: Tensor
    spread: Tensor  # float32 (B,)
    centres: Tensor
    indices: Tensor
    weights: Tensor
    refined: Tensor

    def spread_args(self) -> tuple[Any, ...]:
        return self.tokens, self.case.clusters, self.case.window, self.case.neighbourhood

    def cluster_args(self, iterations: int = 5) -> tuple[Any, ...]:
        return (
            self.tokens,
            self.case.clusters,
            self.case.window,
            iterations,
            self.case.neighbourhood,
            TEMPERATURE,
            self.spread,
        )

    def match_args(self, topk: int = 4) -> tuple[Any, ...]:
        case = self.case
        rest = (case.clusters, case.window, topk, TEMPERATURE, self.spread)
        return self.tokens, self.centres, *rest

    def reduce_args(self, topk: int = 4) -> tuple[Any, ...]:
        case = self.case
        settings = (5, case.neighbourhood, topk, TEMPERATURE, True)
        return self.tokens, case.clusters, case.window, *settings

    def reconstruct_args(self) -> tuple[Any, ...]:
        return self.refined, self.indices, self.weights, self.tokens, self.centres

    @property
    def sequence(self) -> Tensor:
        """(B, N, C)"""
        return self.tokens.flatten(1, 2)

    def merge_args(self) -> tuple[Any, ...]:
        count = self.sequence.shape[1]
        sizes = 1 + torch.arange(len(self.tokens) * count, device=self.tokens.device) % 3
        return self.sequence, sizes.view(-1, count).float(), count // 3

    def pool_args(self) -> tuple[Any, ...]:
        """Some groups without tokens, and some tokens without a group."""
        rows = self.sequence.shape[:2]
        count = max(1, rows[1] // 3)
        groups = torch.arange(rows.numel(), device=self.tokens.device) * 7919 % (count + 3) - 1
        return self.sequence, groups.view(rows).int(), count


def double(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments with maps and sequences in float64; others keep their types."""
    return tuple(
        a.double() if isinstance(a, Tensor) and a.dim() >= 3 and a.dtype in DTYPES else a
        for a in args
    )


def _strided(x: Tensor) -> Tensor:
    """The same values with channels first in memory, as a convolution leaves them."""
    return x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)


def make_tokens(case: Case, seed: int = 0, offset: float = 2.0) -> Tensor:
    """Smooth features with noise and a common offset (float32), as a backbone has them."""
    generator = torch.Generator().manual_seed(seed)
    batch, height, width, channels = case.shape
    coarse = torch.randn(batch, channels, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    noise = torch.randn(case.shape, generator=generator)
    return smooth.permute(0, 2, 3, 1) + 0.5 * noise + offset


@functools.cache
def _exact_sample(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    tokens = make_tokens(case).to(dtype)
    exact = tokens.double()
    spread = reference.token_spread_ref(exact, case.clusters, case.window, case.neighbourhood)
    args = (5, case.neighbourhood, TEMPERATURE, spread)
    centres = reference.token_cluster_ref(exact, case.clusters, case.window, *args).to(dtype)
    indices, weights = reference.token_match_ref(
        exact, centres.double(), case.clusters, case.window, 4, TEMPERATURE, spread
    )
    # Layers change the refined centres, and not by a constant.
    refined = centres + torch.linspace(-1, 1, centres.numel()).view(centres.shape).to(dtype)
    return tokens, spread, centres, indices, weights, refined


def make_sample(
    case: Case, device: str = "cpu", dtype: torch.dtype = torch.float32, strided: bool = False
) -> Sample:
    """Makes a sample; everything but the tokens comes from the references in float64."""
    parts = [x.clone().to(device) for x in _exact_sample(case, dtype)]
    if strided:
        parts = [_strided(x) if x.dim() == 4 else x for x in parts]
    return Sample(case, *parts)


def assert_kernel(name: str, device: str) -> None:
    """Without this, a reference standing in for a missing kernel would be compared with itself."""
    assert _ext.has_ext(), _ext.ext_error()
    key = {"cpu": "CPU", "cuda": "CUDA"}[device]
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"expedite_d2::{name}", key), (
        f"no {key} kernel for {name} in {_ext.build_info()}"
    )


def assert_centres_close(out: Tensor, expected: Tensor) -> None:
    """Close, but for a few centres that hang on tiny responsibilities.

    A centre that all its tokens are far from is a ratio of numbers like exp(-60). Rounding moves
    such an exponent by 1e-4, and each iteration may amplify what that moves: 5e-4 was seen in one
    centre of 768.
    """
    close = torch.isclose(out.double(), expected, **tolerance(out.dtype)).all(-1)
    assert close.float().mean() > 0.98
    rtol = tolerance(out.dtype)["rtol"]
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=5e-3)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """For an output against the exact value, not rounded to its type.

    Half a unit in the last place of the type; float32 sums in another order. Values are up to 6.
    """
    relative = {torch.float32: 2e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    return {"rtol": relative, "atol": 8e-5}


def squared_distance(tokens: Tensor, centres: Tensor, indices: Tensor) -> Tensor:
    """Float64 squared distances (B, H, W, topk) of tokens to the centres they are matched to."""
    return (tokens.double()[..., None, :] - chosen(centres.double(), indices)).square().sum(-1)


def chosen(centres: Tensor, indices: Tensor) -> Tensor:
    """The centres (B, H, W, topk, C) that tokens are matched to."""
    flat = centres.flatten(1, 2)
    batch = torch.arange(flat.shape[0], device=flat.device).view(-1, 1, 1, 1)
    return flat[batch, indices.long()]


def distance_error(case: Case, tokens: Tensor, centres: Tensor) -> Tensor:
    """How far float32 may be off a squared distance of each token to the centres, (B, H, W, 1).

    The distances are expanded around a mean, of the window's tokens or of its centres, so that
    what is rounded is the squares of what is left.
    """
    tokens, centres = tokens.double(), centres.double()
    error = torch.zeros_like(tokens[..., :1])
    inside, cells = case.token_windows(), case.cell_windows()
    for w in range(int(inside.max()) + 1):
        z, s = tokens[:, inside == w], centres[:, cells == w]
        mean = z.mean(1, keepdim=True)
        largest = (s - mean).square().sum(2).amax(1)[:, None]
        size = (z - mean).square().sum(2) + largest + EPSILON * mean.square().sum(2)
        error[:, inside == w] = 16 * EPSILON * size[..., None]
    return error


def assert_matches_of_reduction(
    case: Case, tokens: Tensor, args: tuple[Any, ...], found: tuple[Tensor, ...]
) -> None:
    """Indices and weights of token_reduce are those of the centres before these are rounded.

    Ranks are compared: of two centres that are equally near up to rounding, either may be first.
    The spread is the one that was found, as what is divided by it amplifies its last bits.
    """
    clusters, window, iterations, neighbourhood, topk, temperature, _ = args
    spread, _, indices, weights = found
    settings = (clusters, window, iterations, neighbourhood, temperature, spread)
    exact = tokens.double()
    centres = reference.token_cluster_ref(exact, *settings)
    expected = reference.token_match_ref(
        exact, centres, clusters, window, topk, temperature, spread
    )
    # What float32 itself makes of the case tells how much its rounding is amplified.
    rounded = reference.token_cluster_ref(tokens.float(), *settings)
    moved = 30 * (rounded - centres).norm(dim=-1) + 8 * EPSILON * centres.norm(dim=-1)
    either = torch.cat([expected[0], indices], 3)
    moved = chosen(moved[..., None], either).amax(3)  # (B, H, W, 1)
    nearest = squared_distance(tokens, centres, expected[0])
    error = distance_error(case, tokens, centres) + 2 * moved * nearest.sqrt() + moved**2
    difference = squared_distance(tokens, centres, indices) - nearest
    assert (difference.abs() <= 2 * error).all()
    tau = (temperature / spread.double()).view(-1, 1, 1, 1)
    # A weight is at most as wrong as an exponent.
    wrong = (weights - expected[1]).abs()
    assert (wrong <= 1e-5 + 2 * (tau * error).nan_to_num(1.0)).all()

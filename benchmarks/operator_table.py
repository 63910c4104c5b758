"""The operators that `benchmarks.operators` times: shapes, inputs, work, and rivals of each.

An operator is one entry in a suite, and a suite is a table of cases with the function that makes
inputs of a case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import released
from benchmarks.common import difference
from expedite_d2.ops import reference
from expedite_d2.ops.pairs import candidate_pairs, match_pairs

KERNELS = torch.ops.expedite_d2


class Work(NamedTuple):
    """The least that an operator must do: bytes moved through memory, multiply-adds."""

    bytes: float
    operations: float


class Operator(NamedTuple):
    """One row of the table.

    Attributes:
        kernel: what is measured.
        reference: the same in plain PyTorch, which in float64 is also the oracle.
        arguments: of both, from the inputs of a case.
        work: of one call.
        dense: the call as the method's released code computes it, from the inputs; None where that
            code has no such thing.
        difference: of a result from the oracle's, relative.
    """

    kernel: Callable[..., Any]
    reference: Callable[..., Any]
    arguments: Callable[[Any], tuple[Any, ...]]
    work: Callable[[Any], Work]
    dense: Callable[[Any], Callable[[], Any] | None] = lambda inputs: None
    difference: Callable[[Any, Any], float] = difference


class Suite(NamedTuple):
    """Operators that share their inputs.

    Attributes:
        cases: by name; those called "quick…" are for tests.
        inputs: a NamedTuple or tuple from a case, a device and a dtype.
        operators: by name.
    """

    cases: Mapping[str, Any]
    inputs: Callable[[Any, str, torch.dtype], Any]
    operators: Mapping[str, Operator]


class Case(NamedTuple):
    """Tokens (B, H, W, C); the cells of a window or image; the window; settings."""

    shape: tuple[int, int, int, int]
    clusters: tuple[int, int]
    window: tuple[int, int] | None
    topk: int = 4
    iterations: int = 5
    neighbourhood: int = 5

    @property
    def temperature(self) -> float:
        """The automatic one's constant."""
        return 8.0 if self.window is None else 32.0

    @property
    def side(self) -> tuple[int, int]:
        """Rows and columns that are clustered together."""
        return self.window or self.shape[1:3]

    @property
    def divisible(self) -> bool:
        """Whether no window is ragged."""
        return not (self.shape[1] % self.side[0] or self.shape[2] % self.side[1])


CASES = {
    # Stage 3 of Swin-L, alone and in a batch; with ragged windows; Swin-T's second stage.
    "swin_l_1152": Case((1, 72, 72, 768), (8, 8), (12, 12)),
    "swin_l_1152_batch8": Case((8, 72, 72, 768), (8, 8), (12, 12)),
    "swin_l_1024": Case((1, 64, 64, 768), (8, 8), (12, 12)),
    "swin_t_1024x2048": Case((1, 128, 256, 192), (5, 5), (7, 7)),
    # SAM: 14x14 windows of a ViT-H.
    "sam_vit_h_1024": Case((1, 64, 64, 1280), (9, 9), (14, 14)),
    # Whole images: Segmenter's ViT-L, DPT's hybrid, a ViT-H with more clusters.
    "vit_l_640": Case((1, 40, 40, 1024), (28, 28), None),
    "vit_l_640_batch8": Case((8, 40, 40, 1024), (28, 28), None),
    "dpt_352x1216": Case((1, 22, 76, 768), (20, 20), None),
    "vit_h_1024": Case((1, 64, 64, 1280), (44, 44), None),
    "quick_windows": Case((2, 8, 8, 16), (2, 2), (4, 4)),
    "quick_ragged": Case((1, 7, 9, 16), (2, 2), (4, 4)),
    "quick_image": Case((1, 8, 6, 16), (4, 3), None),
}


class Inputs(NamedTuple):
    """What the operators of a case take and give, each from the one before."""

    case: Case
    tokens: Tensor
    spread: Tensor
    centres: Tensor
    indices: Tensor
    weights: Tensor
    refined: Tensor
    gained: Tensor  # refined - centres
    dense: Tensor  # the released code's weights, empty for ragged windows


def make_inputs(case: Case, device: str, dtype: torch.dtype) -> Inputs:
    """Tokens that vary smoothly, as a network's do, with detail on top."""
    batch, height, width, channels = case.shape
    smooth = torch.randn(batch, channels, -(-height // 4), -(-width // 4), device=device)
    smooth = torch.nn.functional.interpolate(smooth, size=(height, width), mode="bilinear")
    detail = torch.randn(batch, height, width, channels, device=device)
    tokens = (smooth.permute(0, 2, 3, 1) + 0.3 * detail).to(dtype).contiguous()
    spread = reference.token_spread_ref(tokens, *_grid(case), case.neighbourhood)
    centres = reference.token_cluster_ref(tokens, *[*_cluster_settings(case), spread])
    indices, weights = reference.token_match_ref(tokens, centres, *[*_match_settings(case), spread])
    gained = (0.1 * torch.randn(centres.shape, device=device)).to(dtype)
    dense = torch.empty(0)
    if case.divisible:
        dense = released.dense_weights(tokens, centres, *[*_dense_settings(case), spread])
    refined = centres + gained
    return Inputs(case, tokens, spread, centres, indices, weights, refined, gained, dense)


def _grid(case: Case) -> tuple[list[int], list[int] | None]:
    return list(case.clusters), list(case.window) if case.window else None


def _cluster_settings(case: Case) -> tuple[Any, ...]:
    return *_grid(case), case.iterations, case.neighbourhood, case.temperature


def _match_settings(case: Case) -> tuple[Any, ...]:
    return *_grid(case), case.topk, case.temperature


def _dense_settings(case: Case) -> tuple[Any, ...]:
    return case.clusters, case.window, case.topk, case.temperature


class _Sizes(NamedTuple):
    tokens: int  # bytes
    centres: int
    matches: int  # bytes of indices and weights
    pairs: float  # of a token and a candidate centre
    all_pairs: float  # of a token and a centre of its window


def _sizes(x: Inputs) -> _Sizes:
    case = x.case
    batch, height, width, _ = case.shape
    grid = (height, width)
    size = x.tokens.element_size()
    return _Sizes(
        tokens=x.tokens.numel() * size,
        centres=x.centres.numel() * size,
        matches=8 * x.indices.numel(),
        pairs=batch * candidate_pairs(grid, case.clusters, case.side, case.neighbourhood),
        all_pairs=batch * match_pairs(grid, case.clusters, case.side),
    )


def _spread_work(x: Inputs) -> Work:
    s = _sizes(x)
    return Work(s.tokens, s.pairs * x.case.shape[3])


def _cluster_work(x: Inputs) -> Work:
    """Distances and means in C channels or, after one Gram matrix, in that of a window's tokens."""
    s, channels, iterations = _sizes(x), x.case.shape[3], x.case.iterations
    members = math.prod(x.case.side)
    local = 2 * iterations * s.pairs * channels
    count = math.prod(x.case.shape[:3])
    gram = count * (members + 1) / 2 * channels + s.pairs * (2 * iterations * members + channels)
    return Work(s.tokens + s.centres, min(local, gram))


def _match_work(x: Inputs) -> Work:
    s = _sizes(x)
    return Work(s.tokens + s.centres + s.matches, s.all_pairs * x.case.shape[3])


def _reconstruct_work(x: Inputs) -> Work:
    s = _sizes(x)
    products = x.indices.numel() * x.case.shape[3]
    return Work(2 * (s.tokens + s.centres) + s.matches, products)


def _hourglass_work(x: Inputs) -> Work:
    """All four; the tokens are read once before the low-resolution blocks, and once after."""
    parts = (_spread_work(x), _cluster_work(x), _match_work(x), _reconstruct_work(x))
    s = _sizes(x)
    moved = 3 * s.tokens + 3 * s.centres + 2 * s.matches
    return Work(moved, sum(part.operations for part in parts))


def _same_weights(result: Any, expected: Any) -> float:
    """Of weights by size: indices may differ where two centres are equally far."""
    expected = expected[1]
    if isinstance(result, tuple):
        result = result[1]
    else:  # the dense formulation: (B * windows, N, K), each row with its topk
        result = result.topk(expected.shape[-1], 2).values
        batch, height, width, topk = expected.shape
        cells = result.shape[1]
        # Windows stand in another order, so only what all tokens have together is compared.
        expected = expected.reshape(batch * height * width, topk)
        result = result.reshape(-1, cells, topk).flatten(0, 1)
        expected = expected.sort(-1).values.sort(0).values
        result = result.sort(-1).values.sort(0).values
        return difference(result, expected)
    return difference(result.sort(-1).values, expected.sort(-1).values)


def _dense_cluster(x: Inputs) -> Callable[[], Any] | None:
    case = x.case
    settings = (case.clusters, case.window, *_cluster_settings(case)[2:])
    if not case.divisible:
        return None
    return lambda: released.cluster(x.tokens, *[*settings, x.spread])


def _dense_match(x: Inputs) -> Callable[[], Any] | None:
    settings = _dense_settings(x.case)
    if not x.case.divisible:
        return None
    return lambda: released.dense_weights(x.tokens, x.centres, *[*settings, x.spread])


def _dense_reconstruct(x: Inputs) -> Callable[[], Any] | None:
    shape = (x.case.clusters, x.case.window)
    if not x.case.divisible:
        return None
    return lambda: released.reconstruct(x.refined, x.dense, *shape, x.tokens, x.centres)


def _dense_hourglass(x: Inputs) -> Callable[[], Any] | None:
    """The released code has a fixed temperature: it is given the spread."""
    case = x.case
    if not case.divisible:
        return None
    cluster = (case.clusters, case.window, *_cluster_settings(case)[2:])

    def call() -> Tensor:
        centres = released.cluster(x.tokens, *[*cluster, x.spread])
        dense = released.dense_weights(x.tokens, centres, *[*_dense_settings(case), x.spread])
        shape = (case.clusters, case.window)
        return released.reconstruct(centres + x.gained, dense, *shape, x.tokens, centres)

    return call


def _hourglass(
    reduce: Callable[..., Any], reconstruct: Callable[..., Any]
) -> Callable[..., Tensor]:
    """All four as a model calls them, with something added to the centres in the middle."""

    def call(tokens: Tensor, gained: Tensor, case: Case) -> Tensor:
        settings = (case.iterations, case.neighbourhood, case.topk, case.temperature, True)
        _, centres, indices, weights = reduce(tokens, *_grid(case), *settings)
        return reconstruct(centres + gained, indices, weights, tokens, centres)

    return call


_NAMES = ("token_spread", "token_cluster", "token_match", "token_reconstruct")
_kernels = {name: getattr(KERNELS, name).default for name in _NAMES}
_references = {name: getattr(reference, f"{name}_ref") for name in _NAMES}

TOKENS = Suite(
    CASES,
    make_inputs,
    {
        "token_spread": Operator(
            _kernels["token_spread"],
            _references["token_spread"],
            lambda x: (x.tokens, *_grid(x.case), x.case.neighbourhood),
            _spread_work,
        ),
        "token_cluster": Operator(
            _kernels["token_cluster"],
            _references["token_cluster"],
            lambda x: (x.tokens, *_cluster_settings(x.case), x.spread),
            _cluster_work,
            _dense_cluster,
        ),
        "token_match": Operator(
            _kernels["token_match"],
            _references["token_match"],
            lambda x: (x.tokens, x.centres, *_match_settings(x.case), x.spread),
            _match_work,
            _dense_match,
            _same_weights,
        ),
        "token_reconstruct": Operator(
            _kernels["token_reconstruct"],
            _references["token_reconstruct"],
            lambda x: (x.refined, x.indices, x.weights, x.tokens, x.centres),
            _reconstruct_work,
            _dense_reconstruct,
        ),
        "all four": Operator(
            _hourglass(KERNELS.token_reduce.default, _kernels["token_reconstruct"]),
            _hourglass(reference.token_reduce_ref, _references["token_reconstruct"]),
            lambda x: (x.tokens, x.gained, x.case),
            _hourglass_work,
            _dense_hourglass,
        ),
    },
)

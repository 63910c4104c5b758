"""Merging and pooling of sequences for `benchmarks.operators`: shapes, inputs and work."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.operator_table import KERNELS, Operator, Suite, Work
from expedite_d2.ops import reference


class Case(NamedTuple):
    """Tokens (B, N, C), of which a quarter merge; those are the groups that are averaged."""

    batch: int
    length: int
    channels: int

    @property
    def merged(self) -> int:
        return self.length // 4


CASES = {
    # ViT-L of Segmenter, ViT-H of SAM, each without its class token.
    "sequence_1600": Case(1, 1600, 1024),
    "sequence_1600_batch8": Case(8, 1600, 1024),
    "sequence_4096": Case(1, 4096, 1280),
    "quick_sequence": Case(2, 45, 16),
}


class Inputs(NamedTuple):
    """What the operators of a case take; places are those of the merged tokens."""

    case: Case
    tokens: Tensor
    sizes: Tensor
    places: Tensor


def make_inputs(case: Case, device: str, dtype: torch.dtype) -> Inputs:
    """Tokens that vary smoothly, as a network's do, with detail on top."""
    shape = (case.batch, case.channels, -(-case.length // 8))
    smooth = torch.nn.functional.interpolate(
        torch.randn(shape, device=device), case.length, mode="linear"
    )
    tokens = smooth.transpose(1, 2) + 0.3 * torch.randn_like(smooth.transpose(1, 2))
    tokens = tokens.to(dtype).contiguous()
    sizes = torch.ones(tokens.shape[:2], device=device)
    return Inputs(case, tokens, sizes, reference.token_merge_ref(tokens, sizes, case.merged)[2])


def _rows(x: Inputs) -> tuple[int, int]:
    """Bytes of the tokens and of the result."""
    before = x.tokens.numel() * x.tokens.element_size()
    return before, before * (x.case.length - x.case.merged) // x.case.length


def _merge_work(x: Inputs) -> Work:
    """A cosine for each pair of an even and an odd token."""
    batch, count, channels = x.tokens.shape
    pairs = batch * (count // 2) * (count - count // 2)
    return Work(sum(_rows(x)) + 12 * x.places.numel(), pairs * channels)


def _pool_work(x: Inputs) -> Work:
    return Work(sum(_rows(x)) + 4 * x.places.numel(), x.tokens.numel())


def _for_most_tokens(result: Any, expected: Any) -> float:
    """Of what each token has become, but for one of a hundred: partners may be equally similar."""
    found, wanted = (
        tokens.double().gather(1, places.long()[..., None].expand(-1, -1, tokens.shape[2]))
        for tokens, _, places in (result, expected)
    )
    if not found.isfinite().all():
        return float("inf")
    errors = (found - wanted).norm(dim=2).flatten().sort().values
    return (errors[: -(-99 * len(errors) // 100)].norm() / wanted.norm()).item()


MERGING = Suite(
    CASES,
    make_inputs,
    {
        "token_merge": Operator(
            KERNELS.token_merge.default,
            reference.token_merge_ref,
            lambda x: (x.tokens, x.sizes, x.case.merged),
            _merge_work,
            difference=_for_most_tokens,
        ),
        "token_pool": Operator(
            KERNELS.token_pool.default,
            reference.token_pool_ref,
            lambda x: (x.tokens, x.places, x.case.length - x.case.merged),
            _pool_work,
        ),
    },
)

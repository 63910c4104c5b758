"""Merging of the most similar tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from expedite_d2.ops._checks import check_int, check_map, check_typed
from expedite_d2.ops._registration import define, for_type_of
from expedite_d2.ops.reference import token_merge_ref


class Merged(NamedTuple):
    """Results of :func:`token_merge`; the operator returns them as a tuple in this order."""

    tokens: Tensor
    sizes: Tensor
    places: Tensor


_token_merge = define(
    "token_merge",
    "(Tensor tokens, Tensor sizes, SymInt merged) -> (Tensor, Tensor, Tensor)",
    token_merge_ref,
)


@torch.library.register_fake(_token_merge)
def _fake(tokens: Tensor, sizes: Tensor, merged: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, count, channels = tokens.shape
    return (
        tokens.new_empty((batch, count - merged, channels)),
        sizes.new_empty((batch, count - merged)),
        tokens.new_empty((batch, count), dtype=torch.int32),
    )


@register_flop_formula(torch.ops.expedite_d2.token_merge)
def _flops(
    tokens: Sequence[int], sizes: Sequence[int], merged: int, *_: object, **__: object
) -> int:
    """Twice the multiply-adds: norms, cosines of all pairs, scores, and the sums of what merges."""
    batch, count, channels = tokens
    if merged == 0:
        return 0
    odd = count // 2
    even = count - odd
    return 2 * batch * channels * (count + even * odd + even + 2 * merged)


def _setup_context(ctx, inputs, output) -> None:
    _, new_sizes, places = output
    ctx.mark_non_differentiable(new_sizes, places)
    if ctx.needs_input_grad[0]:
        ctx.save_for_backward(inputs[1], new_sizes, places)


def _backward(ctx, grad: Tensor, *_: Tensor):
    grad_tokens = None
    if ctx.needs_input_grad[0]:
        sizes, new_sizes, places = ctx.saved_tensors
        at = places.to(torch.int64)
        share = sizes / new_sizes.gather(1, at)
        rows = grad.gather(1, at[..., None].expand(-1, -1, grad.shape[2]))
        grad_tokens = (rows * share[..., None]).to(grad.dtype)
    return grad_tokens, None, None


torch.library.register_autograd(_token_merge, _backward, setup_context=_setup_context)


def token_merge(tokens: Tensor, sizes: Tensor, merged: int) -> Merged:
    """Merges those tokens that are most similar to others into them.

    Even tokens are those at places 0, 2, ..., odd tokens those at 1, 3, .... The partner of an even
    token is the odd token of the largest cosine, and this cosine is its score. The ``merged`` even
    tokens of the highest scores become part of their partners, and a partner becomes the mean of
    all its members, weighted by their sizes. The new order is that of the remaining even tokens,
    followed by the odd ones.

    Args:
        tokens: (B, N, C), float32, bfloat16, float16 or float64, of any stride; without prefixes
            such as class tokens, which must not merge.
        sizes: (B, N), float32, positive: how many tokens each one stands for; ones at first.
        merged: Number of tokens that merge in each image, 0 to N // 2.

    Returns:
        tokens: (B, N - merged, C), of the type of ``tokens``. Differentiable in ``tokens``; the
            pairing counts as a constant. A token that nothing merges with keeps its bits.
        sizes: (B, N - merged), float32, each the sum over its members. Not differentiable.
        places: (B, N), int32: where each token, or what it became part of, is in the new order. Not
            differentiable.

    Raises:
        ValueError, TypeError: For an argument of wrong shape, value or type.

    Note:
        Of equal cosines and of equal scores the lower index wins. In cosines a token's length is at
        least 1e-12. The cosines of a token whose length is not finite are NaN, which ranks last: it
        becomes a partner, or part of one, only where nothing else is left, and then spoils that
        mean alone. (Where all of a token's cosines are NaN, its partner is the first odd token.)
        Computed in float32 (float64 for float64 tokens), also under autocast; deterministic. A mean
        is summed from the odd token on, in the order of the even ones. The kernels never hold all
        cosines at once.
    """
    op = "token_merge"
    check_map(op, "tokens", tokens, "(B, N, C)")
    check_typed(op, "sizes", sizes, torch.float32, tokens.shape[:2], tokens, "tokens")
    merged = check_int(op, "merged", merged, 0)
    most = tokens.shape[1] // 2
    if merged > most:
        raise ValueError(
            f"{op}: expected merged of at most {most}, half of the {tokens.shape[1]} tokens, "
            f"got {merged}"
        )
    run = for_type_of(tokens, _token_merge, token_merge_ref)
    return Merged(*run(tokens, sizes, merged))

"""Means of groups of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from expedite_d2.ops._checks import check_int, check_map, check_typed
from expedite_d2.ops._registration import define, for_type_of
from expedite_d2.ops.reference import token_pool_ref

_token_pool = define(
    "token_pool", "(Tensor tokens, Tensor groups, SymInt count) -> Tensor", token_pool_ref
)


@torch.library.register_fake(_token_pool)
def _fake(tokens: Tensor, groups: Tensor, count: int) -> Tensor:
    return tokens.new_empty((tokens.shape[0], count, tokens.shape[2]))


@register_flop_formula(torch.ops.expedite_d2.token_pool)
def _flops(tokens: Sequence[int], *_: object, **__: object) -> int:
    """Twice the multiply-adds, one per value."""
    return 2 * math.prod(tokens)


def _setup_context(ctx, inputs, output) -> None:
    if ctx.needs_input_grad[0]:
        ctx.save_for_backward(inputs[1])


def _backward(ctx, grad: Tensor):
    grad_tokens = None
    if ctx.needs_input_grad[0]:
        (groups,) = ctx.saved_tensors
        belongs = (groups >= 0) & (groups < grad.shape[1])
        at = torch.where(belongs, groups, 0).to(torch.int64)
        members = torch.zeros(grad.shape[:2], device=grad.device)
        members = members.scatter_add(1, at, belongs.float())
        share = belongs / members.gather(1, at).clamp_min(1)  # 0 for a token of no group
        rows = grad.gather(1, at[..., None].expand(-1, -1, grad.shape[2]))
        grad_tokens = (rows * share[..., None]).to(grad.dtype)
    return grad_tokens, None, None


torch.library.register_autograd(_token_pool, _backward, setup_context=_setup_context)


def token_pool(tokens: Tensor, groups: Tensor, count: int) -> Tensor:
    """Averages the tokens of each group.

    Args:
        tokens: (B, N, C), float32, bfloat16, float16 or float64, of any stride.
        groups: (B, N), int32, the group of each token, such as :func:`token_merge`'s places. A
            token whose group is not one of 0 ... count - 1 belongs to none.
        count: Number of groups of an image, at least 1.

    Returns:
        means: (B, count, C), of the type of ``tokens``; zeros for a group without tokens.
        Differentiable in ``tokens``.

    Raises:
        ValueError, TypeError: For an argument of wrong shape, value or type.

    Note:
        All members of a group count alike. Sums are float32 (float64 for float64 tokens), also
        under autocast, in the order of the tokens; deterministic.
    """
    op = "token_pool"
    check_map(op, "tokens", tokens, "(B, N, C)")
    check_typed(op, "groups", groups, torch.int32, tokens.shape[:2], tokens, "tokens")
    count = check_int(op, "count", count, 1)
    run = for_type_of(tokens, _token_pool, token_pool_ref)
    return run(tokens, groups, count)

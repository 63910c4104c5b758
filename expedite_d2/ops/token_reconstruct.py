"""Reconstruction of the high-resolution map from refined centres."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from expedite_d2.ops._checks import check_like, check_map, check_typed
from expedite_d2.ops._registration import define, for_type_of
from expedite_d2.ops.reference import token_reconstruct_backward_ref, token_reconstruct_ref

_token_reconstruct = define(
    "token_reconstruct",
    "(Tensor refined, Tensor indices, Tensor weights, Tensor? tokens, Tensor? centres) -> Tensor",
    token_reconstruct_ref,
)
# A separate operator, so that compilers do not trace through it. It has no kernel: models are
# expedited for evaluation, and training through them need not be fast.
_token_reconstruct_backward = define(
    "_token_reconstruct_backward",
    "(Tensor grad, Tensor indices, Tensor weights, int[] cells) -> Tensor",
    token_reconstruct_backward_ref,
)


@torch.library.register_fake(_token_reconstruct)
def _fake(
    refined: Tensor,
    indices: Tensor,
    weights: Tensor,
    tokens: Tensor | None,
    centres: Tensor | None,
) -> Tensor:
    return refined.new_empty((*indices.shape[:3], refined.shape[3]))


@torch.library.register_fake(_token_reconstruct_backward)
def _backward_fake(grad: Tensor, indices: Tensor, weights: Tensor, cells: Sequence[int]) -> Tensor:
    return grad.new_empty((grad.shape[0], *cells, grad.shape[3]))


@register_flop_formula(
    [torch.ops.expedite_d2.token_reconstruct, torch.ops.expedite_d2._token_reconstruct_backward]
)
def _flops(x: Sequence[int], indices: Sequence[int], *_: object, **__: object) -> int:
    """Twice the multiply-adds: topk centres per token, C values each; ``x`` is refined or grad."""
    return 2 * math.prod(indices) * x[3]


def _setup_context(ctx, inputs, output) -> None:
    refined, indices, weights, _, _ = inputs
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[4]:
        ctx.save_for_backward(indices, weights)
        ctx.cells = list(refined.shape[1:3])


def _backward(ctx, grad: Tensor):
    needs_refined, needs_tokens, needs_centres = (ctx.needs_input_grad[i] for i in (0, 3, 4))
    grad_refined = grad_centres = None
    if needs_refined or needs_centres:
        indices, weights = ctx.saved_tensors
        grad_cells = _token_reconstruct_backward(grad, indices, weights, ctx.cells)
        grad_refined = grad_cells if needs_refined else None
        grad_centres = -grad_cells if needs_centres else None
    return grad_refined, None, None, grad if needs_tokens else None, grad_centres


torch.library.register_autograd(_token_reconstruct, _backward, setup_context=_setup_context)


def token_reconstruct(
    refined: Tensor,
    indices: Tensor,
    weights: Tensor,
    *,
    tokens: Tensor | None = None,
    centres: Tensor | None = None,
) -> Tensor:
    """Distributes refined centres to the tokens that were matched to them.

    Without ``tokens`` and ``centres`` a token becomes the weighted sum of its refined centres y,
    sum_i w_i y_i (arXiv 2210.01035, section 3.2). With both, it keeps its own detail and gains
    what the low-resolution blocks added to its centres: z + sum_i w_i (y_i - s_i).

    Args:
        refined: (B, h', w', C), y, float32, bfloat16, float16 or float64, of any stride.
        indices: (B, H, W, topk), int32, from :func:`token_match`.
        weights: (B, H, W, topk), float32, from :func:`token_match`.
        tokens: (B, H, W, C), z, before clustering, of the type of ``refined``.
        centres: (B, h', w', C), s, before refinement, of the type of ``refined``.

    Returns:
        tokens: (B, H, W, C), of the type of ``refined``. Differentiable in ``refined``, ``tokens``
        and ``centres``.

    Raises:
        ValueError, TypeError: For an argument of wrong shape or type, or only one of ``tokens`` and
            ``centres``.

    Note:
        Sums are float32 (float64 for float64 input), also under autocast, in the order of the
        indices; forward and backward are deterministic.
    """
    op = "token_reconstruct"
    check_map(op, "refined", refined, "(B, h', w', C)")
    if not isinstance(indices, Tensor) or indices.dim() != 4 or 0 in indices.shape[1:]:
        got = list(indices.shape) if isinstance(indices, Tensor) else repr(indices)
        raise ValueError(f"{op}: expected indices of shape (B, H, W, topk), got {got}")
    shape = (refined.shape[0], *indices.shape[1:])
    check_typed(op, "indices", indices, torch.int32, shape, refined, "refined")
    check_typed(op, "weights", weights, torch.float32, shape, refined, "refined")
    if (tokens is None) != (centres is None):
        missing = "tokens" if tokens is None else "centres"
        raise ValueError(f"{op}: expected tokens and centres together, got no {missing}")
    if tokens is not None and centres is not None:
        grid = (*indices.shape[:3], refined.shape[3])
        check_like(op, "tokens", tokens, grid, refined, "refined")
        check_like(op, "centres", centres, refined.shape, refined, "refined")
    run = for_type_of(refined, _token_reconstruct, token_reconstruct_ref)
    return run(refined, indices, weights, tokens, centres)

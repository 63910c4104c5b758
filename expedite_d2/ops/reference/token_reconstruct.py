"""Reference of token_reconstruct and of its gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from expedite_d2.ops.reference._sums import add_rows
from expedite_d2.ops.reference._windows import no_autocast, precise


def token_reconstruct_ref(
    refined: Tensor,
    indices: Tensor,
    weights: Tensor,
    tokens: Tensor | None,
    centres: Tensor | None,
) -> Tensor:
    """Reference of :func:`expedite_d2.ops.token_reconstruct`."""
    with no_autocast(refined):
        batch, channels = refined.shape[0], refined.shape[3]
        delta = precise(refined)
        if centres is not None:
            delta = delta - precise(centres)
        # One flat table for all images, so that each of the topk steps is a single lookup.
        table = delta.reshape(-1, channels)
        first = torch.arange(batch, device=refined.device) * (refined.shape[1] * refined.shape[2])
        at = indices.to(torch.int64) + first.view(-1, 1, 1, 1)
        weights = weights.detach().to(table.dtype)
        out = torch.zeros((*indices.shape[:3], channels), dtype=table.dtype, device=refined.device)
        if tokens is not None:
            out = precise(tokens)
        for k in range(indices.shape[3]):
            out = out + weights[..., k, None] * table[at[..., k]]
        return out.to(refined.dtype if tokens is None else tokens.dtype).contiguous()


def token_reconstruct_backward_ref(
    grad: Tensor, indices: Tensor, weights: Tensor, cells: Sequence[int]
) -> Tensor:
    """Gradient of ``refined`` (B, *cells, C) for ``grad`` of the output (B, H, W, C)."""
    with no_autocast(grad):
        dtype, grad = grad.dtype, precise(grad)
        batch, channels = grad.shape[0], grad.shape[3]
        total = cells[0] * cells[1]
        first = torch.arange(batch, device=grad.device) * total
        at = indices.to(torch.int64) + first.view(-1, 1, 1, 1)
        out = grad.new_zeros(batch * total, channels)
        for k in range(indices.shape[3]):
            part = (grad * weights[..., k, None].to(grad.dtype)).reshape(-1, channels)
            out = add_rows(out, at[..., k].reshape(-1), part)
        return out.view(batch, cells[0], cells[1], channels).to(dtype)

"""Attention within windows, by `torch.nn.functional.scaled_dot_product_attention`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# SwinV2's largest logarithm of the factor of its cosines.
MAX_LOGIT_SCALE = math.log(100.0)


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Splits (windows, N, 3C) into query, key and value, each (windows, heads, N, C / heads)."""
    count, positions, channels = qkv.shape
    qkv = qkv.view(count, positions, 3, heads, channels // (3 * heads))
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


def bias_of_pairs(table: Tensor, positions: Tensor) -> Tensor:
    """Returns the bias of each head for each pair of positions in a window.

    Args:
        table: (rows, heads), a row for each relative position.
        positions: (N, N), row of each pair.

    Returns:
        (heads, N, N).
    """
    # One gather per head: several times faster than indexing rows and then transposing.
    index = positions.view(1, -1).expand(table.shape[1], -1)
    return table.t().contiguous().gather(1, index).view(-1, *positions.shape)


def for_batch(mask: Tensor | None, windows: int) -> Tensor | None:
    """Repeats the mask (windows, N, N) of one map, or None, for the windows of a batch of maps.

    Returns:
        (windows, 1, N, N), as `attend` takes it, or None.
    """
    return None if mask is None else mask.repeat(windows // mask.shape[0], 1, 1).unsqueeze(1)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    dropout: float,
    scale: float | None,
) -> Tensor:
    """Attends within each window.

    Args:
        query, key, value: (windows, heads, N, d).
        bias: (heads, N, N), added to the logits.
        mask: (windows with a seam, 1, N, N), added to the logits of the last windows, or None.
        dropout: probability of dropping a weight.
        scale: factor of the products of queries and keys; None for 1 / sqrt(d).

    Returns:
        (windows, N, heads * d).
    """
    bias = bias[None].to(query.dtype)
    # Most windows have no seam, and share a bias that need not be copied for each.
    whole = query.shape[0] - (0 if mask is None else mask.shape[0])
    parts = [(slice(whole), bias)] if whole else []
    if mask is not None:
        parts.append((slice(whole, None), bias + mask.to(query.dtype)))
    outputs = [
        F.scaled_dot_product_attention(
            query[part], key[part], value[part], attn_mask=added, dropout_p=dropout, scale=scale
        )
        .transpose(1, 2)
        .flatten(2)
        for part, added in parts
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def attend_by_direction(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    dropout: float,
    logit_scale: Tensor,
) -> Tensor:
    """Attends within each window as SwinV2 does: by cosines of queries and keys, times a factor.

    Args:
        logit_scale: (heads, 1, 1), the logarithm of this factor, which is at most 100.
        query, key, value, bias, mask, dropout: see `attend`.

    Returns:
        (windows, N, heads * d).
    """
    query = _directions(query) * logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
    query, key = query.to(value.dtype), _directions(key).to(value.dtype)
    return attend(query, key, value, bias, mask, dropout, scale=1.0)


def _directions(x: Tensor) -> Tensor:
    """Normalises vectors to length 1, in float32 or better."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    # Keys of padding are zero. With the usual 1e-12 their gradients would be infinite.
    return x / norm.masked_fill(norm == 0, 1.0)

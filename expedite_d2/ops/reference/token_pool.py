"""Reference of token_pool."""

from __future__ import annotations

import torch
from torch import Tensor

from expedite_d2.ops.reference._sums import add_rows
from expedite_d2.ops.reference._windows import no_autocast, precise


def token_pool_ref(tokens: Tensor, groups: Tensor, count: int) -> Tensor:
    """Reference of :func:`expedite_d2.ops.token_pool`."""
    with no_autocast(tokens):
        x = precise(tokens)
        batch, _, channels = x.shape
        # One flat table for all images, with one more row in each for the tokens of no group.
        group = torch.where((groups >= 0) & (groups < count), groups, count)
        first = torch.arange(batch, device=x.device)[:, None] * (count + 1)
        at = (group + first).flatten()
        rows = x.flatten(0, 1)
        sums = add_rows(x.new_zeros(batch * (count + 1), channels), at, rows)
        members = add_rows(sums.new_zeros(sums.shape[0], 1), at, torch.ones_like(rows[:, :1]))
        means = (sums / members.clamp_min(1)).view(batch, count + 1, channels)
        return means[:, :count].to(tokens.dtype).contiguous()

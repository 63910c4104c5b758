"""Whether a result of token_merge is right, whichever of nearly equal tokens it prefers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from op_cases import tolerance
from torch import Tensor

# What float32 makes of a cosine of a few hundred channels.
COSINE_ERROR = 4e-6


def assert_merged(tokens: Tensor, sizes: Tensor, merged: int, out: Sequence[Tensor]) -> None:
    """Finite tokens, against all cosines and means in float64."""
    new_tokens, new_sizes, places = out
    assert all(x.is_contiguous() for x in out)
    batch, count, _ = tokens.shape
    odds = count // 2
    staying = count - odds - merged
    assert (places[:, 1::2] == staying + torch.arange(odds, device=tokens.device)).all()
    even = places[:, ::2].long()
    joins = even >= staying
    assert (joins.sum(1) == merged).all() and (even < count - merged).all()
    in_order = torch.arange(staying, device=tokens.device).expand(batch, -1)
    assert torch.equal(even[~joins].view(batch, staying), in_order)
    if merged:
        exact = tokens.double()
        unit = exact / exact.norm(dim=2, keepdim=True).clamp_min(1e-12)
        cosines = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
        best = cosines.amax(2)
        chosen = cosines.gather(2, (even - staying).clamp_min(0)[..., None])[..., 0]
        assert ((best - chosen)[joins] <= 2 * COSINE_ERROR).all()
        infinite = torch.full_like(best, torch.inf)
        worst_joined = torch.where(joins, best, infinite).amin(1)
        best_staying = torch.where(joins, -infinite, best).amax(1)
        assert (worst_joined >= best_staying - 2 * COSINE_ERROR).all()
    assert_means(tokens, sizes, places, new_tokens, new_sizes)


def mean_weights(sizes: Tensor, places: Tensor, rows: int) -> Tensor:
    """(B, rows, N) in float64: the sizes of the members of each new token, 0 for other tokens."""
    weights = sizes.new_zeros(sizes.shape[0], rows, sizes.shape[1], dtype=torch.float64)
    return weights.scatter(1, places[:, None].long(), sizes[:, None].double())


def assert_means(
    tokens: Tensor, sizes: Tensor, places: Tensor, new_tokens: Tensor, new_sizes: Tensor
) -> None:
    """The means of what `places` says, bit for bit where a token is alone."""
    rows, channels = new_tokens.shape[1:]
    weights = mean_weights(sizes, places, rows)
    torch.testing.assert_close(new_sizes.double(), weights.sum(2), rtol=1e-6, atol=0)
    expected = weights @ tokens.double() / weights.sum(2, keepdim=True)
    error = (new_tokens.double() - expected).abs()
    limit = tolerance(tokens.dtype)["rtol"] * expected.abs() + 2e-6 * tokens.double().abs().max()
    assert (error <= limit).all()
    alone = (weights > 0).sum(2) == 1
    at = weights.argmax(2)[..., None].expand(-1, -1, channels)
    assert torch.equal(new_tokens[alone], tokens.gather(1, at)[alone])

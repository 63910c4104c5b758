"""Reference of token_merge."""

from __future__ import annotations

import torch
from torch import Tensor

from expedite_d2.ops.reference._sums import add_rows
from expedite_d2.ops.reference._windows import no_autocast, precise


def token_merge_ref(tokens: Tensor, sizes: Tensor, merged: int) -> tuple[Tensor, Tensor, Tensor]:
    """Reference of :func:`expedite_d2.ops.token_merge`; the pairing counts as a constant."""
    with no_autocast(tokens):
        x = precise(tokens)
        size = sizes.detach()[..., None].to(x.dtype)
        batch, count, channels = x.shape
        odds = count // 2
        staying = count - odds - merged  # even tokens, before the odd ones in the new order
        partner, joins, stays = _pairing(x, merged)
        image = torch.arange(batch, device=x.device)[:, None]
        target = partner[image, joins]  # (B, merged), among the odd tokens

        # One flat table for all images.
        at = (target + image * odds).flatten()
        even, odd = x[:, ::2], x[:, 1::2]
        even_size, odd_size = size[:, ::2], size[:, 1::2]
        joining_size = even_size[image, joins]
        joining = (even[image, joins] * joining_size).flatten(0, 1)
        sums = add_rows((odd * odd_size).flatten(0, 1), at, joining).view(batch, odds, channels)
        total = add_rows(odd_size.flatten(0, 1), at, joining_size.flatten(0, 1))
        total = total.view(batch, odds, 1)
        joined = add_rows(x.new_zeros(batch * odds, 1), at, x.new_ones(batch * merged, 1))
        odd = torch.where(joined.view(batch, odds, 1) > 0, sums / total, odd)

        # Where the tokens were and are: in the new order, then those that join another.
        order = torch.arange(staying + odds, device=x.device).expand(batch, -1)
        odd_tokens = 1 + 2 * torch.arange(odds, device=x.device).expand(batch, -1)
        before = torch.cat([2 * stays, odd_tokens, 2 * joins], 1)
        after = torch.cat([order, staying + target], 1)
        places = torch.zeros_like(before).scatter(1, before, after).to(torch.int32)
        return (
            torch.cat([even[image, stays], odd], 1).to(tokens.dtype),
            torch.cat([even_size[image, stays], total], 1)[..., 0].float(),
            places,
        )


def _unit_rows(x: Tensor) -> Tensor:
    """Tokens of length 1; NaN where the length is not finite."""
    length = x.square().sum(2, keepdim=True).sqrt()
    length = torch.where(length.isfinite(), length, torch.full_like(length, torch.nan))
    return x / length.clamp_min(1e-12)


def _pairing(x: Tensor, merged: int) -> tuple[Tensor, Tensor, Tensor]:
    """Finds who merges with whom.

    Returns:
        partner: (B, E), the odd token of each even one; both are counted by themselves.
        joins: (B, merged), the even tokens that become part of their partner, in order.
        stays: (B, E - merged), the others, in order.
    """
    with torch.no_grad():
        unit = _unit_rows(x)
        even, odd = unit[:, ::2], unit[:, 1::2]
        if merged == 0:  # perhaps there is no odd token
            everyone = torch.arange(even.shape[1], device=x.device).expand(even.shape[:2])
            return torch.zeros_like(everyone), everyone[:, :0], everyone
        cosines = (even @ odd.transpose(1, 2)).nan_to_num(nan=-torch.inf)
        partner = cosines.argmax(2)  # the first of equals
        # A sum of its own: those of a matrix product may differ between equal rows.
        chosen = odd.gather(1, partner[..., None].expand(-1, -1, x.shape[2]))
        scores = (even * chosen).sum(2).nan_to_num(nan=-torch.inf)
        order = _descending(scores)
        return partner, order[:, :merged].sort(1).values, order[:, merged:].sort(1).values


def _descending(scores: Tensor) -> Tensor:
    """Returns the places of scores (B, E) from the greatest to the least, of equals the first.

    That is a stable sort, for which exporters know no operator.
    """
    place = torch.arange(scores.shape[1], device=scores.device)
    one, other = scores[:, :, None], scores[:, None]
    ahead = (other > one) | ((other == one) & (place < place[:, None]))
    return torch.zeros_like(ahead[..., 0], dtype=torch.int64).scatter(
        1, ahead.sum(2), place.expand(scores.shape)
    )

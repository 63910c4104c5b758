"""Layers of each token by itself, on a part of the tokens at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Numbers in the hidden channels of a part: they stay in a CPU's cache.
_AT_A_TIME = 2**21


def in_parts(run: Callable[[Tensor], Tensor], x: Tensor, hidden: int) -> Tensor:
    """Runs a layer of each token by itself: at inference on a CPU, on one part after the other.

    Args:
        run: the layer with its norm and its residual, (B, n, C) -> the same shape and type.
        x: (B, N, C).
        hidden: its largest number of channels within.

    Returns:
        (B, N, C).
    """
    count = max(_AT_A_TIME // (hidden * max(len(x), 1)), 1)
    whole = x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling()
    if whole or count >= x.shape[1]:
        return run(x)
    out = torch.empty_like(x)
    for part, place in zip(x.split(count, dim=1), out.split(count, dim=1), strict=True):
        place.copy_(run(part))
    return out

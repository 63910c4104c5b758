"""Argument checks of the operators.

Each message names the operator, the argument, what was expected and what came.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NAMES = "float32, bfloat16, float16 or float64"
# Kernels index cells and tokens of an axis in 32 bits, also the product of its two sizes.
_LIMIT = 2**31


def _got(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}, {value.dtype}, on {value.device}"
    return f"{value!r} ({type(value).__name__})"


def check_map(op: str, name: str, x: Tensor, letters: str = "(B, H, W, C)") -> None:
    """Requires a floating point tensor of four axes, of which only the batch may be empty."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: expected {name} to be a tensor {letters}, got {_got(x)}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{op}: expected {name} of type {_NAMES}, got {x.dtype}")
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(
            f"{op}: expected {name} of shape {letters} with at least one token and channel, "
            f"got {list(x.shape)}"
        )


def _pair(op: str, name: str, value: Sequence[int]) -> list[int]:
    if (
        not isinstance(value, (tuple, list))
        or len(value) != 2
        or not all(isinstance(side, (int, torch.SymInt)) and side >= 1 for side in value)
    ):
        raise ValueError(f"{op}: expected {name} to be two positive integers, got {value!r}")
    return [value[0], value[1]]


def check_clusters(
    op: str, tokens: Tensor, clusters: Sequence[int], window: Sequence[int] | None
) -> tuple[list[int], list[int] | None]:
    """Requires two positive integers each; returns them as lists."""
    cells = _pair(op, "clusters", clusters)
    side = None if window is None else _pair(op, "window", window)
    for axis in (0, 1):
        tall = tokens.shape[1 + axis] if side is None else max(tokens.shape[1 + axis], side[axis])
        if (tall + 1) * (cells[axis] + 1) >= _LIMIT:
            raise ValueError(
                f"{op}: expected tokens or window times clusters below 2**31, got {tall} x "
                f"{cells[axis]}"
            )
    return cells, side


def map_size(
    tokens: Tensor, clusters: Sequence[int], window: Sequence[int] | None
) -> tuple[int, int]:
    """Size (h', w') of the map of all windows' cells."""
    height, width = tokens.shape[1:3]
    side_h, side_w = window if window is not None else (height, width)
    return (
        (height * clusters[0] + side_h - 1) // side_h,
        (width * clusters[1] + side_w - 1) // side_w,
    )


def check_int(op: str, name: str, value: int, least: int, *, odd: bool = False) -> int:
    """Requires an integer of at least ``least``, odd where asked."""
    if not isinstance(value, (int, torch.SymInt)) or value < least or (odd and value % 2 == 0):
        kind = "an odd integer" if odd else "an integer"
        raise ValueError(f"{op}: expected {name} to be {kind} of at least {least}, got {value!r}")
    return value


def check_temperature(op: str, temperature: float) -> float:
    """Requires a finite positive number."""
    if not isinstance(temperature, (int, float)):
        raise TypeError(f"{op}: expected temperature to be a number, got {_got(temperature)}")
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"{op}: expected temperature to be positive and finite, got {temperature!r}"
        )
    return float(temperature)


def check_spread(op: str, spread: Tensor | None, tokens: Tensor) -> None:
    """Requires None or float32 (B,) on the device of ``tokens``."""
    if spread is None:
        return
    if not isinstance(spread, Tensor):
        raise TypeError(f"{op}: expected spread to be a tensor (B,) or None, got {_got(spread)}")
    if spread.dtype != torch.float32:
        raise TypeError(f"{op}: expected spread of type float32, got {spread.dtype}")
    if spread.dim() != 1 or spread.shape[0] != tokens.shape[0]:
        raise ValueError(
            f"{op}: expected spread of shape [{tokens.shape[0]}], one value an image, "
            f"got {list(spread.shape)}"
        )
    check_device(op, "spread", spread, tokens, "tokens")


def check_like(op: str, name: str, x: Tensor, shape: Sequence[int], other: Tensor, of: str) -> None:
    """Requires ``x`` to have the given shape and the type and device of ``other``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: expected {name} to be a tensor, got {_got(x)}")
    if x.dtype != other.dtype:
        raise TypeError(f"{op}: expected {name} of the type of {of}, {other.dtype}, got {x.dtype}")
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{op}: expected {name} of shape {list(shape)}, got {list(x.shape)}")
    check_device(op, name, x, other, of)


def check_device(op: str, name: str, x: Tensor, other: Tensor, of: str) -> None:
    """Requires two tensors on one device."""
    if x.device != other.device:
        raise ValueError(
            f"{op}: expected {name} on the device of {of}, {other.device}, got {x.device}"
        )

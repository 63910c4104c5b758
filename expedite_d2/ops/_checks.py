"""Argument checks of the operators.

Each message names the operator, the argument, what was expected and what was given.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NAMES = "float32, bfloat16, float16 or float64"
# Kernels index the tokens and cells of an axis, and products of both numbers, in 32 bits.
_LIMIT = 2**31


def _got(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}, {value.dtype}, on {value.device}"
    return f"{value!r} ({type(value).__name__})"


def integer(value: object) -> int | None:
    """Converts a whole number, such as numpy's, to an int; None for anything else, also a bool."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return int(value) if whole else None  # type: ignore[call-overload]


def real(value: object) -> float | None:
    """Converts a number, such as numpy's, to a float; None for anything else, also a bool."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return float(value) if number else None  # type: ignore[arg-type]


def check_map(op: str, name: str, x: Tensor, letters: str = "(B, H, W, C)") -> None:
    """Requires a floating point tensor of these axes, of which only the batch may be empty."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: expected {name} to be a tensor {letters}, got {_got(x)}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{op}: expected {name} of type {_NAMES}, got {x.dtype}")
    if x.dim() != letters.count(",") + 1 or 0 in x.shape[1:]:
        raise ValueError(
            f"{op}: expected {name} of shape {letters} with at least one token and channel, "
            f"got {list(x.shape)}"
        )


def _pair(op: str, name: str, value: Sequence[int]) -> list[int]:
    sides = [integer(side) for side in value] if isinstance(value, (tuple, list)) else []
    if len(sides) != 2 or not all(side is not None and side >= 1 for side in sides):
        raise ValueError(f"{op}: expected {name} to be two positive integers, got {value!r}")
    return sides  # type: ignore[return-value]


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
    height, width = tokens.shape[1:3]
    if height * width >= _LIMIT:
        raise ValueError(f"{op}: expected a map of fewer than 2**31 tokens, got {height} x {width}")
    return cells, side


def map_size(
    tokens: Tensor, clusters: Sequence[int], window: Sequence[int] | None
) -> tuple[int, int]:
    """Returns the size (h', w') of the map that holds the cells of all windows."""
    height, width = tokens.shape[1:3]
    side_h, side_w = window if window is not None else (height, width)
    return (
        (height * clusters[0] + side_h - 1) // side_h,
        (width * clusters[1] + side_w - 1) // side_w,
    )


def check_int(op: str, name: str, value: int, least: int, *, odd: bool = False) -> int:
    """Requires an integer of at least ``least``, odd where asked; returns it as an int."""
    number = integer(value)
    if number is None or number < least or (odd and number % 2 == 0):
        kind = "an odd integer" if odd else "an integer"
        raise ValueError(f"{op}: expected {name} to be {kind} of at least {least}, got {value!r}")
    return number


def check_temperature(op: str, temperature: float) -> float:
    """Requires a finite positive number; returns it as a float."""
    number = real(temperature)
    if number is None:
        raise TypeError(f"{op}: expected temperature to be a number, got {_got(temperature)}")
    if not 0 < number < math.inf:
        raise ValueError(
            f"{op}: expected temperature to be positive and finite, got {temperature!r}"
        )
    return number


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
            f"{op}: expected spread of shape [{tokens.shape[0]}], one value per image, "
            f"got {list(spread.shape)}"
        )
    check_device(op, "spread", spread, tokens, "tokens")


def check_like(op: str, name: str, x: Tensor, shape: Sequence[int], other: Tensor, of: str) -> None:
    """Requires ``x`` to have the given shape and the type and device of ``other``."""
    if isinstance(x, Tensor) and x.dtype != other.dtype:
        raise TypeError(f"{op}: expected {name} of the type of {of}, {other.dtype}, got {x.dtype}")
    check_typed(op, name, x, other.dtype, shape, other, of)


def check_typed(
    op: str,
    name: str,
    x: Tensor,
    dtype: torch.dtype,
    shape: Sequence[int],
    other: Tensor,
    of: str,
) -> None:
    """Requires ``x`` to have the given type and shape and the device of ``other``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: expected {name} to be a tensor, got {_got(x)}")
    if x.dtype != dtype:
        raise TypeError(f"{op}: expected {name} of type {dtype}, got {x.dtype}")
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{op}: expected {name} of shape {list(shape)}, got {list(x.shape)}")
    check_device(op, name, x, other, of)


def check_device(op: str, name: str, x: Tensor, other: Tensor, of: str) -> None:
    """Requires two tensors on one device."""
    if x.device != other.device:
        raise ValueError(
            f"{op}: expected {name} on the device of {of}, {other.device}, got {x.device}"
        )


def _integers(op: str, name: str, value: object, kind: str) -> list:
    """Converts the sizes of levels to a list, from a list or from a tensor on the CPU."""
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.device.type != "cpu":
            # Reading them from a device would wait for all work on it.
            raise TypeError(
                f"{op}: expected {name} to be {kind} or an integer tensor on the CPU, "
                f"got {_got(value)}"
            )
        return value.tolist()
    if not isinstance(value, (tuple, list)) or len(value) == 0:
        raise ValueError(f"{op}: expected {name} to be {kind}, got {_got(value)}")
    return list(value)


def _size(value: object) -> object:
    """Converts a size that is a scalar tensor, as while a model is traced, to an int."""
    return int(value) if isinstance(value, Tensor) and value.dim() == 0 else value


def check_levels(
    op: str,
    value: Tensor,
    spatial_shapes: Sequence[Sequence[int]] | Tensor,
    level_start: Sequence[int] | Tensor | None,
) -> tuple[list[int], list[int]]:
    """Requires levels that lie within ``value`` (B, S, heads, D).

    Returns:
        their sizes h0, w0, h1, w1 ... and their first rows.
    """
    shapes: list[int] = []
    for pair in _integers(op, "spatial_shapes", spatial_shapes, "(h, w) of each level"):
        sides = [_size(side) for side in pair] if isinstance(pair, (tuple, list)) else pair
        shapes += _pair(op, "spatial_shapes", sides)  # type: ignore[arg-type]
    rows, sizes = value.shape[1], [h * w for h, w in zip(shapes[::2], shapes[1::2], strict=True)]
    if level_start is None:
        starts = [sum(sizes[:level]) for level in range(len(sizes))]
        if sum(sizes) != rows:
            raise ValueError(
                f"{op}: expected value of {sum(sizes)} rows, the sum of spatial_shapes, got {rows}"
            )
        return shapes, starts
    starts = [
        _size(start)  # type: ignore[misc]
        for start in _integers(op, "level_start", level_start, "one row for each level")
    ]
    if len(starts) != len(sizes):
        raise ValueError(
            f"{op}: expected level_start to be one row for each of the {len(sizes)} levels of "
            f"spatial_shapes, got {starts!r}"
        )
    starts = [check_int(op, "level_start", start, 0) for start in starts]
    for start, size in zip(starts, sizes, strict=True):
        if start + size > rows:
            raise ValueError(
                f"{op}: expected level_start and spatial_shapes within the {rows} rows of value, "
                f"got {size} rows from {start}"
            )
    return shapes, starts


def check_samples(op: str, value: Tensor, levels: int, locations: Tensor) -> None:
    """Requires sampling locations (B, Q, heads, levels, points, 2) for ``value``."""
    name, letters = "sampling_locations", "(B, Q, heads, levels, points, 2)"
    if not isinstance(locations, Tensor):
        raise TypeError(f"{op}: expected {name} to be a tensor {letters}, got {_got(locations)}")
    if locations.dtype not in (torch.float32, value.dtype):
        raise TypeError(
            f"{op}: expected {name} of type float32 or that of value, {value.dtype}, "
            f"got {locations.dtype}"
        )
    batch, _, heads, _ = value.shape
    shape = tuple(locations.shape)
    if (
        len(shape) != 6
        or shape[:1] + shape[2:4] + shape[5:] != (batch, heads, levels, 2)
        or 0 in shape[1:]
    ):
        raise ValueError(
            f"{op}: expected {name} of shape {letters} with B = {batch}, {heads} heads, {levels} "
            f"levels and at least one query and point, got {list(shape)}"
        )
    check_device(op, name, locations, value, "value")

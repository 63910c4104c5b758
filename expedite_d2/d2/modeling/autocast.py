"""Autocast to the type in which a model computes."""

from __future__ import annotations

import contextlib

import torch


def autocast_to(dtype: torch.dtype, device: torch.device) -> contextlib.AbstractContextManager:
    """Returns autocast to ``dtype`` on a device; for float32, one that switches autocast off."""
    if device.type == "meta":  # only counting operations
        return contextlib.nullcontext()
    half = dtype != torch.float32
    return torch.autocast(device.type, dtype=dtype if half else None, enabled=half)

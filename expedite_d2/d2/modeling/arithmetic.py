"""Autocast: the arithmetic in which models run."""

from __future__ import annotations

import contextlib
from typing import Protocol

import torch


class Evaluated(Protocol):
    """A model whose ``TEST.DTYPE`` is the arithmetic for evaluation."""

    training: bool
    eval_dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        ...


def arithmetic(dtype: torch.dtype, device: torch.device) -> contextlib.AbstractContextManager:
    """Returns autocast to ``dtype`` on a device; for float32, one that switches autocast off."""
    if device.type == "meta":  # only counting operations
        return contextlib.nullcontext()
    half = dtype != torch.float32
    return torch.autocast(device.type, dtype=dtype if half else None, enabled=half)


def evaluation_arithmetic(model: Evaluated) -> contextlib.AbstractContextManager:
    """Returns autocast to a model's type at evaluation; without one, the caller's choice stays."""
    if model.training or model.eval_dtype == torch.float32:
        return contextlib.nullcontext()
    return arithmetic(model.eval_dtype, model.device)

"""The arithmetic that models run in."""

from __future__ import annotations

import contextlib
from typing import Protocol

import torch


class Evaluated(Protocol):
    """A model with an arithmetic for evaluation, its ``TEST.DTYPE``."""

    training: bool
    eval_dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        ...


def arithmetic(dtype: torch.dtype, device: torch.device) -> contextlib.AbstractContextManager:
    """Autocast to ``dtype`` on a device; float32 ends one that is under way."""
    if device.type == "meta":  # counting operations: there is no arithmetic
        return contextlib.nullcontext()
    half = dtype != torch.float32
    return torch.autocast(device.type, dtype=dtype if half else None, enabled=half)


def evaluation_arithmetic(model: Evaluated) -> contextlib.AbstractContextManager:
    """The model's own at evaluation; in training and in float32, what the caller has chosen."""
    if model.training or model.eval_dtype == torch.float32:
        return contextlib.nullcontext()
    return arithmetic(model.eval_dtype, model.device)

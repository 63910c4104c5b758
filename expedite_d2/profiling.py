"""Names for spans of work, which profilers show."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def profiler_range(name: str, tensor: Tensor) -> AbstractContextManager[None]:
    """Names a span of work: for torch.profiler where it runs, else for Nsight on a GPU.

    Nothing while a model is compiled, whose spans are the compiler's own.

    Args:
        name: "expedite_d2." and the part of the model.
        tensor: what the work is about, on its device.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    if torch.autograd._profiler_enabled():
        return torch.profiler.record_function(name)
    return torch.cuda.nvtx.range(name) if tensor.is_cuda else nullcontext()

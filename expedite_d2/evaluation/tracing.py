"""jit tracing of models whose tensors are on the ``meta`` device.

fvcore counts in a jit trace. Three things stand between that and a model without memory:

- Meta kernels are written in Python, and sizes read while tracing are tensors, which their checks
  refuse. Tracing is local to a thread, so kernels run in another one.
- A convolution on meta is not recorded (its tracing kernel is skipped there); ``_convolution``, as
  which it is recorded on every other device, is.
- ``torch.autocast`` refuses the meta device, even to be switched off. The arithmetic's type changes
  no count, so it is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_CONVOLUTION = torch.ops.aten.convolution.default
_RECORDED_CONVOLUTION = torch.ops.aten._convolution.default


@contextmanager
def tracing_on_meta() -> Iterator[set[str]]:
    """Context in which a model on the meta device can be traced, without gradients.

    Yields:
        The operators that ran unrecorded and that a count in the trace therefore misses; filled as
        they run.
    """
    with ThreadPoolExecutor(1, initializer=torch.set_grad_enabled, initargs=(False,)) as thread:
        kernels = _KernelsElsewhere(thread)
        with (
            torch.no_grad(),
            mock.patch.object(torch, "autocast", lambda *args, **kwargs: nullcontext()),
            kernels,
            _RecordConvolutions(),
        ):
            yield kernels.unrecorded


class _KernelsElsewhere(TorchDispatchMode):
    """Runs every kernel in ``thread``."""

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        super().__init__()
        self.thread = thread
        self.unrecorded: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func.is_view:  # written in C++, and views may not change threads
            return func(*args, **(kwargs or {}))
        if func is _CONVOLUTION:
            self.unrecorded.add("aten::convolution")
        elif func is _RECORDED_CONVOLUTION:  # has no meta kernel; its last four are backend flags
            func, args = _CONVOLUTION, args[:-4]
        return self.thread.submit(func, *args, **(kwargs or {})).result()


class _RecordConvolutions(TorchFunctionMode):
    """Calls convolutions under the name that the tracer records."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        replacement = _CONVOLUTIONS.get(func, func)
        return replacement(*args, **(kwargs or {}))


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    return _convolution(input, weight, bias, stride, padding, dilation, False, 0, groups)


def _conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    return _convolution(
        input, weight, bias, stride, padding, dilation, True, output_padding, groups
    )


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    transposed: bool,
    output_padding: int | Sequence[int],
    groups: int,
) -> Tensor:
    return torch._convolution(
        input,
        weight,
        bias,
        _pair(stride),
        _pair(padding),
        _pair(dilation),
        transposed,
        _pair(output_padding),
        groups,
        False,
        False,
        False,
        False,
    )


_CONVOLUTIONS = {torch.conv2d: _conv2d, torch.conv_transpose2d: _conv_transpose2d}

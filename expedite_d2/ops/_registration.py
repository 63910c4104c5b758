"""Registration of the operators with PyTorch's dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

_IMPLEMENTATIONS: dict[OpOverload, Callable[..., Any]] = {}


def define(name: str, schema: str, implementation: Callable[..., Any]) -> OpOverload:
    """Defines an operator.

    Args:
        name: without the namespace, which is ``expedite_d2``.
        schema: arguments and results, as ``torch.library.define`` takes them.
        implementation: what runs on a device for which no kernel is registered.

    Returns:
        ``torch.ops.expedite_d2.<name>.default``.
    """
    torch.library.define(f"expedite_d2::{name}", schema)
    torch.library.impl(f"expedite_d2::{name}", "default", implementation)
    operator = getattr(torch.ops.expedite_d2, name).default
    _IMPLEMENTATIONS[operator] = implementation
    return operator


def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """Returns what each operator is in standard operators, for ``torch.export``.

    A program without operators of this package runs where it is not installed, and can be
    translated to other formats, ONNX among them::

        program = torch.export.export(model, (images,))
        program = program.run_decompositions(expedite_d2.ops.decompositions())
        torch.onnx.export(program, f="model.onnx")

    Results are the same up to rounding. In PyTorch the operators are faster: docs/performance.md.
    """
    return dict(_IMPLEMENTATIONS)


def nondifferentiable(operator: OpOverload) -> None:
    """Registers that an operator's results have no gradient, whatever its arguments require."""
    no_gradients = (None,) * len(operator._schema.arguments)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))

    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        return no_gradients

    torch.library.register_autograd(operator, backward, setup_context=setup_context)


def for_type_of(x: Tensor, operator: OpOverload, reference: Callable[..., Any]) -> Callable:
    """Chooses between an operator and its reference by the type of its input.

    The kernels are for the types that models run in; float64 serves tests of gradients.
    """
    return reference if x.dtype == torch.float64 else operator

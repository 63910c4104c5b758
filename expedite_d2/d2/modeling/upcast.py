"""16-bit layers on CPUs without instructions for 16-bit products.

On these, a product of bfloat16 matrices takes two to four times as long as one of float32 matrices,
and one of float16 matrices ten to twenty times (Ice Lake, PyTorch 2.15). These layers then multiply
in float32, and round only the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def _slow_dtypes(capabilities: Mapping[str, Any]) -> tuple[torch.dtype, ...]:
    """Returns the types that a CPU with these capabilities multiplies faster in float32."""
    if capabilities.get("architecture") != "x86_64":
        return ()
    instructions = {
        torch.bfloat16: ("avx512_bf16", "amx_bf16"),
        torch.float16: ("avx512_fp16", "amx_fp16"),
    }
    return tuple(
        dtype
        for dtype, names in instructions.items()
        if not any(capabilities.get(name) for name in names)
    )


# Of this machine's CPU. An older PyTorch does not report capabilities: all products are then left
# as they are.
_SLOW = _slow_dtypes(torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {})


def upcast_product(
    function: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Computes a layer's product, in float32 if the CPU is slow in its own type.

    Args:
        function: function of input, weight and bias, such as ``torch.nn.functional.linear``.
        x: input of the layer.
        weight: weight of the layer.
        bias: bias of the layer, or None.

    Returns:
        ``function(x, weight, bias)``, in the type that it has without the detour.
    """
    dtype = x.dtype
    if x.device.type == "cpu" and dtype != torch.float64 and torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    if x.device.type != "cpu" or dtype not in _SLOW:
        return function(x, weight, bias)
    with torch.autocast("cpu", enabled=False):
        bias = None if bias is None else bias.float()
        return function(x.float(), weight.float(), bias).to(dtype)


class UpcastLinear(nn.Linear):
    """``torch.nn.Linear`` by way of `upcast_product`."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return upcast_product(nn.functional.linear, input, self.weight, self.bias)


class UpcastConv2d(nn.Conv2d):
    """``torch.nn.Conv2d`` by way of `upcast_product`."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return upcast_product(super()._conv_forward, input, weight, bias)


def upcast_layers(model: nn.Module) -> None:
    """Replaces a model's linear layers and 2-D convolutions by these, where the CPU is slow.

    Names, parameters and hooks stay, and so do layers of other classes than PyTorch's own. On a CPU
    that multiplies all types fast, nothing changes.
    """
    if not _SLOW:
        return
    for module in model.modules():
        # The instance keeps its weights: a new module would draw initial weights again.
        if type(module) is nn.Linear:
            module.__class__ = UpcastLinear
        elif type(module) is nn.Conv2d:
            module.__class__ = UpcastConv2d

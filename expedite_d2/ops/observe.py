"""Records the calls of an operator while a model runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class ObservedOperator(TorchFunctionMode):
    """A context that records each call of one operator in this thread.

    Attributes:
        kept: the records, in the order of the calls.
    """

    def __init__(
        self, operator: torch._ops.OpOverload, keep: Callable[[dict[str, Any], Any], Any]
    ) -> None:
        """
        Args:
            operator: such as `torch.ops.expedite_d2.token_reduce.default`.
            keep: makes the record of a call from its arguments, by their names in the schema, and
                its result.
        """
        super().__init__()
        self.operator = operator
        self.keep = keep
        self.kept: list[Any] = []
        self._names = [argument.name for argument in operator._schema.arguments]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is self.operator:
            named = dict(zip(self._names, args, strict=False)) | (kwargs or {})
            self.kept.append(self.keep(named, result))
        return result

"""Multiply-adds of a model's forward pass.

They are counted by ``torch.utils.flop_counter`` while the model runs, best on the ``meta`` device,
where nothing is computed. torch counts two operations per multiply-add, which is halved here. For
all but products, the conventions of Detectron2's ``analyze_model`` apply, in which the costs of
published models are given: 5 per value that a layer or group norm normalises, 4 per value sampled
bilinearly, and a few more; other elementwise arithmetic, activations and softmax count nothing. The
operators of this package define their formulas beside them, for the work of the sparse formulation.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import expedite_d2.ops  # noqa: F401 (registers the operators' formulas)

Formula = Callable[..., int]
Shape = Sequence[int]


@dataclass(frozen=True)
class MultiplyAdds:
    """Multiply-adds of one call of a model.

    Attributes:
        modules: counts by module and operator. Modules are named as in ``named_modules()``, with
            "" for the model itself; operators as torch names them, such as "aten.addmm".
    """

    modules: Mapping[str, Mapping[str, int]]

    def total(self, module: str = "") -> int:
        """Returns the sum over a module and its submodules.

        Raises:
            ValueError: the model has no such module.
        """
        return sum(self.by_operator(module).values())

    def by_operator(self, module: str = "") -> dict[str, int]:
        """Returns the counts of a module and its submodules, by operator.

        Raises:
            ValueError: the model has no such module.
        """
        if module not in self.modules:
            raise ValueError(f"the model that was counted has no module {module!r}")
        return dict(self.modules[module])


@torch.no_grad()
def count_multiply_adds(
    model: nn.Module, *inputs: Any, call: Callable[..., Any] | None = None, **options: Any
) -> MultiplyAdds:
    """Runs a model once, and counts its multiply-adds by submodule and operator.

    The model runs as it is, on the device where it is, in training or evaluation mode. On ``meta``
    no memory is needed and nothing is computed; see `on_meta`. Operators that multiply and have no
    formula are named in a warning.

    Args:
        model: the module whose submodules are counted separately.
        inputs, options: its arguments, on its device.
        call: what is called with them instead of the model, such as a method of it.

    Note:
        Attention runs without fused kernels meanwhile, so that all devices give the same count.
    """
    root = _Root(model, model if call is None else call)
    counter = FlopCounterMode(display=False, custom_mapping=_conventions())
    with _plain_kernels(), _Uncounted(counter) as uncounted, counter:
        root(*inputs, **options)
    if uncounted.names:
        warnings.warn(
            f"multiply-adds: not counted: {', '.join(sorted(uncounted.names))}", stacklevel=3
        )
    counts = {
        module: Counter({str(operator): flops // 2 for operator, flops in operators.items()})
        for module, operators in counter.get_flop_counts().items()
    }
    prefix = f"{_Root.__name__}.model"
    names = {name: f"{prefix}.{name}" for name, _ in model.named_modules(remove_duplicate=False)}
    names[""] = "Global"
    return MultiplyAdds({name: +counts.get(known, Counter()) for name, known in names.items()})


def on_meta(model: nn.Module) -> nn.Module:
    """Returns a copy of a model with its tensors on ``meta``, where they take no memory.

    It has no hooks but those of the libraries that its modules come from, and of this package:
    others would be given tensors without values.
    """
    # Others than parameters and buffers are what pruning computes, or what somebody has kept there.
    others = tree_leaves([dict(vars(module)) for module in model.modules()])
    memo: dict[int, Any] = {
        id(tensor): tensor.detach().to("meta")
        for tensor in (*model.buffers(), *others)
        if isinstance(tensor, Tensor)
    }
    memo |= {
        id(parameter): nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        for parameter in model.parameters()
    }
    modules = list(model.modules())
    hooks = [hook for module in modules for held in _hooks(module) for hook in held.values()]
    known = {"expedite_d2", *(_package(type(module)) for module in modules)} - {"__main__"}
    foreign = {id(hook): hook for hook in hooks if _package(hook) not in known}
    copied = copy.deepcopy(model, memo | foreign)
    for module in copied.modules():
        for held in _hooks(module):
            for number in [number for number, hook in held.items() if id(hook) in foreign]:
                del held[number]
    return copied


def _hooks(module: nn.Module) -> tuple[dict[int, Any], ...]:
    return module._forward_pre_hooks, module._forward_hooks


def _package(owner: Any) -> str:
    """The top-level package that a class, a function or the class of an object comes from."""
    owner = getattr(owner, "func", owner)  # of a partial
    module = getattr(owner, "__module__", None) or type(owner).__module__
    return str(module).partition(".")[0]


class _Root(nn.Module):
    """Makes torch's counter name all modules from the model down, whatever is called."""

    def __init__(self, model: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.call = (call,)  # in a tuple, or a module would be registered twice

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.call[0](*inputs, **options)


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Selects the same operators on every device: fused ones have no formula, or pad their input.

    Compiled models run eagerly, since torch.compile refuses to run under a dispatch mode.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _Uncounted(TorchDispatchMode):
    """Records operators that multiply, but for which the counter has no formula.

    It is entered before the counter.
    """

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self.counter = counter
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        operator = func.overloadpacket
        if operator not in self.counter.flop_registry and _multiplies(str(operator)):
            self.names.add(str(operator))
        return func(*args, **(kwargs or {}))


# Words in the names of ATen's operators that are matrix products or consist of them.
_PRODUCTS = frozenset(
    "addbmm addmm addmv attention baddbmm bilinear bmm cdist cholesky conv convolution det dot eig "
    "eigh eigvals encoder euclidean fft inv inverse ldl linear lstsq lu matmul matrix mm mv pdist "
    "qr rnn slogdet solve svd trilinear vdot".split()
)


def _multiplies(operator: str) -> bool:
    """Whether an operator may multiply; nothing is known of those of other namespaces."""
    namespace, _, name = operator.partition(".")
    if namespace == "aten":
        return not _PRODUCTS.isdisjoint(name.split("_"))
    return namespace not in ("prim", "prims", "profiler")


# Formulas in the form of torch's counter: functions of shapes, two operations per multiply-add.


def _values(scale: int) -> Formula:
    """Makes the formula of an operator with so many multiply-adds per value of its output."""
    return lambda *_, out_shape, **__: 2 * scale * math.prod(out_shape)


def _layer_norm(x: Shape, normalised: Any, weight: Shape | None = None, *_, **__) -> int:
    return 2 * (4 if weight is None else 5) * math.prod(x)


def _group_norm(x: Shape, weight: Shape | None = None, *_, **__) -> int:
    return 2 * (4 if weight is None else 5) * math.prod(x)


def _batch_norm(
    x: Shape, weight: Shape | None, bias: Any, mean: Any, variance: Any, training: bool, *_, **__
) -> int:
    statistics = 3 if training else 0
    return 2 * (statistics + (1 if weight is None else 2)) * math.prod(x)


def _pooled(x: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x)


def _roi_align(
    x: Shape, rois: Shape, scale: float, height: int, width: int, ratio: int, *_, out_shape, **__
) -> int:
    """Each value of the output is the mean of samples, each interpolated from four values."""
    # 0 leaves the number to the size of each region; Detectron2's take two samples per side.
    samples = (ratio if ratio > 0 else 2) ** 2
    return 2 * 4 * samples * math.prod(out_shape)


def _times_vector(a: Shape, *_: Any, **__: Any) -> int:
    """Product of a matrix or a vector with a vector."""
    return 2 * math.prod(a)


def _addbmm(added: Shape, a: Shape, b: Shape, **_: Any) -> int:
    return 2 * math.prod(a) * b[2]


_FORMULAS: dict[str, Formula] = {
    # Products for which torch's counter has no formula.
    "aten.mv": _times_vector,
    "aten.dot": _times_vector,
    "aten.addmv": lambda added, a, b, **_: _times_vector(a),
    "aten.addbmm": _addbmm,
    # Detectron2's conventions.
    "aten.native_layer_norm": _layer_norm,
    "aten.native_group_norm": _group_norm,
    "aten.native_batch_norm": _batch_norm,
    "aten.cudnn_batch_norm": _batch_norm,
    "aten.miopen_batch_norm": _batch_norm,
    "aten._adaptive_avg_pool2d": _pooled,
    "aten.upsample_nearest2d": _values(1),
    "aten.upsample_bilinear2d": _values(4),
    "aten.grid_sampler_2d": _values(4),
    "aten.cudnn_grid_sampler": _values(4),
    "torchvision.roi_align": _roi_align,
    # These count nothing, though their names suggest products.
    "aten.linalg_vector_norm": _values(0),
    "torchvision.nms": _values(0),
}


def _conventions() -> dict[Any, Formula]:
    """Returns the formulas of all operators that exist: torchvision may not have been imported."""
    found: dict[Any, Formula] = {}
    for name, formula in _FORMULAS.items():
        namespace, _, operator = name.partition(".")
        packet = getattr(getattr(torch.ops, namespace), operator, None)
        if packet is not None:
            found[packet] = formula
            # An operator with a formula for its overload is counted before it can be decomposed.
            found |= {getattr(packet, overload): formula for overload in packet.overloads()}
    return found

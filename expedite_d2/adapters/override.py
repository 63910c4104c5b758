"""Changes to third-party modules: instance attributes that replace methods, and can be removed.

A `forward` on the instance is used rather than hooks: hooks and recorders of a block then see the
tokens that enter and leave it, whatever their order, and torch.compile notices when an attribute is
set or deleted, while it does not check hooks again.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from expedite_d2.reducers.state import attach, state_of

# Method by which torch.nn.DataParallel copies a module for one device.
REPLICATE = "_replicate_for_data_parallel"


class Override:
    """Replaces one method of one module; copied and pickled along with it.

    Attributes:
        owner: the module.
        name: name of the method.
        active: whether it still changes the method; `remove` ends that, also where a later wrapper
            keeps a reference to it.
        calls_base: whether the method calls super().
    """

    def __init__(self, owner: nn.Module, name: str) -> None:
        self.owner = owner
        self.name = name
        self.calls_base = _calls_super(getattr(type(owner), name, None))
        self.previous: Any = None
        self.active = False

    def install(self) -> None:
        """Replaces the method from now on."""
        previous = self.owner.__dict__.get(self.name)
        while isinstance(previous, Override) and not previous.active:  # left below a wrapper
            previous = previous.previous
        self.previous = previous
        self.active = True
        setattr(self.owner, self.name, self)
        if REPLICATE not in self.owner.__dict__:
            setattr(self.owner, REPLICATE, Replicate(self.owner))

    def remove(self) -> None:
        """Restores the module.

        A later wrapper around this override stays, and calls the original from now on.
        """
        self.active = False
        attributes = self.owner.__dict__
        if attributes.get(self.name) is self:
            if self.previous is None:
                delattr(self.owner, self.name)
            else:
                setattr(self.owner, self.name, self.previous)
        left = any(isinstance(value, Override) and value.active for value in attributes.values())
        if not left and isinstance(attributes.get(REPLICATE), Replicate):
            delattr(self.owner, REPLICATE)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.call if self.active else self.original)(*args, **kwargs)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Runs instead of the method."""
        return self.original(*args, **kwargs)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The method that is replaced."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return getattr(type(self.owner), self.name)(self.owner, *args, **kwargs)

    def original_with(self, changes: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Calls the class's own method with other values of some of the module's attributes.

        Args:
            changes: these values by name, for this call and the methods that it calls; the module
                itself does not change.
            args: positional arguments of the method.
            kwargs: keyword arguments of the method.

        Raises:
            ValueError: the method was replaced on the module before, by one that would be skipped,
                or calls that of its base class, which takes no module but its own.
        """
        self.refuse_replaced()
        if self.calls_base:
            raise ValueError(
                f"{self.name} of a {type(self.owner).__name__} calls super(), and cannot run on "
                "clusters: write it out, or use the library's own class"
            )
        view = _AttributeView(self.owner, changes)
        return getattr(type(self.owner), self.name)(view, *args, **kwargs)

    def refuse_replaced(self) -> None:
        """Raises ValueError if the method was replaced on the module before, by one of others."""
        if self.previous is not None:
            raise ValueError(
                f"{self.name} of a {type(self.owner).__name__} was replaced before the model was "
                "expedited and would be left out: expedite the model first"
            )

    def of(self, replica: nn.Module) -> Override:
        """Returns the same override for a copy of the owner, which has its own parameters."""
        other = copy.copy(self)
        other.owner = replica
        if isinstance(self.previous, Override):
            other.previous = self.previous.of(replica)
        return other

    @property
    def _torchscript_modifier(self) -> Any:
        # torch.jit.script reads it of every method before the source.
        raise ValueError(
            f"an expedited {type(self.owner).__name__} cannot be scripted or traced by torch.jit: "
            "use torch.export or torch.compile"
        )


class Propagate(Override):
    """Propagates the state that accompanies a module's input to its output."""

    def call(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        state = state_of(refuse_tracing(x))
        out = self.original(x, *args, **kwargs)
        if state is not None:
            attach(first_of(out), state)
        return out


class Gate(Override):
    """Checks the arguments of an encoder's call.

    It is a hook, with an attribute by which it is found. The encoder's forward is not replaced,
    since pipelines and exporters read its signature and code.
    """

    def __init__(self, owner: nn.Module) -> None:
        super().__init__(owner, "_expedite_d2_gate")

    def install(self) -> None:
        super().install()
        self.owner.register_forward_pre_hook(self, with_kwargs=True)

    def remove(self) -> None:
        super().remove()
        hooks = self.owner._forward_pre_hooks
        for number in [number for number, hook in hooks.items() if hook is self]:
            del hooks[number], self.owner._forward_pre_hooks_with_kwargs[number]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.look(args, kwargs)

    def look(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises if an expedited encoder does not support the arguments."""


def _calls_super(method: Any) -> bool:
    code = getattr(inspect.unwrap(method), "__code__", None) if method is not None else None
    return code is not None and "super" in code.co_names


def first_of(out: Any) -> Tensor:
    """Returns the tokens that a module returns, alone or followed by others."""
    return out if isinstance(out, Tensor) else out[0]


def with_first(out: Any, tokens: Tensor) -> Any:
    """Returns what a module returned, with other tokens."""
    return tokens if isinstance(out, Tensor) else type(out)((tokens, *out[1:]))


def refuse_tracing(x: Tensor) -> Tensor:
    """Returns the tensor itself, and raises if it is a proxy, by which torch.fx traces a model."""
    if isinstance(x, torch.fx.Proxy):
        raise ValueError(
            "an expedited encoder cannot be traced by torch.fx (symbolic_trace, "
            "create_feature_extractor), which loses what accompanies a tensor: use torch.export "
            "or torch.compile, or trace the model before it is expedited"
        )
    return x


class _AttributeView:
    """A module with other values of some attributes, which its methods see as well."""

    # transformers' layers look whether it is theirs, and checkpoint their activations only then.
    forward = None

    def __init__(self, module: nn.Module, changes: dict[str, Any]) -> None:
        self._module = module
        self._changes = changes

    def __getattr__(self, name: str) -> Any:
        if name in self._changes:
            return self._changes[name]
        of_class = getattr(type(self._module), name, None)
        if isinstance(of_class, property) and of_class.fget is not None:
            return of_class.fget(self)
        value = getattr(self._module, name)
        if isinstance(value, MethodType) and value.__self__ is self._module:
            return partial(value.__func__, self)  # which torch.compile knows how to trace
        return value


class Replicate:
    """Makes replicas of a module that have their own overrides.

    Attributes:
        owner: the module that is copied.
        replicas: the replicas that still exist.
    """

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.replicas: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def __call__(self) -> nn.Module:
        replica = getattr(type(self.owner), REPLICATE)(self.owner)
        for name, value in list(vars(replica).items()):
            if isinstance(value, Override):
                vars(replica)[name] = value.of(replica)
        del vars(replica)[REPLICATE]
        self.replicas.add(replica)
        return replica

    def __getstate__(self) -> dict[str, Any]:
        return {"owner": self.owner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.owner = state["owner"]
        self.replicas = weakref.WeakSet()

"""Instance attributes in the place of methods: how a foreign module is changed, and changed back.

A `forward` on the instance, rather than hooks: whoever hooks or records a block sees the tokens
that go in and come out, whatever the order of hooks, and torch.compile notices an attribute that
comes or goes, while it does not look at hooks again.
"""

from __future__ import annotations

import copy
import weakref
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from expedite_d2.reducers.state import attach, state_of

# How torch.nn.DataParallel makes the copy of a module that runs on one device.
REPLICATE = "_replicate_for_data_parallel"


class Override:
    """Takes the place of one method of one module; copied and pickled along with it.

    Attributes:
        owner: the module.
        name: of its method.
        active: whether it still does its work; `remove` ends that, also where something put over
            it later keeps it.
    """

    def __init__(self, owner: nn.Module, name: str) -> None:
        self.owner = owner
        self.name = name
        self.previous: Any = None
        self.active = False

    def install(self) -> None:
        """Stands in for the method from now on."""
        previous = self.owner.__dict__.get(self.name)
        while isinstance(previous, Override) and not previous.active:  # left below a wrapper
            previous = previous.previous
        self.previous = previous
        self.active = True
        setattr(self.owner, self.name, self)
        if REPLICATE not in self.owner.__dict__:
            setattr(self.owner, REPLICATE, Replicate(self.owner))

    def remove(self) -> None:
        """Leaves the module as it was.

        Where a later wrapper has taken this one's place it is left there, to call the original.
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
        """What is done in the method's place."""
        return self.original(*args, **kwargs)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The method that this one stands in for."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return getattr(type(self.owner), self.name)(self.owner, *args, **kwargs)

    def original_seeing(self, changes: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The class's own method, which sees other values of some of the module's attributes.

        Args:
            changes: these attributes, for this call alone, also in the methods that it calls; the
                module keeps its own.
            args: arguments of the method.
            kwargs: the same by name.

        Raises:
            ValueError: the method was replaced on the module before; it would not see the values.
        """
        if self.previous is not None:
            raise ValueError(
                f"{self.name} of a {type(self.owner).__name__} was replaced before the model was "
                "expedited and would be left out: expedite the model first"
            )
        return getattr(type(self.owner), self.name)(_View(self.owner, changes), *args, **kwargs)

    def of(self, replica: nn.Module) -> Override:
        """The same for a copy of the owner, with the copy's own parameters."""
        other = copy.copy(self)
        other.owner = replica
        if isinstance(self.previous, Override):
            other.previous = self.previous.of(replica)
        return other

    @property
    def _torchscript_modifier(self) -> Any:
        # torch.jit.script asks every method for it before it reads the source.
        raise ValueError(
            f"an expedited {type(self.owner).__name__} cannot be scripted: use torch.export or "
            "torch.compile, or script the model before it is expedited"
        )


class PassOn(Override):
    """Propagates the state that accompanies a module's input to its output."""

    def call(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        state = state_of(refuse_tracing(x))
        out = self.original(x, *args, **kwargs)
        return out if state is None else attach(out, state)


class Gate(Override):
    """Looks at what a whole encoder is called with, and may raise.

    A hook, and an attribute by which it is found: the encoder's forward itself stays what it is,
    for its signature and code are read by pipelines and exporters.
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
        """Raises where the arguments of a call are not for an expedited encoder."""


def refuse_tracing(x: Tensor) -> Tensor:
    """The tensor itself; raises where torch.fx runs a model with stand-ins for tensors."""
    if isinstance(x, torch.fx.Proxy):
        raise ValueError(
            "an expedited encoder cannot be traced by torch.fx (symbolic_trace, "
            "create_feature_extractor), which loses what accompanies a tensor: use torch.export "
            "or torch.compile, or trace the model before it is expedited"
        )
    return x


class _View:
    """A module with other values of some attributes, for itself and for its own methods."""

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
    """Makes replicas whose overrides are their own.

    Attributes:
        owner: the module that is copied.
        replicas: those that are still there.
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

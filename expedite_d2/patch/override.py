"""Instance attributes in the place of methods: how a foreign module is changed, and changed back.

A `forward` on the instance, rather than hooks: whoever hooks or records a block sees the tokens
that go in and come out, whatever the order of hooks, and torch.compile notices an attribute that
comes or goes, while it does not look at hooks again.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from expedite_d2.patch.travel import attach, travel_of


class Override:
    """Takes the place of one method of one module; copied and pickled along with it."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        self.owner = owner
        self.name = name
        self.previous = owner.__dict__.get(name)

    def install(self) -> None:
        """Stand in for the method from now on."""
        setattr(self.owner, self.name, self)

    def remove(self) -> None:
        """Leave the module as it was."""
        if self.previous is None:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.previous)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The method that this one stands in for."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return getattr(type(self.owner), self.name)(self.owner, *args, **kwargs)

    def original_seeing(self, changes: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The class's own method, which sees other values of some of the module's attributes.

        Args:
            changes: these attributes, for this call alone; the module keeps its own.
            args: arguments of the method.
            kwargs: the same by name.
        """
        return getattr(type(self.owner), self.name)(_View(self.owner, changes), *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs)


class _View:
    """A module with other values of some attributes."""

    def __init__(self, module: nn.Module, changes: dict[str, Any]) -> None:
        self._module = module
        self._changes = changes

    def __getattr__(self, name: str) -> Any:
        changes = self._changes
        return changes[name] if name in changes else getattr(self._module, name)


class PassOn(Override):
    """Lets what travels with the input of a module travel with its output."""

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        travel = travel_of(x)
        out = self.original(x, *args, **kwargs)
        return out if travel is None else attach(out, travel)


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
        """Raise where the arguments of a call are not for an expedited encoder."""

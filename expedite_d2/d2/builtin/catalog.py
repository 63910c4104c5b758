"""Catalogs of data sets: how to load each, and what is known about it."""

from __future__ import annotations

import types
from collections import UserDict
from collections.abc import Callable
from typing import Any


class _DatasetCatalog(UserDict):
    """Name of a data set -> function that returns its samples as a list of dicts."""

    def register(self, name: str, func: Callable[[], list[dict[str, Any]]]) -> None:
        """Register a function without arguments that returns the same samples at every call."""
        assert callable(func), f"data set '{name}' must be registered with a function, got {func}"
        assert name not in self, f"data set '{name}' is already registered"
        self[name] = func

    def get(self, name: str) -> list[dict[str, Any]]:  # type: ignore[override]
        """Load the samples of a data set."""
        if name not in self:
            known = ", ".join(self) or "none"
            raise KeyError(f"data set '{name}' is not registered; registered are: {known}")
        return self[name]()

    def list(self) -> list[str]:
        """Names of all registered data sets."""
        return [*self]

    def remove(self, name: str) -> None:
        """Forget a data set."""
        del self[name]


class Metadata(types.SimpleNamespace):
    """What is known about one data set, as attributes that keep their first value."""

    name: str = "N/A"

    def __getattr__(self, key: str) -> Any:
        known = ", ".join(self.__dict__)
        raise AttributeError(f"metadata of data set '{self.name}' has no '{key}', it has: {known}")

    def __setattr__(self, key: str, value: Any) -> None:
        # Two parts of a program that disagree about a data set must hear of it.
        if key in self.__dict__ and self.__dict__[key] != value:
            raise AssertionError(
                f"metadata '{key}' of data set '{self.name}' is already "
                f"{self.__dict__[key]!r} and cannot become {value!r}"
            )
        super().__setattr__(key, value)

    def as_dict(self) -> dict[str, Any]:
        """A copy of all attributes."""
        return dict(self.__dict__)

    def set(self, **kwargs: Any) -> Metadata:
        """Set several attributes at once."""
        for key, value in kwargs.items():
            setattr(self, key, value)
        return self

    def get(self, key: str, default: Any = None) -> Any:
        """An attribute, or ``default`` where it was never set."""
        return getattr(self, key, default)


class _MetadataCatalog(UserDict):
    """Name of a data set -> its metadata, made empty at the first request."""

    def get(self, name: str) -> Metadata:  # type: ignore[override]
        """The metadata of a data set, the same object at every call."""
        assert name, "the name of a data set must not be empty"
        if name not in self:
            self[name] = Metadata(name=name)
        return self[name]

    def list(self) -> list[str]:
        """Names of all data sets that have metadata."""
        return [*self]

    def remove(self, name: str) -> None:
        """Forget the metadata of a data set."""
        del self[name]


DatasetCatalog = _DatasetCatalog()
MetadataCatalog = _MetadataCatalog()

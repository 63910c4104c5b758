"""Data sets that live for one test."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from expedite_d2.d2 import DatasetCatalog, MetadataCatalog

_numbers = itertools.count()


@pytest.fixture
def new_dataset() -> Iterator[Callable[..., str]]:
    """Register a data set with these dicts and this metadata; returns its name."""
    names: list[str] = []

    def register(items: list[dict], **metadata: Any) -> str:
        name = f"evaluation_test_{next(_numbers)}"
        DatasetCatalog.register(name, lambda: items)
        MetadataCatalog.get(name).set(**metadata)
        names.append(name)
        return name

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)

"""What tests of several parts of the project share."""

from __future__ import annotations

import functools
import itertools
import logging
import multiprocessing
import multiprocessing.forkserver
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from expedite_d2.d2 import DatasetCatalog, MetadataCatalog

_numbers = itertools.count()


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    """Loggers as they were before, afterwards: handlers hold files of a temporary directory."""
    names = ("", "expedite_d2", "fvcore", "detectron2", "expedite_d2_test")
    before = {
        name: (logging.getLogger(name).handlers[:], logging.getLogger(name).propagate)
        for name in names
    }
    yield
    for name, (handlers, propagate) in before.items():
        logger = logging.getLogger(name)
        logger.handlers[:], logger.propagate = handlers, propagate


@pytest.fixture
def new_dataset() -> Iterator[Callable[..., str]]:
    """Register a data set with these dicts and this metadata, for one test; returns its name."""
    names: list[str] = []

    def register(items: list[dict], **metadata: Any) -> str:
        name = f"new_dataset_{next(_numbers)}"
        DatasetCatalog.register(name, lambda: items)
        MetadataCatalog.get(name).set(**metadata)
        names.append(name)
        return name

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture(scope="session")
def launch_two() -> Callable[..., None]:
    """``launch`` of two processes on the CPU, forked from one that has imported everything."""
    import torch
    import torch.multiprocessing as mp

    from expedite_d2.d2 import launch

    start = functools.partial(mp.start_processes, start_method="forkserver")
    multiprocessing.set_forkserver_preload(
        [
            "expedite_d2.d2.engine",
            "expedite_d2.d2.comparison.compare",
        ]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        multiprocessing.forkserver.ensure_running()

    def run(function: Callable[..., None], *args: object) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "device_count", lambda: 0)
            patch.setattr(mp, "start_processes", start)
            launch(function, 2, dist_url="auto", args=args)

    return run

"""What tests of several parts of the project share."""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.forkserver
from collections.abc import Callable

import pytest


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

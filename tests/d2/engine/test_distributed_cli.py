"""train_net.py in two processes, in every way to start them, trains and evaluates alike.

With the real Detectron2 installed, these are tests of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from engine_cases import CONFIG, SHIPPED, few_scenes, free_port, make_cfg, one_thread

from expedite_d2.d2 import PROVIDER
from expedite_d2.d2.engine import build_trained_model, do_test

pytestmark = [pytest.mark.slow]
if PROVIDER == "detectron2":
    pytestmark.append(pytest.mark.detectron2)

ROOT = Path(__file__).parents[3]
TRAIN_NET = str(ROOT / "train_net.py")


def num_gpus() -> list[list[str]]:
    return [[TRAIN_NET, "--num-gpus", "2", "--dist-url", "auto"]]


def torchrun() -> list[list[str]]:
    return [["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", TRAIN_NET]]


def num_machines() -> list[list[str]]:
    address = f"tcp://127.0.0.1:{free_port()}"
    options = ["--num-machines", "2", "--dist-url", address, "--machine-rank"]
    return [[TRAIN_NET, *options, str(rank)] for rank in range(2)]


STARTS = [num_gpus, torchrun, num_machines]


@pytest.fixture(scope="module", autouse=True)
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with few_scenes(tmp_path_factory.mktemp("cache")):
        yield


def run(commands: list[list[str]], *options: str) -> list[subprocess.CompletedProcess[str]]:
    """Run commands at the same time, on the CPU with a thread each."""
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", *command, *options],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    errors = [process.communicate()[1] for process in processes]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, stderr=error)
        for process, error in zip(processes, errors, strict=True)
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Output directories of a training with evaluation at its end, by the way it was started."""
    folders = {}
    for start in STARTS:
        folder = folders[start.__name__] = tmp_path_factory.mktemp(start.__name__)
        options = ["SOLVER.MAX_ITER", "2", "OUTPUT_DIR", str(folder)]
        for done in run(start(), "--config-file", CONFIG, *SHIPPED, *options):
            assert done.returncode == 0, done.stderr
    return folders


@pytest.mark.parametrize("start", STARTS)
def test_every_start_trains_the_same_model(
    runs: dict[str, Path], start: Callable[[], list[list[str]]]
) -> None:
    first, other = (
        torch.load(runs[name] / "model_final.pth", weights_only=True)
        for name in ("num_gpus", start.__name__)
    )
    assert other["iteration"] == 1
    assert all(torch.equal(value, other["model"][name]) for name, value in first["model"].items())


@pytest.mark.parametrize("start", STARTS)
def test_every_start_gives_the_metrics_of_one_process(
    runs: dict[str, Path], start: Callable[[], list[list[str]]], tmp_path: Path
) -> None:
    folder = runs[start.__name__]
    weights = str(folder / "model_final.pth")
    cfg = make_cfg(tmp_path, "MODEL.WEIGHTS", weights, tiny=SHIPPED)
    with one_thread():
        alone = do_test(cfg, build_trained_model(cfg))
    assert alone["scenes_val"]["panoptic_seg"]["PQ"] > 1
    assert json.loads((folder / "metrics.json").read_text()) == alone


@pytest.mark.parametrize("start", [num_gpus, torchrun])
def test_an_error_of_all_processes_is_one_sentence(
    start: Callable[[], list[list[str]]], tmp_path: Path
) -> None:
    options = ["MODEL.WEIGHTS", str(tmp_path / "no.pth"), "OUTPUT_DIR", str(tmp_path)]
    (done,) = run(start(), "--eval-only", "--config-file", CONFIG, *SHIPPED, *options)
    assert done.returncode != 0
    assert f"error: checkpoint {tmp_path / 'no.pth'} not found" in done.stderr
    # torchrun adds a report of its own.
    assert start is torchrun or "Traceback" not in done.stderr

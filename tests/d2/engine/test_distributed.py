"""Two processes: the metrics of one, trainings that survive a kill, and errors instead of waiting.

With the real Detectron2 installed, these are tests of it.
"""

from __future__ import annotations

import json
import multiprocessing
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import engine_cases
import pytest
import torch
import torch.multiprocessing as mp
from engine_cases import few_scenes, free_port, make_cfg, train

from expedite_d2.d2 import PROVIDER, launch
from expedite_d2.errors import sentence_of

if PROVIDER == "detectron2":
    pytestmark = pytest.mark.detectron2

LaunchTwo = Callable[..., None]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where a handful of scenes lie; in this process their names stand for them, too."""
    folder = tmp_path_factory.mktemp("cache")
    with few_scenes(folder):
        yield folder


# --- evaluation -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(
    cache: Path, launch_two: LaunchTwo, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Results of one process ("alone") and of each of two ("rank0", "rank1"), by data set."""
    folder = tmp_path_factory.mktemp("evaluated")
    for name in ("alone", "two"):
        (folder / name).mkdir()
    engine_cases.evaluate(cache, folder / "alone")
    launch_two(engine_cases.evaluate, cache, folder / "two")
    files = {"alone": "alone/rank0", "rank0": "two/rank0", "rank1": "two/rank1"}
    found = {k: json.loads((folder / f"{v}.json").read_text()) for k, v in files.items()}
    found["files"] = {
        name: json.loads((folder / "two" / name / "metrics.json").read_text())
        for name in found["alone"]
    }
    return found


@pytest.mark.parametrize("name", ["scenes_val", "scenes_first"])
def test_every_evaluator_gives_the_metrics_of_one_process(
    evaluated: dict[str, Any], name: str
) -> None:
    alone = evaluated["alone"][name]["oracle"]
    assert set(alone) == {"panoptic_seg", "sem_seg", "segm", "bbox", "depth"}
    for task, metric in {"panoptic_seg": "PQ", "sem_seg": "mIoU", "segm": "AP"}.items():
        assert 10 < alone[task][metric] < 99
    assert 0 < alone["depth"]["RMSE"] < 20
    assert evaluated["rank0"][name]["oracle"] == alone
    assert evaluated["rank1"][name]["oracle"] == {}


@pytest.mark.parametrize("name", ["scenes_val", "scenes_first"])
def test_a_model_gets_the_metrics_of_one_process(evaluated: dict[str, Any], name: str) -> None:
    alone = evaluated["alone"][name]["model"]
    assert set(alone) == {"panoptic_seg", "sem_seg", "segm"}
    assert alone["panoptic_seg"]["PQ"] > 1
    assert evaluated["rank0"][name]["model"] == alone
    assert evaluated["files"][name] == {name: alone}
    assert not evaluated["rank1"][name]["model"]


@pytest.mark.parametrize(("name", "count"), [("scenes_val", 3), ("scenes_first", 1)])
def test_a_comparison_is_that_of_one_process(
    evaluated: dict[str, Any], name: str, count: int
) -> None:
    alone, shared = (evaluated[who][name]["comparison"] for who in ("alone", "rank0"))
    assert shared["images"] == alone["images"] == count
    assert shared["device"].startswith("2 x ")
    assert shared["ratio"]["metrics"] == alone["ratio"]["metrics"]
    for side in ("baseline", "expedited"):
        for part in ("metrics", "gflops"):
            assert shared[side][part] == alone[side][part]
    assert evaluated["rank1"][name]["comparison"] == {}


# --- training ---------------------------------------------------------------------------------


def assert_same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert different == []


def records(folder: Path) -> dict[int, dict[str, Any]]:
    """Lines of the training log by iteration, without the times."""
    lines = map(json.loads, (folder / "training.jsonl").read_text().splitlines())
    return {
        line["iteration"]: {k: v for k, v in line.items() if not k.endswith("_time")}
        for line in lines
    }


@pytest.fixture(scope="module")
def trained(
    cache: Path, launch_two: LaunchTwo, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    """By run and rank: a training from begin to end, and one that was killed and resumed."""
    folder = tmp_path_factory.mktemp("trained")
    # Which comes first: that a process is gone, or that the other one misses it?
    ends = (ChildProcessError, torch.multiprocessing.ProcessRaisedException)
    with pytest.raises(ends, match="signal SIGKILL; the others have been stopped|by peer"):
        launch_two(engine_cases.train_whole_and_be_killed, cache, folder)
    assert (folder / "parts" / "last_checkpoint").read_text() == "model_0000001.pth"
    assert not list((folder / "parts").glob("*.pt"))
    launch_two(engine_cases.resume, cache, folder)
    assert records(folder / "parts") == records(folder / "whole")
    return {
        run: [torch.load(folder / run / f"rank{rank}.pt") for rank in range(2)]
        for run in ("whole", "parts")
    }


def test_a_killed_training_of_two_processes_ends_as_if_it_had_not_been(
    trained: dict[str, list[dict[str, Any]]],
) -> None:
    whole, parts = trained["whole"], trained["parts"]
    for rank in range(2):
        assert_same_weights(parts[rank]["state"], whole[0]["state"])
        assert parts[rank]["images"] == whole[rank]["images"][2:]


def test_two_processes_share_the_images_of_one(
    trained: dict[str, list[dict[str, Any]]], cache: Path, tmp_path: Path
) -> None:
    alone = train(make_cfg(tmp_path))["images"]
    shares = [rank["images"] for rank in trained["whole"]]
    assert [a + b for a, b in zip(*shares, strict=True)] == alone


def test_a_killed_training_of_one_process_ends_as_if_it_had_not_been(
    cache: Path, launch_two: LaunchTwo, tmp_path: Path
) -> None:
    process = multiprocessing.get_context("forkserver").Process(
        target=engine_cases.train_whole_and_be_killed, args=(cache, tmp_path)
    )
    process.start()
    process.join()
    assert process.exitcode == -9
    engine_cases.resume(cache, tmp_path)
    whole, parts = (torch.load(tmp_path / run / "rank0.pt") for run in ("whole", "parts"))
    assert_same_weights(parts["state"], whole["state"])
    assert parts["images"] == whole["images"][2:]
    assert records(tmp_path / "parts") == records(tmp_path / "whole")


def test_processes_that_would_go_on_from_different_checkpoints_are_refused(
    cache: Path, launch_two: LaunchTwo, tmp_path: Path
) -> None:
    train(make_cfg(tmp_path, "SOLVER.MAX_ITER", "1"))
    with pytest.raises(ValueError, match=r"iterations \[1, 0\]: OUTPUT_DIR must be .* share"):
        launch_two(engine_cases.resume_from_different_checkpoints, cache, tmp_path)


def test_an_error_that_nobody_foresaw_keeps_its_traceback(launch_two: LaunchTwo) -> None:
    with pytest.raises(torch.multiprocessing.ProcessRaisedException) as caught:
        launch_two({}.__getitem__, "p7")
    assert "Traceback" in str(caught.value) and "KeyError: 'p7'" in str(caught.value)
    assert sentence_of(caught.value) is None


def test_a_machine_whose_peer_died_does_not_wait_for_it(
    cache: Path, launch_two: LaunchTwo, tmp_path: Path
) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    machines = [
        multiprocessing.get_context("forkserver").Process(
            target=engine_cases.train_on_a_machine, args=(rank, address, cache, tmp_path)
        )
        for rank in range(2)
    ]
    for machine in machines:
        machine.start()
    for machine in machines:
        machine.join()
    assert [machine.exitcode for machine in machines] == [1, 1]
    errors = [(tmp_path / f"machine{rank}.txt").read_text() for rank in range(2)]
    assert "by peer" in errors[0]  # whose connection was closed, or reset
    assert errors[1].startswith("ChildProcessError: process 0 terminated with signal SIGKILL")
    assert (tmp_path / "parts" / "last_checkpoint").read_text() == "model_0000001.pth"


@pytest.mark.slow
def test_every_kind_of_model_trains_in_two_processes(
    cache: Path, launch_two: LaunchTwo, tmp_path: Path
) -> None:
    launch_two(engine_cases.train_families, cache, tmp_path)
    for name in engine_cases.families():
        first, second = (torch.load(tmp_path / name / f"rank{rank}.pt") for rank in range(2))
        assert_same_weights(first["state"], second["state"])
        assert first["images"] != second["images"]


# --- starting ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_machines": 0}, "--num-machines must be at least 1, got 0"),
        ({"num_machines": 2, "machine_rank": 2}, "less than --num-machines 2 .*, got 2"),
        ({"machine_rank": -1}, "--machine-rank must be .*, got -1"),
        ({"num_machines": 2}, "--dist-url must be tcp://HOST:PORT of the first .*, got None"),
        ({"num_machines": 2, "dist_url": "auto"}, "--dist-url must be .*, got auto"),
    ],
)
def test_launch_refuses_machines_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch(print, 1, **options)


def test_launch_keeps_its_port_until_the_workers_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    class Started(Exception):
        pass

    def start(function: Callable[..., None], args: tuple[Any, ...], **_: Any) -> None:
        (url,) = (value for value in args if isinstance(value, str))
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", urlparse(url).port))
        raise Started

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(mp, "start_processes", start)
    with pytest.raises(Started):
        launch(print, 2, dist_url="auto")


@pytest.mark.skipif(PROVIDER == "detectron2", reason="Detectron2's comm keeps its groups")
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's list of threads")
def test_no_thread_of_a_group_outlives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_gloo() -> int:
        names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
        return sum("gloo" in name for name in names)

    torchrun = {
        "TORCHELASTIC_RUN_ID": "none",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
    }
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    during: list[int] = []
    launch(lambda: during.append(of_gloo()), 1)
    assert during[0] > 0
    assert of_gloo() == 0


def test_launch_leaves_the_number_of_processes_to_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(ValueError, match="torchrun starts the processes: give it --nproc-per-node"):
        launch(print, 2)

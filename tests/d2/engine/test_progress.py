"""A bar on a terminal, a log line at least every 30 seconds elsewhere."""

from __future__ import annotations

import io
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from settings_cases import clustered
from torch import nn

from expedite_d2.d2 import progress as progress_module
from expedite_d2.d2.comparison import compare
from expedite_d2.d2.data.scenes import writer
from expedite_d2.d2.engine import calibrate, defaults, predict
from expedite_d2.d2.engine import train as training
from expedite_d2.d2.evaluation import evaluator
from expedite_d2.d2.progress import PERIOD, Heartbeat, progress


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """What has been logged since the last call."""
    logger = logging.getLogger("expedite_d2")
    propagate, logger.propagate = logger.propagate, True
    caplog.set_level(logging.INFO, "expedite_d2")

    def take() -> list[str]:
        messages = caplog.messages
        caplog.clear()
        return messages

    yield take
    logger.propagate = propagate


def test_line_is_due_every_thirty_seconds(lines: Callable[[], list[str]]) -> None:
    clock = Clock()
    heartbeat = Heartbeat("comparing", 200, clock=clock)
    heartbeat.beat()
    assert lines() == [] and heartbeat.due() == PERIOD == 30.0
    clock.now += 29.0
    heartbeat.beat()
    assert lines() == [] and heartbeat.due() == 1.0
    clock.now += 1.0  # within the first image still
    heartbeat.beat()
    assert lines() == ["comparing: 0 of 200, 0:00:30 so far"]
    for _ in range(50):
        clock.now += 6.0
        heartbeat.done += 1
        heartbeat.beat()
    told = lines()
    assert told[0] == "comparing: 5 of 200, 0:01:00 so far, about 0:39:00 left"
    assert len(told) == 10 and told[-1].startswith("comparing: 50 of 200, 0:05:30 so far")


def test_line_counts_on_from_an_earlier_run(lines: Callable[[], list[str]]) -> None:
    clock = Clock()
    heartbeat = Heartbeat("training", 100, done=60, clock=clock)
    heartbeat.done, clock.now = 62, clock.now + 40.0
    heartbeat.beat()
    assert lines() == ["training: 62 of 100, 0:00:40 so far, about 0:12:40 left"]


def test_line_without_a_total_tells_no_time_left() -> None:
    clock = Clock()
    heartbeat = Heartbeat("reading", None, clock=clock)
    heartbeat.done, clock.now = 3, clock.now + 3700.0
    assert heartbeat.line() == "reading: 3, 1:01:40 so far"


def test_line_of_others_puts_the_next_off(lines: Callable[[], list[str]]) -> None:
    clock = Clock()
    heartbeat = Heartbeat("training", 100, clock=clock)
    clock.now += 29.0
    heartbeat.told()
    clock.now += 29.0
    heartbeat.beat()
    assert lines() == [] and heartbeat.due() == 1.0


def test_thread_logs_within_one_step_and_ends_with_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No waiting: the step lasts until a line of it has been logged."""
    monkeypatch.setattr(progress_module, "PERIOD", 0.001)
    logged = threading.Event()
    monkeypatch.setattr(progress_module.logger, "info", lambda *args: logged.set())
    with pytest.raises(RuntimeError, match="of the loop's own"):
        with progress([1, 2], "evaluating", unit="image") as items:
            for _ in items:
                assert logged.wait(10)
                raise RuntimeError("of the loop's own")
    assert "heartbeat" not in {thread.name for thread in threading.enumerate()}


def test_loader_forks_before_the_thread_runs() -> None:
    def loader() -> Iterator[int]:
        assert "heartbeat" not in {thread.name for thread in threading.enumerate()}
        yield 1

    with progress(loader(), "evaluating", unit="image", total=1) as items:
        for _ in items:
            assert "heartbeat" in {thread.name for thread in threading.enumerate()}


def test_terminal_has_a_bar(
    monkeypatch: pytest.MonkeyPatch, lines: Callable[[], list[str]]
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress(range(3), "comparing", unit="image") as items:
        assert list(items) == [0, 1, 2]
    assert "comparing: 100%" in terminal.getvalue() and "3/3" in terminal.getvalue()
    assert lines() == []


def test_only_the_process_that_shows_says_anything(
    monkeypatch: pytest.MonkeyPatch, lines: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr(Heartbeat, "start", lambda self: self.beat())
    monkeypatch.setattr(progress_module, "PERIOD", 0.0)
    with progress(range(3), "comparing", unit="image", shown=False) as items:
        assert list(items) == [0, 1, 2]
    assert lines() == []


# ---- every long loop is one of them ----------------------------------------------------------


class Model(nn.Module):
    def forward(self, batch: list[Any]) -> list[dict]:
        return [{} for _ in batch]


def evaluate(folder: Path, patch: pytest.MonkeyPatch) -> None:
    evaluator.inference_on_dataset(Model(), [[{}], [{}]], [])


def compare_images(folder: Path, patch: pytest.MonkeyPatch) -> None:
    run = SimpleNamespace(model=Model(), prepare=lambda *args: None, measure=lambda *args: None)
    compare._alternate([run], [[{"image": torch.zeros(3, 4, 4)}]] * 2)  # type: ignore[list-item]


def predict_images(folder: Path, patch: pytest.MonkeyPatch) -> None:
    paths = [folder / f"{number}.png" for number in range(2)]
    for path in paths:
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)
    patch.setattr(predict, "prediction_of", lambda output: output)
    patch.setattr(predict, "draw_predictions", lambda image, *args: [image])
    targets = [folder / f"{number}_drawn.png" for number in range(2)]
    assert predict._draw_all(lambda image: {}, None, paths, targets) == 2


def calibrate_images(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(defaults, "build_test_loader", lambda *args: [1, 2])
    patch.setattr(calibrate, "build_trained_model", lambda cfg: None)
    patch.setattr(
        calibrate,
        "calibrate",
        lambda model, images, correction: clustered(0, (2, 2), topk=len(list(images))),
    )
    cfg: Any = SimpleNamespace(
        MODEL=SimpleNamespace(EXPEDITE=SimpleNamespace(ENABLED=True)),
        DATASETS=SimpleNamespace(TRAIN=["any"], TEST=[]),
    )
    assert calibrate.measure(cfg) == (clustered(0, (2, 2), topk=2), 2, "any")


def make_scenes(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(writer.SPLITS, "val", writer.Split(seed=1, count=2))
    writer._write_split("val", folder / "val")


def train(folder: Path, patch: pytest.MonkeyPatch) -> None:
    log = training._TrainingLog(2, 0, folder / "training.jsonl")
    with log.heartbeat:
        for iteration in range(2):
            log.data_ready()
            log.step(iteration, {}, 0.1)


LOOPS = {
    evaluate: "evaluating: 0 of 2",
    compare_images: "comparing: 0 of 2",
    predict_images: "predicting: 0 of 2",
    calibrate_images: "calibrating: 0 of 2",
    make_scenes: "making scenes_val: 0 of 2",
    train: "training: 0 of 2",
}


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_every_long_loop_tells_how_far_it_is(
    loop: Callable[[Path, pytest.MonkeyPatch], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lines: Callable[[], list[str]],
) -> None:
    # A line for each item, and none of a thread.
    monkeypatch.setattr(progress_module, "PERIOD", 0.0)
    monkeypatch.setattr(Heartbeat, "start", Heartbeat.beat)
    loop(tmp_path, monkeypatch)
    told = [line for line in lines() if LOOPS[loop].partition(":")[0] in line]
    assert told[0].startswith(LOOPS[loop]) and ": 1 of 2, " in told[1]

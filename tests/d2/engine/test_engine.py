"""Training, its checkpoints and what becomes of damaged ones; errors of the command line.

With the real Detectron2 installed, these are tests of it.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_cases import CONFIG, few_scenes, make_cfg, train

import train_net
from expedite_d2.d2 import PROVIDER, build_model
from expedite_d2.d2.checkpoint import load_weights
from expedite_d2.d2.checkpoint.convert import convert
from expedite_d2.d2.engine import build_trained_model, do_test, do_train
from expedite_d2.files import replacing

if PROVIDER == "detectron2":
    pytestmark = pytest.mark.detectron2


@pytest.fixture(scope="module", autouse=True)
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with few_scenes(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Text of the warnings so far."""
    # Set-up of a run keeps the package's messages from the root logger, where caplog listens.
    monkeypatch.setattr(logging.getLogger("expedite_d2"), "propagate", True)
    return lambda: caplog.text


def interrupt(iteration: int) -> None:
    """The schedule spans MAX_ITER, so an interrupted run is one that fails before its end."""
    if iteration == 3:
        raise KeyboardInterrupt


def train_in_part(folder: Path, *opts: str) -> None:
    """Leaves the checkpoints after the second and the third of four iterations."""
    with pytest.raises(KeyboardInterrupt):
        train(make_cfg(folder, "SOLVER.CHECKPOINT_PERIOD", "1", *opts), before=interrupt)
    names = sorted(path.name for path in folder.glob("*.pth"))
    assert names == ["model_0000001.pth", "model_0000002.pth"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture(scope="module")
def whole(scenes: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights of a training that nothing interrupted."""
    return train(make_cfg(tmp_path_factory.mktemp("whole")))["state"]


def assert_same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=0, msg=name)


def test_resumed_training_is_the_run_it_would_have_been(
    whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    train_in_part(tmp_path)
    # As a kill in the middle of saving leaves it.
    (tmp_path / "x").mkdir()
    with replacing(tmp_path / "x" / "model_0000003.pth") as partial:
        partial.write_bytes(b"half")
        shutil.copytree(partial.parent, tmp_path / partial.parent.name)
    shutil.rmtree(tmp_path / "x")
    resumed = train(make_cfg(tmp_path), resume=True)
    assert len(resumed["images"]) == 1
    assert not list(tmp_path.glob(".*"))
    assert_same_weights(resumed["state"], whole)
    records = (tmp_path / "training.jsonl").read_text().splitlines()
    assert json.loads(records[-1])["iteration"] == 4


def test_resumed_training_without_a_seed_keeps_the_one_it_drew(tmp_path: Path) -> None:
    np.random.seed(1)
    whole = train(make_cfg(tmp_path / "whole", "SEED", "-1"))
    np.random.seed(1)
    train_in_part(tmp_path / "parts", "SEED", "-1")
    resumed = train(make_cfg(tmp_path / "parts", "SEED", "-1"), resume=True)
    assert resumed["images"] == whole["images"][3:]
    assert_same_weights(resumed["state"], whole["state"])


def damage_the_last(folder: Path) -> str:
    truncate(folder / "model_0000002.pth")
    return "model_0000002.pth cannot be read: it is truncated"


def remove_the_last(folder: Path) -> str:
    (folder / "model_0000002.pth").unlink()
    return "model_0000002.pth does not exist"


def empty_the_tag(folder: Path) -> str:
    (folder / "model_0000002.pth").unlink()
    (folder / "last_checkpoint").write_text("")
    return "does not exist"


@pytest.mark.parametrize("damage", [damage_the_last, remove_the_last, empty_the_tag])
def test_resumed_training_takes_the_checkpoint_before_a_damaged_one(
    damage: Callable[[Path], str],
    whole: dict[str, torch.Tensor],
    tmp_path: Path,
    logged: Callable[[], str],
) -> None:
    train_in_part(tmp_path)
    reason = damage(tmp_path)
    resumed = train(make_cfg(tmp_path), resume=True)
    assert len(resumed["images"]) == 2
    assert_same_weights(resumed["state"], whole)
    assert f"{reason}; trying the one before" in logged()
    assert "resuming from " + str(tmp_path / "model_0000001.pth") in logged()


def test_resumed_training_finds_a_checkpoint_that_was_not_yet_tagged(tmp_path: Path) -> None:
    train_in_part(tmp_path)
    (tmp_path / "last_checkpoint").unlink()
    assert len(train(make_cfg(tmp_path), resume=True)["images"]) == 1


@pytest.mark.parametrize("left", ["truncated", "none"])
def test_resumed_training_without_a_checkpoint_left_is_refused(left: str, tmp_path: Path) -> None:
    train(make_cfg(tmp_path, "SOLVER.MAX_ITER", "1"))
    for path in tmp_path.glob("*.pth"):
        truncate(path) if left == "truncated" else path.unlink()
    reason = "cannot be read: it is truncated" if left == "truncated" else "does not exist"
    message = f"no checkpoint in .* can be read to resume from: .*model_final.pth {reason}"
    with pytest.raises(ValueError, match=message):
        train(make_cfg(tmp_path), resume=True)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (None, "it is truncated"),
        (b"not found", "neither torch.save nor pickle wrote it, it begins with b'not found'"),
        (b"<html>not found", "it is a web page"),
    ],
)
def test_weights_that_are_no_checkpoint_say_why(
    content: bytes | None, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"weight": torch.zeros(9999)}, path)
    truncate(path) if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=f"weights.pth is not a readable checkpoint: {reason}"):
        load_weights(torch.nn.Linear(1, 1), path)


def test_training_begins_from_a_model_of_other_classes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = build_model(make_cfg(tmp_path, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3"))
    torch.save({"model": other.state_dict()}, tmp_path / "other.pth")
    cfg = make_cfg(tmp_path / "run", "MODEL.WEIGHTS", str(tmp_path / "other.pth"),
                   "SOLVER.MAX_ITER", "1", "SOLVER.BASE_LR", "0.0")  # fmt: skip
    state = train(cfg)["state"]
    assert "in other shapes, " in caplog.text and "class_predictor.weight" in caplog.text
    name = "transformer_module.queries_features.weight"
    assert torch.equal(state[name], other.state_dict()[name])
    with pytest.raises(ValueError, match="set MODEL.SEM_SEG_HEAD.NUM_CLASSES to 3"):
        build_trained_model(cfg)


def test_resume_without_any_checkpoint_begins(tmp_path: Path) -> None:
    assert len(train(make_cfg(tmp_path, "SOLVER.MAX_ITER", "1"), resume=True)["images"]) == 1


def test_evaluation_of_an_exported_checkpoint(tmp_path: Path) -> None:
    trained = train(make_cfg(tmp_path / "run", "SOLVER.MAX_ITER", "2"))["state"]
    small = tmp_path / "small.pth"
    convert(tmp_path / "run" / "model_final.pth", small)
    state = torch.load(small, weights_only=True)["model"]
    assert not any(name.startswith("sem_aux") for name in state)
    assert all(v.dtype == torch.float16 for v in state.values() if v.is_floating_point())
    constants = {name for name in state if name.endswith("relative_position_index")}
    for name in state.keys() - constants:
        torch.testing.assert_close(state[name], trained[name].to(state[name].dtype))

    cfg = make_cfg(tmp_path / "run", "MODEL.WEIGHTS", str(small))
    results = do_test(cfg, build_model(cfg))
    assert set(results["scenes_val"]) == {"panoptic_seg", "sem_seg", "segm"}
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert written.keys() == results.keys()
    assert not list((tmp_path / "run").glob(".*"))


def test_a_loss_that_is_not_finite_stops_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = make_cfg(tmp_path / "run")
    model = build_model(cfg)
    before = model.class_predictor.bias.detach().clone()
    forward = model.forward

    def spoilt(batch: list) -> dict[str, torch.Tensor]:
        return forward(batch) | {"loss_spoilt": torch.tensor(float("nan"))}

    monkeypatch.setattr(model, "forward", spoilt)
    with pytest.raises(FloatingPointError, match="not finite at iteration 0.*loss_spoilt"):
        do_train(cfg, model)
    assert torch.equal(model.class_predictor.bias, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config-file", "nowhere.yaml"], "error: config file nowhere.yaml not found"),
        (["MODEL.EXPEDITE.ALFA", "1"], "ALFA"),
        (["MODEL.WEIGHTS", "no.pth"], "error: checkpoint no.pth not found"),
        (["MODEL.EXPEDITE.ALPHA", "99"], "alpha must be less than"),
        (["MODEL.EXPEDITE.CLUSTERS", "[12, 12]"], "clusters must be smaller"),
        (["MODEL.EXPEDITE.NEIGHBOURHOOD", "4"], "neighbourhood must be odd"),
        (["DATASETS.TEST", "('moon',)"], "'moon' is not registered"),
    ],
)
def test_command_line_errors_are_one_sentence(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "--config-file" not in arguments:
        arguments = ["--config-file", CONFIG, *arguments]
    if "MODEL.WEIGHTS" not in arguments:
        arguments = [*arguments, "MODEL.WEIGHTS", ""]
    command = ["train_net.py", "--eval-only", *arguments, "OUTPUT_DIR", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as caught:
        train_net.invoke_main()
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        (["--compare"], "--eval-only"),
        (["--compare-with", CONFIG], "--eval-only"),
        (["--num-machines", "2"], "--dist-url tcp://HOST:PORT"),
    ],
)
def test_command_line_names_the_option_that_is_needed(
    arguments: list[str],
    needed: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_net.py", *arguments, "--config-file", CONFIG])
    with pytest.raises(SystemExit) as caught:
        train_net.invoke_main()
    assert caught.value.code == 2
    assert needed in capsys.readouterr().err

"""What both providers share: launching, set-up, logging and safe checkpoints.

Runs with whichever provider the environment chooses.
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

import pytest
import torch

from expedite_d2 import d2
from expedite_d2.d2 import provider
from expedite_d2.d2.config import load_config
from expedite_d2.errors import sentence_of


def _exchange(folder: Path, fail: bool) -> None:
    """What each process of the launch test does."""
    if fail:
        load_config("scenes/panoptic/mask2former_swin_mini.yaml", ["MODEL.NO_SUCH_KEY", "1"])
    total = torch.tensor([float(d2.comm.get_rank() + 1)])
    torch.distributed.all_reduce(total)
    gathered = d2.comm.all_gather({"rank": d2.comm.get_rank()})
    reduced = d2.comm.reduce_dict({"loss": torch.tensor(float(d2.comm.get_rank()))})
    result = {
        "total": total.item(),
        "gathered": gathered,
        "local": d2.comm.get_local_rank(),
        "loss": reduced["loss"].item() if d2.comm.is_main_process() else None,
        "indices": list(d2.InferenceSampler(5)),
    }
    torch.save(result, folder / f"{d2.comm.get_rank()}.pt")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="one GPU: nccl needs one per process")
def test_launch_runs_two_processes(tmp_path):
    d2.launch(_exchange, 2, dist_url="auto", args=(tmp_path, False))
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert [result["total"] for result in results] == [3.0, 3.0]
    assert [result["local"] for result in results] == [0, 1]
    assert results[0]["gathered"] == [{"rank": 0}, {"rank": 1}]
    assert results[0]["loss"] == 0.5
    assert results[0]["indices"] + results[1]["indices"] == [0, 1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="one GPU: nccl needs one per process")
def test_launch_hands_a_users_error_back(tmp_path):
    with pytest.raises(KeyError, match="MODEL.NO_SUCH_KEY") as caught:
        d2.launch(_exchange, 2, dist_url="auto", args=(tmp_path, True))
    sentence = sentence_of(caught.value)
    assert sentence is not None and sentence.startswith("config override: ")


def test_launch_with_one_process_stays_here():
    called = []
    d2.launch(called.append, 1, args=(os.getpid(),))
    assert called == [os.getpid()]


def test_launch_refuses_no_process():
    with pytest.raises(ValueError, match="--num-gpus must be .*, got 0"):
        d2.launch(print, 0)


def test_default_setup_writes_log_and_config(tmp_path, loggers, capsys):
    cfg = d2.get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path / "run")
    cfg.SEED = 5
    d2.default_setup(cfg, argparse.Namespace(config_file="", eval_only=True))
    logging.getLogger("expedite_d2.somewhere").info("a message of ours")
    assert "a message of ours" in (tmp_path / "run" / "log.txt").read_text()
    assert capsys.readouterr().out.count("a message of ours") == 1
    again = d2.get_cfg()
    again.merge_from_file(str(tmp_path / "run" / "config.yaml"))
    assert (again.OUTPUT_DIR, again.SEED) == (cfg.OUTPUT_DIR, 5)
    first = torch.rand(3)
    d2.seed_all_rng(5)
    assert torch.equal(first, torch.rand(3))


def test_default_setup_names_an_output_dir_that_cannot_be(tmp_path):
    cfg = d2.get_cfg()
    (tmp_path / "file").write_text("")
    cfg.OUTPUT_DIR = str(tmp_path / "file" / "run")
    with pytest.raises(OSError, match="OUTPUT_DIR .*/file/run cannot be created"):
        d2.default_setup(cfg, argparse.Namespace())


def test_setup_logger_twice_writes_each_line_once(tmp_path, loggers, capsys):
    d2.setup_logger(name="expedite_d2_test")
    logger = d2.setup_logger(str(tmp_path), name="expedite_d2_test")
    d2.setup_logger(str(tmp_path), name="expedite_d2_test")
    logger.warning("once")
    assert capsys.readouterr().out.count("once") == 1
    assert (tmp_path / "log.txt").read_text().count("once") == 1


def _checkpointer(folder: Path, value: float = 0.0):
    model = torch.nn.Linear(2, 1)
    torch.nn.init.constant_(model.weight, value)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return d2.DetectionCheckpointer(model, str(folder), optimizer=optimizer)


def _two_checkpoints(folder: Path) -> None:
    for iteration in range(2):
        _checkpointer(folder, iteration + 1.0).save(f"model_{iteration:07d}", iteration=iteration)
        # The second must be the newer one also where the clock of the file system is coarse.
        os.utime(folder / f"model_{iteration:07d}.pth", (iteration, iteration))


def test_checkpoint_resumes_from_the_last(tmp_path):
    _two_checkpoints(tmp_path)
    fresh = _checkpointer(tmp_path)
    assert fresh.resume_or_load("", resume=True)["iteration"] == 1
    assert fresh.model.weight.unique().tolist() == [2.0]
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "last_checkpoint",
        "model_0000000.pth",
        "model_0000001.pth",
    ]


def test_checkpoint_truncated_is_passed_over(tmp_path, caplog):
    _two_checkpoints(tmp_path)
    last = tmp_path / "model_0000001.pth"
    last.write_bytes(last.read_bytes()[:-100])
    fresh = _checkpointer(tmp_path)
    with caplog.at_level(logging.WARNING, "expedite_d2"):
        logging.getLogger("expedite_d2").propagate = True
        assert fresh.resume_or_load("", resume=True)["iteration"] == 0
    assert "model_0000001.pth cannot be read: it is truncated" in caplog.text
    assert fresh.model.weight.unique().tolist() == [1.0]


def test_checkpoint_nothing_readable_is_an_error(tmp_path):
    _two_checkpoints(tmp_path)
    for file in tmp_path.glob("*.pth"):
        file.write_bytes(b"not a checkpoint")
    with pytest.raises(d2.CorruptCheckpointError, match="no checkpoint in .* can be read"):
        _checkpointer(tmp_path).resume_or_load("", resume=True)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half", b"text", b"\x80\x04]."])
def test_checkpoint_that_is_none_is_refused_and_the_next_loads(tmp_path, content):
    bad = tmp_path / "bad.pth"
    bad.write_bytes(content)
    checkpointer = _checkpointer(tmp_path)
    with pytest.raises(d2.CorruptCheckpointError, match="bad.pth"):
        checkpointer.load(str(bad))
    _two_checkpoints(tmp_path)
    checkpointer.load(str(tmp_path / "model_0000000.pth"))


def test_checkpoint_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.pth does not exist"):
        _checkpointer(tmp_path).load(str(tmp_path / "absent.pth"))


def test_checkpoint_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    _two_checkpoints(tmp_path)
    before = (tmp_path / "model_0000001.pth").read_bytes()
    files = set(tmp_path.iterdir())

    def interrupted(state, path):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _checkpointer(tmp_path).save("model_0000001")
    assert (tmp_path / "model_0000001.pth").read_bytes() == before
    assert set(tmp_path.iterdir()) == files


def test_periodic_checkpointer_keeps_so_many_and_the_final(tmp_path):
    periodic = d2.PeriodicCheckpointer(_checkpointer(tmp_path), 2, max_iter=8, max_to_keep=2)
    for iteration in range(8):
        periodic.step(iteration)
    names = sorted(file.name for file in tmp_path.glob("*.pth"))
    assert names == ["model_0000005.pth", "model_0000007.pth", "model_final.pth"]
    assert _checkpointer(tmp_path).resume_or_load("")["iteration"] == 7


def test_provider_is_chosen_by_the_environment(monkeypatch):
    monkeypatch.setenv("EXPEDITE_D2_PROVIDER", "builtin")
    assert provider._choose() == "builtin"
    monkeypatch.setenv("EXPEDITE_D2_PROVIDER", "detectron3")
    with pytest.raises(ValueError, match="EXPEDITE_D2_PROVIDER must be .*, got 'detectron3'"):
        provider._choose()


def test_provider_that_cannot_be_imported_is_passed_over_aloud(monkeypatch):
    def broken(name):
        raise ImportError(f"no compiled part of {name}")

    monkeypatch.delenv("EXPEDITE_D2_PROVIDER", raising=False)
    monkeypatch.setattr(provider.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(provider.importlib, "import_module", broken)
    with pytest.warns(RuntimeWarning, match="no compiled part of detectron2"):
        assert provider._choose() == "builtin"
    monkeypatch.setenv("EXPEDITE_D2_PROVIDER", "detectron2")
    with pytest.raises(ImportError, match="no compiled part"):
        provider._choose()

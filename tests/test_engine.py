from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import expedite_d2.models  # noqa: F401 - registers the model that the config names
import train_net
from expedite_d2.checkpoint.export import export
from expedite_d2.config import load_config
from expedite_d2.d2 import CfgNode, DatasetCatalog, MetadataCatalog, build_model
from expedite_d2.data.scenes import dataset, writer
from expedite_d2.engine import do_test, do_train

CONFIG = "scenes/panoptic/mask2former_swin_mini_expedited.yaml"
TINY = [
    "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "",
    "MODEL.SWIN.EMBED_DIM", "16", "MODEL.SWIN.DEPTHS", "[1, 1, 2, 1]",
    "MODEL.SWIN.NUM_HEADS", "[1, 1, 2, 2]", "MODEL.SWIN.WINDOW_SIZE", "4",
    "MODEL.EXPEDITE.ALPHA", "2", "MODEL.EXPEDITE.CLUSTERS", "[3, 3]",
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", "5", "MODEL.MASK_FORMER.DEC_LAYERS", "2",
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS", "32", "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", "1",
    "INPUT.IMAGE_SIZE", "64", "INPUT.MIN_SIZE_TEST", "64", "DATALOADER.NUM_WORKERS", "0",
    "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "4", "SOLVER.WARMUP_ITERS", "1",
    "SOLVER.CHECKPOINT_PERIOD", "2",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def few_scenes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The scenes' names stand for four training and two validation images meanwhile."""
    names = ("scenes_train", "scenes_val")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPEDITE_D2_CACHE", str(tmp_path_factory.mktemp("cache")))
        for split, count in (("train", 4), ("val", 2)):
            patch.setitem(writer.SPLITS, split, writer.Split(writer.SPLITS[split].seed, count))
        _forget(names)
        dataset.register_scenes()
        yield
    _forget(names)
    dataset.register_scenes()


def _forget(names: tuple[str, ...]) -> None:
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def make_cfg(output: Path, *opts: str) -> CfgNode:
    output.mkdir(exist_ok=True)
    return load_config(CONFIG, [*TINY, "OUTPUT_DIR", str(output), *opts])


def train(cfg: CfgNode, resume: bool = False) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = build_model(cfg)
    do_train(cfg, model, resume=resume)
    return model.state_dict()


def test_resumed_training_is_the_run_it_would_have_been(tmp_path: Path) -> None:
    whole = train(make_cfg(tmp_path / "whole"))
    # The schedule spans MAX_ITER, so the interrupted run is one that fails after its checkpoint.
    cfg = make_cfg(tmp_path / "parts")
    calls = 0

    def interrupt(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    torch.manual_seed(0)
    model = build_model(cfg)
    model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        do_train(cfg, model)
    resumed = train(cfg, resume=True)
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, msg=name)
    records = (tmp_path / "parts" / "training.jsonl").read_text().splitlines()
    assert json.loads(records[-1])["iteration"] == 4


def test_evaluation_of_an_exported_checkpoint(tmp_path: Path) -> None:
    cfg = make_cfg(tmp_path / "run", "SOLVER.MAX_ITER", "2")
    trained = train(cfg)
    small = tmp_path / "small.pth"
    export(tmp_path / "run" / "model_final.pth", small)
    state = torch.load(small, weights_only=True)["model"]
    assert not any(name.startswith("sem_aux") for name in state)
    assert all(v.dtype == torch.float16 for v in state.values() if v.is_floating_point())
    for name, value in state.items():
        torch.testing.assert_close(value, trained[name].to(value.dtype))

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


def test_compare_needs_eval_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_net.py", "--compare", "--config-file", CONFIG])
    with pytest.raises(SystemExit) as caught:
        train_net.invoke_main()
    assert caught.value.code == 2
    assert "--eval-only" in capsys.readouterr().err

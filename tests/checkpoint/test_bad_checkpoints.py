"""Files that are no checkpoint, or the checkpoint of another model: one sentence each."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import expedite_d2.models  # noqa: F401 (registers the architectures)
from expedite_d2.checkpoint import load_weights
from expedite_d2.config import load_config
from expedite_d2.d2 import build_model

TINY = Path(__file__).parents[1] / "models/mask2former_tiny.yaml"


def build(*opts, seed=0):
    torch.manual_seed(seed)
    return build_model(load_config(TINY, opts)).eval()


def test_empty_path_warns_of_random_weights(caplog):
    load_weights(build(), "")
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "random weights" in caplog.text


def test_missing_file_or_directory_without_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pth not found"):
        load_weights(build(), tmp_path / "nowhere.pth")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        load_weights(build(), tmp_path)


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x04garbage", "truncated"])
def test_corrupt_files_are_one_sentence(tmp_path, suffix, content):
    path = tmp_path / f"model{suffix}"
    if content == "truncated":
        save_file({"a": torch.zeros(999)}, path) if "safe" in suffix else torch.save({}, path)
        content = path.read_bytes()[:-50]
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a readable checkpoint") as error:
        load_weights(build(), path)
    assert "\n" not in str(error.value)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": ["a"]}'])
def test_broken_index_of_shards(tmp_path, content):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(ValueError, match="is no index of shards: expected JSON with"):
        load_weights(build(), tmp_path)


@pytest.mark.parametrize("save", [torch.save, lambda x, p: p.write_bytes(pickle.dumps(x))])
def test_pickled_code_never_runs(tmp_path, save):
    path, trace = tmp_path / "model.pkl", tmp_path / "ran"
    save({"model": {"w": Malicious(trace)}}, path)
    with pytest.raises(ValueError, match="is not a readable checkpoint"):
        load_weights(build(), path)
    assert not trace.exists()


@pytest.mark.parametrize("content", [{}, {"model": {}}, {"epoch": 3}, [1, 2]])
def test_file_without_a_state_dict(tmp_path, content):
    path = tmp_path / "model.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match="no state dict"):
        load_weights(build(), path)


def test_another_model_says_how_many_names_matched(tmp_path):
    path = tmp_path / "resnet.pth"
    torch.save({"conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}, path)
    model = build()
    total = len(model.state_dict())
    with pytest.raises(ValueError, match=f"another model: 0 of the model's {total} names matched"):
        load_weights(model, path)


def test_a_deeper_model_names_what_is_left_over(tmp_path):
    path = tmp_path / "deep.pth"
    torch.save(build("MODEL.MASK_FORMER.DEC_LAYERS", 6).state_dict(), path)
    with pytest.raises(
        ValueError, match=r"left over are transformer_module.decoder.layers.4.*more"
    ):
        load_weights(build(), path)


def test_other_shapes_are_named_and_nothing_is_loaded(tmp_path):
    path = tmp_path / "wide.pth"
    torch.save(build("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 9, seed=1).state_dict(), path)
    model, before = build(), build()
    with pytest.raises(ValueError, match=r"class_predictor.weight \(10, 48\), expected \(6, 48\)"):
        load_weights(model, path)
    state = before.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())

"""Files that are no checkpoint, or the checkpoint of another model: one sentence each."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import expedite_d2.d2.modeling  # noqa: F401 (registers the architectures)
from expedite_d2.d2 import build_model
from expedite_d2.d2.checkpoint import load_weights
from expedite_d2.d2.config import load_config

TINY = Path(__file__).parents[1] / "modeling/mask2former_tiny.yaml"


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


def written(content: bytes, path: Path) -> Path:
    path.write_bytes(content)
    return path


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"content")
    return buffer.getvalue()


def saved(**options) -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(2)}, buffer, **options)
    return buffer.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 884\n"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS, "it is a git-lfs pointer, not the file itself"),
        (b"\r\n<!DOCTYPE html><html><body>404</body></html>", "it is a web page"),
        (b"\xef\xbb\xbf<HTML>Sign in</HTML>", "it is a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied", "it is XML, such as a server's error"),
        (b'{"metadata": {}, "weight_map": {}}', "it is JSON: where it is an index of shards, give"),
        (gzip.compress(saved()), "it is compressed with gzip"),
        (bz2.compress(saved()), "it is compressed with bzip2"),
        (lzma.compress(saved()), "it is compressed with xz"),
        (zipped("a/weights.pth", "readme.md"), "a zip archive, but not torch.*holds a/weights.pth"),
        (zipped(), "it is truncated|it is a zip archive, but not torch.save's: it holds nothing"),
        (zipped("m/data.pkl", "m/constants.pkl", "m/code/m.py"), "it is a TorchScript archive"),
        (b"a/b".ljust(257, b"\0") + b"ustar\x0000", "it is a tar archive"),
        (b"\x93NUMPY\x01\x00", "it is a single NumPy array"),
        (b"\x89HDF\r\n\x1a\n", "it is HDF5, as Keras writes it"),
        (saved(pickle_protocol=4), "it is pickled with protocol 4"),
        (
            saved(pickle_protocol=5, _use_new_zipfile_serialization=False),
            "it is pickled with protocol 5",
        ),
    ],
)
def test_other_kinds_of_file_are_named(tmp_path, content, message, suffix):
    path = written(content, tmp_path / f"weights{suffix}")
    with pytest.raises(ValueError, match=f"is not a readable checkpoint: .*({message})") as error:
        load_weights(torch.nn.Linear(1, 1), path)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torchscript_archive_is_no_checkpoint(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "model.pt")
    with pytest.raises(ValueError, match="TorchScript archive, which is a program: save its state"):
        load_weights(torch.nn.Linear(2, 2), tmp_path / "model.pt")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"w": []}}', "[" * 10**5, "\0"],
)
def test_broken_index_of_shards(tmp_path, content):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(ValueError, match="is no index of shards: expected JSON with"):
        load_weights(torch.nn.Linear(1, 1), tmp_path)


@pytest.mark.parametrize("shard", ["../a", "/etc/passwd", "", ".", "..", "a/b", "a\0b", 5, None])
def test_shards_lie_beside_their_index(tmp_path, shard):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"weight": shard}}))
    with pytest.raises(ValueError, match="index.json must list files beside it, got"):
        load_weights(torch.nn.Linear(1, 1), tmp_path)


def test_shards_that_overlap_or_are_missing(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"weight": "a", "bias": "b"}}))
    save_file({"weight": torch.zeros(1, 1)}, tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="b not found"):
        load_weights(torch.nn.Linear(1, 1), tmp_path)
    save_file({"weight": torch.ones(1, 1), "bias": torch.zeros(1)}, tmp_path / "b")
    with pytest.raises(ValueError, match="holds weight in more than one of its shards"):
        load_weights(torch.nn.Linear(1, 1), tmp_path)


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

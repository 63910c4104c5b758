"""The same weights in the wrappings that other trainers put around them."""

from __future__ import annotations

import argparse
import datetime
import decimal
import logging
import pathlib
import pickle
import types
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from expedite_d2.d2.checkpoint import load_weights
from expedite_d2.d2.checkpoint.wrappings import CONTAINERS


def make(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    parts = {"backbone": nn.Linear(5, 7), "norm": nn.BatchNorm1d(7), "head": nn.Conv2d(3, 4, 3)}
    return nn.ModuleDict(parts)


STATE = make(1).state_dict()
OTHER = make(2).state_dict()


def loads(path: Path, state: dict = STATE) -> bool:
    model = make()
    load_weights(model, path)
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def prefixed(prefix: str, state: dict = STATE) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


# --- words before the names, and within them ----------------------------------------------------


@pytest.mark.parametrize(
    "prefix",
    [
        "module.", "_orig_mod.", "model.", "net.", "backbone.", "encoder.", "student.",
        "module._orig_mod.", "_orig_mod.module.", "model.module._orig_mod.", "a.b.c.d.",
        "_forward_module.model.", "_fsdp_wrapped_module.", "module.module.",
    ],
)  # fmt: skip
def test_words_before_all_names_are_taken_off(tmp_path: Path, prefix: str, caplog) -> None:
    torch.save({"state_dict": prefixed(prefix)}, tmp_path / "weights.pth")
    with caplog.at_level(logging.INFO, logger="expedite_d2"):
        assert loads(tmp_path / "weights.pth")
    assert f"weights.pth: its names are read without the prefix {prefix}" in caplog.text


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: name.replace("backbone.", "backbone._orig_mod."),
        lambda name: name.replace("norm.", "norm.module."),
        lambda name: "model." + name.replace("head.", "head._checkpoint_wrapped_module."),
        lambda name: "_fsdp_wrapped_module." + name.replace("head.", "head._fsdp_wrapped_module."),
        lambda name: "module." + name.replace("backbone.", "backbone._orig_mod.module."),
    ],
)
def test_wrapped_parts_of_a_model(tmp_path: Path, wrap) -> None:
    torch.save({wrap(name): tensor for name, tensor in STATE.items()}, tmp_path / "weights.pth")
    assert loads(tmp_path / "weights.pth")


class Averaged(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        torch.optim.swa_utils.AveragedModel,
        lambda model: nn.DataParallel(torch.optim.swa_utils.AveragedModel(model)),
        lambda model: Averaged(nn.DataParallel(model)),
    ],
)
def test_torchs_own_wrappers(tmp_path: Path, wrap) -> None:
    torch.save({"model": wrap(make(1)).state_dict()}, tmp_path / "weights.pth")
    assert loads(tmp_path / "weights.pth")


def test_a_prefix_of_the_models_own_stays(tmp_path: Path, caplog) -> None:
    model, source = (nn.ModuleDict({"module": make(seed)}) for seed in (0, 1))
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    with caplog.at_level(logging.INFO, logger="expedite_d2"):
        load_weights(model, tmp_path / "weights.pth")
    assert torch.equal(model["module"]["head"].weight, source["module"]["head"].weight)
    assert "without" not in caplog.text


def test_a_prefix_of_some_names_is_another_model(tmp_path: Path) -> None:
    state = STATE | {"ema.head.weight": STATE["head.weight"]}
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="left over are ema.head.weight"):
        loads(tmp_path / "weights.pth")
    del state["head.weight"]
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="missing are head.weight, left over are ema.head.weight"):
        loads(tmp_path / "weights.pth")


# --- the keys that weights stand below ----------------------------------------------------------


@pytest.mark.parametrize("key", CONTAINERS)
def test_containers(tmp_path: Path, key: str) -> None:
    torch.save({"epoch": 3, key: STATE, "optimizer": {"state": {}}}, tmp_path / "weights.pth")
    assert loads(tmp_path / "weights.pth")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"ema": {"module": state, "decay": 0.99}},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {"state_dict": {"model": prefixed("module.", state)}},
        lambda state: {"model": {}, "net": state},
        lambda state: {"model": None, "state_dict": {"epoch": 1}, "model_state": state},
        lambda state: {"model": "swin", "rng_state": torch.zeros(3), "teacher": state},
        lambda state: OrderedDict(module=OrderedDict(state)),
    ],
)
def test_nested_containers_and_containers_without_weights(tmp_path: Path, wrap) -> None:
    torch.save(wrap(STATE), tmp_path / "weights.pth")
    assert loads(tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("model", "model_ema"), ("state_dict", "state_dict_ema"), ("model", "state_dict"),
        ("teacher", "student"), ("net", "ema"), ("module", "ema_state_dict"),
    ],
)  # fmt: skip
def test_the_choice_between_containers_is_told(tmp_path, first, second, caplog) -> None:
    torch.save({second: OTHER, first: STATE}, tmp_path / "weights.pth")
    with caplog.at_level(logging.INFO, logger="expedite_d2"):
        assert loads(tmp_path / "weights.pth")
    assert f"taken are the weights below '{first}', not '{second}'" in caplog.text


def test_a_container_within_itself(tmp_path: Path) -> None:
    content: dict = {"epoch": 1}
    content["model"] = content["ema"] = content
    (tmp_path / "weights.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="holds no state dict"):
        loads(tmp_path / "weights.pkl")


def test_weights_below_an_unknown_key_are_named(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "generator": STATE}, tmp_path / "weights.pth")
    with pytest.raises(
        ValueError, match=r"no tensor among .*'epoch', 'generator'.* 'generator' is"
    ):
        loads(tmp_path / "weights.pth")


# --- what stands beside the weights -------------------------------------------------------------

BESIDE = {
    "numpy number": np.float64(0.5),
    "numpy numbers": [np.int64(3), np.float32(1), np.bool_(True), np.str_("a")],
    "numpy array": np.arange(6.0).reshape(2, 3),
    "array of objects": np.array([{"loss": 1.0}, None], dtype=object),
    "array of records": np.zeros(2, dtype=[("name", "U4"), ("loss", "f4")]),
    "numpy types": [np.dtype("f4"), np.float32, np.dtype("<U3")],
    "namespace": argparse.Namespace(lr=1, paths=[pathlib.Path("a")], nested=argparse.Namespace()),
    "simple namespace": types.SimpleNamespace(lr=1),
    "paths": [pathlib.Path("a/b"), pathlib.PurePosixPath("a"), pathlib.PureWindowsPath("c:\\a")],
    "containers": [OrderedDict(a=1), Counter("aab"), {1, 2}, frozenset([3]), deque([1, 2], 3)],
    "defaultdicts": [defaultdict(list, a=[1]), defaultdict(int, b=2), defaultdict(dict)],
    "times": [datetime.datetime.now(), datetime.timedelta(1), datetime.date.today()],
    "numbers": [decimal.Decimal("1.5"), 1 + 2j, 10**30, True, None, range(3), slice(1)],
    "bytes": [b"a", bytearray(b"b")],
    "torch's": [torch.__version__, torch.Size([2]), torch.float16, torch.device("cpu")],
    "random states": [torch.get_rng_state(), np.random.get_state()],
}  # fmt: skip


def as_torch(content, path: Path) -> None:
    torch.save(content, path)


def as_legacy(content, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def as_pickle(content, path: Path, protocol: int = 4) -> None:
    path.write_bytes(pickle.dumps(content, protocol=protocol))


@pytest.mark.parametrize("save", [as_torch, as_legacy, as_pickle])
@pytest.mark.parametrize("kind", BESIDE)
def test_harmless_data_beside_the_weights(tmp_path: Path, kind: str, save) -> None:
    save({"args": BESIDE[kind], "model": STATE, "meta": {"inner": BESIDE[kind]}}, tmp_path / "w")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loads(tmp_path / "w")


def test_harmless_data_leaves_torchs_list_as_it_was(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    torch.save({"model": STATE, "args": argparse.Namespace()}, tmp_path / "w.pth")
    assert loads(tmp_path / "w.pth")
    assert set(torch.serialization.get_safe_globals()) == before


class Own:
    """Something of a trainer's own."""

    def __init__(self, **values) -> None:
        self.__dict__.update(values)


class OwnDict(dict):
    pass


def own_function() -> None:
    pass


@pytest.mark.parametrize("save", [as_torch, as_legacy, as_pickle])
@pytest.mark.parametrize(
    ("content", "what", "below"),
    [
        ({"meta": Own()}, "Own", "'meta'"),
        ({"meta": OwnDict(a=1)}, "OwnDict", "'meta'"),
        ({"meta": {"hooks": [1, (Own(lr=1),)]}}, "Own", "'meta' > 'hooks'"),
        ({"args": argparse.Namespace(config=Own())}, "Own", "'args' > 'config'"),
        ({"model": Own(weights=STATE)}, "Own", "'model'"),
        ({"model": STATE | {"head.weight": Own()}}, "Own", "'model' > 'head.weight'"),
        ({"meta": Own}, "Own", "'meta'"),
        ({"collate": own_function}, "own_function", "'collate'"),
        ({"loss": nn.L1Loss()}, "torch.nn.modules.loss.L1Loss", "'loss'"),
        ({"generator": np.random.default_rng(0)}, "numpy", "'generator'"),
    ],
)
def test_what_is_never_unpickled_is_named(tmp_path: Path, save, content, what, below) -> None:
    save({"model": STATE} | content, tmp_path / "w.pth")
    with pytest.raises(
        ValueError, match=rf"holds an object of \S*{what}\S* below {below}"
    ) as caught:
        loads(tmp_path / "w.pth")
    message = str(caught.value)
    assert "\n" not in message and "\x1b" not in message and "weights_only" not in message
    assert "save the weights alone, for instance torch.save({'model': model" in message


@pytest.mark.parametrize("save", [as_torch, as_legacy, as_pickle])
def test_a_whole_model_is_not_its_weights(tmp_path: Path, save) -> None:
    save(make(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"an object of torch.nn.*ModuleDict, not a dict of names"):
        loads(tmp_path / "w.pth")


# --- arrays and tensors -------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_every_protocol(tmp_path: Path, protocol: int) -> None:
    arrays = {name: tensor.numpy() for name, tensor in STATE.items()}
    arrays["head.weight"] = np.asfortranarray(arrays["head.weight"])
    arrays["backbone.weight"] = arrays["backbone.weight"].astype(">f4")
    as_pickle({"model": arrays}, tmp_path / "w.pkl", protocol)
    assert loads(tmp_path / "w.pkl")


@pytest.mark.parametrize("save", [as_torch, as_legacy])
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.numpy(),
        lambda t: nn.Parameter(t) if t.is_floating_point() else t,
        lambda t: t.double() if t.is_floating_point() else t.int(),
        lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.ndim else t,
        lambda t: t.clone().requires_grad_(t.is_floating_point()),
    ],
)
def test_arrays_parameters_and_other_precisions(tmp_path: Path, save, change) -> None:
    save({"model": {name: change(t) for name, t in STATE.items()}}, tmp_path / "w.pth")
    assert loads(tmp_path / "w.pth")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(tmp_path: Path, dtype: torch.dtype) -> None:
    half = {n: t.to(dtype) if t.is_floating_point() else t for n, t in STATE.items()}
    torch.save(half, tmp_path / "w.pth")
    assert loads(tmp_path / "w.pth", {n: t.to(STATE[n].dtype) for n, t in half.items()})


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.to_sparse(), "backbone.weight must be a dense tensor.*got a sparse one"),
        (lambda t: t.to_sparse_csr(), "backbone.weight must be a dense tensor.*got a sparse one"),
        (lambda t: t.to("meta"), "backbone.weight must be a dense tensor.*got a meta one"),
        (lambda t: t.to(torch.complex64), "must be a dense tensor.*got a complex64 one"),
        (lambda t: t.to(torch.float8_e4m3fn), "must be a dense tensor.*got a float8_e4m3fn one"),
        (
            lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
            "must be a dense tensor.*got a quantised one",
        ),
        (lambda t: t.int(), "other kinds of numbers: backbone.weight torch.int32, expected"),
        (lambda t: t[:0], r"differ in shape: backbone.weight \(0, 5\), expected \(7, 5\)"),
        (lambda t: t.expand(10**6, *t.shape), r"backbone.weight \(1000000, 7, 5\), expected"),
        (lambda t: t.tolist(), "missing are backbone.weight"),
        (
            lambda t: t.numpy().astype(object),
            "backbone.weight must be numbers, got an array of",
        ),
        (lambda t: t.numpy().astype("U"), "backbone.weight must be numbers, got <U32"),
        (lambda t: t.numpy().astype(np.longdouble), "backbone.weight must be numbers, got float"),
    ],
)
def test_tensors_that_no_weight_can_be(tmp_path: Path, change, message: str) -> None:
    state = STATE | {"backbone.weight": change(STATE["backbone.weight"])}
    torch.save({"model": state}, tmp_path / "w.pth")
    model = make()
    with pytest.raises(ValueError, match=message):
        load_weights(model, tmp_path / "w.pth")
    assert all(torch.equal(t, make().state_dict()[n]) for n, t in model.state_dict().items())


# --- kinds of file ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "suffix", ["", ".pth", ".pkl", ".safetensors", ".SAFETENSORS", ".bin", ".ckpt"]
)
@pytest.mark.parametrize("save", [as_torch, as_legacy, as_pickle, save_file])
def test_files_are_known_by_their_content(tmp_path: Path, save, suffix: str) -> None:
    save(dict(STATE), tmp_path / f"weights{suffix}")
    assert loads(tmp_path / f"weights{suffix}")

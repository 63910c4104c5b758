"""Valid checkpoints, spoilt at random: the right weights, or one sentence; never a part of them."""

from __future__ import annotations

import io
import json
import pickle
import random
import re
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from expedite_d2.d2.checkpoint import load_weights
from expedite_d2.d2.checkpoint.dpt import DPT_FORMATS
from expedite_d2.d2.checkpoint.names import FORMATS
from expedite_d2.d2.checkpoint.segmenter import SEGMENTER_FORMATS

SENTINEL = 77
TRIALS = 40


def make() -> nn.Module:
    parts = {"backbone": nn.Linear(5, 7), "norm": nn.BatchNorm1d(7), "head": nn.Conv2d(3, 4, 3)}
    return nn.ModuleDict(parts)


torch.manual_seed(1)
STATE = make().state_dict()
ARRAYS = {name: tensor.numpy() for name, tensor in STATE.items()}
BESIDE = {"epoch": 3, "curve": np.arange(3.0), "best": np.float64(0.5)}


def torch_bytes(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


FILES: dict[str, Callable[[dict], bytes]] = {
    "zip": lambda state: torch_bytes({"model": state, **BESIDE}),
    "legacy": lambda state: torch_bytes(
        {"model": state, **BESIDE}, _use_new_zipfile_serialization=False
    ),
    "pickle of tensors": lambda state: pickle.dumps({"model": state, **BESIDE}),
    "pickle 0": lambda state: pickle.dumps({"model": arrays_of(state)}, protocol=0),
    "pickle 2": lambda state: pickle.dumps({"model": arrays_of(state)}, protocol=2),
    "pickle 4": lambda state: pickle.dumps({"model": arrays_of(state), **BESIDE}, protocol=4),
    "pickle 5": lambda state: pickle.dumps({"model": arrays_of(state), **BESIDE}, protocol=5),
    "safetensors": lambda state: save({n: t for n, t in state.items() if isinstance(t, Tensor)}),
}


def arrays_of(state: dict) -> dict:
    return {
        name: value.detach().numpy() if isinstance(value, Tensor) and is_small(value) else value
        for name, value in state.items()
    }


def is_small(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.numel() < 1000


def outcome(path: Path) -> dict[str, Tensor] | str:
    """The weights of a model that has loaded a file, or the sentence that it was refused with."""
    model = make()
    for tensor in model.state_dict().values():
        tensor.fill_(SENTINEL)
    try:
        load_weights(model, path)
    except (ValueError, OSError) as error:
        message = str(error)
        assert "\n" not in message and "\x1b" not in message and len(message) < 1000, message
        assert path.name in message or str(path.parent) in message, message
        assert all((tensor == SENTINEL).all() for tensor in model.state_dict().values())
        return message
    state = model.state_dict()
    assert not any((tensor == SENTINEL).any() for tensor in state.values()), "half loaded"
    return state


def equal(state: dict[str, Tensor] | str) -> bool:
    return isinstance(state, dict) and all(torch.equal(STATE[name], t) for name, t in state.items())


# --- bytes --------------------------------------------------------------------------------------


def flipped(data: bytearray, draw: random.Random) -> None:
    for _ in range(draw.choice([1, 1, 2, 8])):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def flipped_early(data: bytearray, draw: random.Random) -> None:
    data[draw.randrange(min(400, len(data)))] ^= 1 << draw.randrange(8)


def extreme(data: bytearray, draw: random.Random) -> None:
    start, length = draw.randrange(len(data) - 8), draw.choice([1, 2, 4, 8])
    data[start : start + length] = draw.choice([b"\0", b"\xff", b"\x7f"]) * length


def truncated(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data)) :]


def spliced(data: bytearray, draw: random.Random) -> None:
    start, length = draw.randrange(len(data)), draw.randrange(1, 64)
    part = data[start : start + length]
    if draw.random() < 0.5:
        del data[start : start + length]
    place = draw.randrange(len(data))
    data[place:place] = part


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spoil", [flipped, flipped_early, extreme, truncated, spliced])
@pytest.mark.parametrize("kind", FILES)
def test_spoilt_bytes(tmp_path: Path, kind: str, spoil: Callable) -> None:
    whole = FILES[kind](STATE)
    path = tmp_path / "weights.pth"
    path.write_bytes(whole)
    assert equal(outcome(path))
    told = 0
    for seed in range(TRIALS):
        data = bytearray(whole)
        spoil(data, random.Random(f"{kind} {spoil.__name__} {seed}"))
        path.write_bytes(data)
        result = outcome(path)
        told += isinstance(result, str)
        # torch's archives have checksums, so that whatever loads is right.
        assert kind != "zip" or isinstance(result, str) or equal(result), seed
    assert told > TRIALS // 3


@pytest.mark.parametrize(
    "spoilt",
    [
        {"dtype": "F64"},
        {"dtype": "C64", "shape": [1]},
        {"dtype": 5},
        {"shape": [2**62, 2]},
        {"shape": [-1, 5]},
        {"shape": [[7], 5]},
        {"data_offsets": [0, 2**63]},
        {"data_offsets": [8, 0]},
    ],
)
@pytest.mark.parametrize("name", ["backbone.weight", "head.bias"])
def test_spoilt_headers_of_safetensors(tmp_path: Path, name: str, spoilt: dict) -> None:
    data = FILES["safetensors"](STATE)
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(header | {name: header[name] | spoilt}).encode()
    path = tmp_path / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    assert isinstance(outcome(path), str)


@pytest.mark.parametrize(
    "spoilt",
    [
        b"\x80\x02]r\xff\xff\xff\x07.",  # an index of the memo
        b"\x80\x02]q\x00h\xff.",
        b"\x80\x05\x96" + struct.pack("<Q", 2**30) + b"abc.",  # a bytearray
        b"\x80\x04\x8e" + struct.pack("<Q", 2**30) + b"abc.",  # bytes
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"abc.",
        b"\x80\x04\x8d" + struct.pack("<Q", 2**30) + b"abc.",  # text
        b"\x80\x04\x95" + struct.pack("<Q", 2**30) + b"N.",  # a frame
        b"\x80\x02\x8b\xff\xff\xff\x7f\x00.",  # an integer
        b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x3f\x85R.",
        b"\x80\x02cnumpy\nndarray\nJ\xff\xff\xff\x3f\x85\x85R.",
    ],
)  # fmt: skip
def test_numbers_of_a_pickle_do_not_take_memory(tmp_path: Path, spoilt: bytes) -> None:
    path = tmp_path / "weights.pkl"
    path.write_bytes(spoilt)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert isinstance(outcome(path), str)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


# --- fields, types, numbers ---------------------------------------------------------------------


class Own:
    pass


VALUES: list[Callable[[Tensor], Any]] = [
    lambda t: None,
    lambda t: 3.5,
    lambda t: "weights",
    lambda t: t.tolist(),
    lambda t: {"inner": t},
    lambda t: Own(),
    lambda t: t.numpy(),
    lambda t: nn.Parameter(t, requires_grad=t.is_floating_point()),
    lambda t: t.double(),
    lambda t: t.to(torch.int64),
    lambda t: t.to(torch.complex64),
    lambda t: t.to(torch.bool),
    lambda t: t.to_sparse() if t.ndim else t,
    lambda t: t.to("meta"),
    lambda t: t[..., :0] if t.ndim else t,
    lambda t: t.flatten(),
    lambda t: t[None],
    lambda t: t.reshape(-1)[0],
    lambda t: t.expand(2**40, *t.shape),
    lambda t: t.numpy().astype(">f8"),
    lambda t: t.numpy().astype(object),
    lambda t: t.numpy().astype("S8"),
    lambda t: np.zeros((0, 2**40), np.float32),
    lambda t: t.T if t.ndim == 2 else t,
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FILES)
def test_spoilt_fields(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "weights.pth"
    for number, value in enumerate(VALUES):
        for name in ("backbone.weight", "norm.num_batches_tracked", "head.bias"):
            state = dict(STATE) | {name: value(STATE[name].detach())}
            try:
                content = FILES[kind](state)
            except (TypeError, ValueError, NotImplementedError):
                continue  # what such a file cannot hold
            path.write_bytes(content)
            result = outcome(path)
            same = isinstance(result, str) or torch.equal(
                result["head.weight"], STATE["head.weight"]
            )
            assert same and (isinstance(result, str) or equal(result)), (number, name)


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("name", STATE)
def test_dropped_and_renamed_fields(tmp_path: Path, kind: str, name: str) -> None:
    path = tmp_path / "weights.pth"
    dropped = {other: tensor for other, tensor in STATE.items() if other != name}
    path.write_bytes(FILES[kind](dropped))
    assert f"missing are {name}, left over are none" in str(outcome(path))
    for other in (
        "",
        ".",
        "a." + name,
        name + ".",
        name.upper(),
        "module." + name,
        "名前",
        "a" * 400,
    ):
        path.write_bytes(FILES[kind](dropped | {other: STATE[name]}))
        result = outcome(path)
        assert equal(result) if other == "module." + name else f"missing are {name}" in str(result)


@pytest.mark.parametrize("name", ["a\nb", "\x1b[1mb", "\0", "\ud800", "a" * 10**6, "\u202eb"])
@pytest.mark.parametrize("kind", ["zip", "pickle 4"])
def test_names_that_would_spoil_the_message(tmp_path: Path, kind: str, name: str) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(FILES[kind](STATE | {name: torch.zeros(2)}))
    assert "is no name of a weight" in str(outcome(path))


@pytest.mark.parametrize(
    "content",
    [
        None, 5, "text", [], {}, [STATE], {"model": []}, {"model": 5, "state_dict": None},
        {"model": {"model": {"model": {"model": STATE}}}}, {5: STATE}, {("a",): STATE},
        {"base": 5, "model": STATE}, {"base": "../x", "model": STATE}, {"base": [[]] * 9, **STATE},
        torch.zeros(3), np.zeros(3), {"model": torch.zeros(3)}, {b"model": STATE}, {"ema": "model"},
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_other_content(tmp_path: Path, kind: str, content: Any) -> None:
    data = {
        "zip": lambda: torch_bytes(content),
        "legacy": lambda: torch_bytes(content, _use_new_zipfile_serialization=False),
        "pickle": lambda: pickle.dumps(content),
    }[kind]()
    (tmp_path / "weights.pth").write_bytes(data)
    assert isinstance(outcome(tmp_path / "weights.pth"), str)


@pytest.mark.parametrize("depth", [10, 1000, 30_000])
def test_deep_content(tmp_path: Path, depth: int) -> None:
    path = tmp_path / "weights.pkl"
    path.write_bytes(b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b".")
    assert isinstance(outcome(path), str)
    path.write_bytes(b"\x80\x02" + b"N" + b"\x85" * depth + b".")
    assert isinstance(outcome(path), str)


# --- directories --------------------------------------------------------------------------------


def shards(folder: Path, kind: str) -> list[Path]:
    """A directory of two shards and their index."""
    name = {"safetensors": "model.safetensors", "zip": "pytorch_model.bin"}[kind]
    items = list(STATE.items())
    files = [folder / f"{name}-{number}" for number in (1, 2)]
    for file, part in zip(files, (items[:4], items[4:]), strict=True):
        file.write_bytes(FILES[kind](dict(part)))
    index = {n: files[i].name for i, part in enumerate((items[:4], items[4:])) for n, _ in part}
    files.append(folder / f"{name}.index.json")
    files[-1].write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return files


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("kind", ["safetensors", "zip"])
def test_spoilt_directories(tmp_path: Path, kind: str, part: int) -> None:
    file = shards(tmp_path, kind)[part]
    assert equal(outcome(tmp_path))
    whole = file.read_bytes()
    for seed in range(TRIALS):
        data = bytearray(whole)
        draw = random.Random(f"{kind} {part} {seed}")
        draw.choice([flipped_early, extreme, truncated, spliced])(data, draw)
        file.write_bytes(data)
        result = outcome(tmp_path)
        assert kind != "zip" or isinstance(result, str) or equal(result), seed
    file.unlink()
    assert "not found" in str(outcome(tmp_path)) or part == 2
    file.mkdir()
    assert isinstance(outcome(tmp_path), str)


# --- translations -------------------------------------------------------------------------------

NAMES = {
    file.stem: re.findall(r"^\S+", file.read_text().replace("{", "").replace("}", ""), re.M)
    for file in Path(__file__).parent.glob("*.txt")
}
SHAPES: list[tuple[int, ...]] = [(), (0,), (1,), (2,), (3,), (3, 2), (6, 4), (2, 3, 1, 1), (1,) * 6]


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("fmt", [*DPT_FORMATS, *SEGMENTER_FORMATS, *FORMATS], ids=lambda f: f.title)
def test_translations_of_any_shapes(names: str, fmt: Any) -> None:
    for seed in range(5):
        draw = random.Random(f"{names} {fmt.title} {seed}")
        chosen = draw.sample(NAMES[names], k=min(40, len(NAMES[names])))
        try:
            fmt.translate({name: torch.zeros(draw.choice(SHAPES)) for name in chosen})
        except ValueError as error:
            assert "\n" not in str(error)

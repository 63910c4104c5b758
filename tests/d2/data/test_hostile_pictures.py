"""Damaged pictures of every format end in pixels or in one sentence.

Valid files are truncated, their bytes flipped, their headers filled with extreme numbers, their
modes changed and their tags scrambled, by fixed seeds. They are read in a process of its own, with
little memory and little time: another error than a sentence, a crash and a hang all fail the test.
"""

from __future__ import annotations

import io
import os
import pickle
import resource
import signal
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from expedite_d2.d2 import CfgNode
from expedite_d2.d2.config import add_expedite_config
from expedite_d2.d2.data import DepthTestMapper, DepthTrainMapper, TestMapper, TrainMapper
from expedite_d2.d2.data.depth import read_depth
from expedite_d2.d2.data.images import image_size, is_turned, labels_size, read_image, read_labels

SIZE = (12, 18)
COLOURS = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
#: Beyond what the test itself holds.
MEMORY, SECONDS = 2 << 30, 60


def encoded(mode: str, suffix: str, orientation: int = 1, **options: Any) -> bytes:
    """A valid file."""
    if mode == "I;16":
        image = Image.fromarray(COLOURS[..., 0].astype(np.uint16) * 257)
    elif mode in ("F", "I"):
        image = Image.fromarray(COLOURS[..., 0].astype({"F": np.float32, "I": np.int32}[mode]))
    else:
        image = Image.fromarray(COLOURS).convert(mode)
    if orientation != 1:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    file = io.BytesIO()
    image.save(file, format=Image.registered_extensions()[f".{suffix}"], **options)
    return file.getvalue()


FILES: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{f"{mode}.png": (mode, "png", {}) for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")},
    **{f"{mode}.tif": (mode, "tif", {}) for mode in ("RGB", "CMYK", "LAB", "F", "I;16", "YCbCr")},
    **{
        f"{name}.tif": ("RGB", "tif", {"compression": name})
        for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")
    },
    "group4.tif": ("1", "tif", {"compression": "group4"}),
    "trns.png": ("P", "png", {"transparency": 3}),
    "interlaced.gif": ("P", "gif", {"transparency": 3, "interlace": 1}),
    "RGB.jpg": ("RGB", "jpg", {}),
    "progressive.jpg": ("RGB", "jpg", {"progressive": True, "orientation": 7}),
    "CMYK.jpg": ("CMYK", "jpg", {}),
    "turned.jpg": ("RGB", "jpg", {"orientation": 6}),
    "turned.png": ("RGB", "png", {"orientation": 8}),
    "turned.tif": ("RGB", "tif", {"orientation": 5}),
    "turned.webp": ("RGB", "webp", {"orientation": 3}),
    "RGBA.webp": ("RGBA", "webp", {"lossless": True}),
    "RGB.jp2": ("RGB", "jp2", {}),
    **{f"RGB.{s}": ("RGB", s, {}) for s in ("bmp", "ppm", "tga", "pcx", "sgi", "dds", "ico", "im")},
}


def _truncated(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: rng.integers(len(data))]


def _flipped(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for place in rng.integers(len(data), size=rng.integers(1, 9)):
        changed[place] ^= 1 << rng.integers(8)
    return bytes(changed)


def _extreme(data: bytes, rng: np.random.Generator) -> bytes:
    """A number in the header that is as large, or as small, as its field can hold."""
    kind = ["B", "<H", ">H", "<I", ">I"][rng.integers(5)]
    limit = 256 ** struct.calcsize(kind) - 1
    value = [0, 1, limit // 2, limit // 2 + 1, limit][rng.integers(5)]
    place = int(rng.integers(min(len(data), 120) - 4))
    field = struct.pack(kind, value)
    return data[:place] + field + data[place + len(field) :]


def _repeated(data: bytes, rng: np.random.Generator) -> bytes:
    """A piece taken out, or put in once more."""
    start, stop = sorted(rng.integers(len(data), size=2).tolist())
    return data[:start] + data[stop:] if rng.random() < 0.5 else data[:stop] + data[start:]


def _scrambled(data: bytes, rng: np.random.Generator) -> bytes:
    """A run of noise."""
    start = int(rng.integers(len(data)))
    noise = rng.integers(0, 256, min(int(rng.integers(1, 40)), len(data) - start), dtype=np.uint8)
    return data[:start] + noise.tobytes() + data[start + len(noise) :]


MUTATIONS = [_truncated, _flipped, _extreme, _extreme, _repeated, _scrambled]


def resealed(data: bytes) -> bytes:
    """A PNG whose checksums are right again, so that what it says is believed."""
    out, place = data[:8], 8
    while place + 12 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        body = data[place + 4 : place + 8 + length]
        out += data[place : place + 4] + body + struct.pack(">I", zlib.crc32(body))
        place += 12 + length
    return out + data[place:]


def mutations(data: bytes, count: int) -> Iterator[bytes]:
    for seed in range(count):
        rng = np.random.default_rng(seed)
        changed = MUTATIONS[seed % len(MUTATIONS)](data, rng)
        if data.startswith(b"\x89PNG") and seed % 2:
            changed = resealed(changed)
        yield changed


def outcome(read: Callable[[], Any]) -> str:
    """What reading comes to, as far as it is not as it should be; "" otherwise."""
    try:
        result = read()
    except (ValueError, OSError) as error:
        text = str(error)
        return "" if text.startswith("image ") and "\n" not in text else f"no sentence: {error!r}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    if isinstance(result, np.ndarray) and (result.ndim not in (2, 3) or not result.size):
        return f"shape {result.shape}"
    return ""


def apart(work: Callable[[], Any]) -> Any:
    """The result of a function that runs in a process of its own, with little memory and time."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(SECONDS)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libtiff has to say
            with warnings.catch_warnings(), os.fdopen(writing, "wb") as pipe:
                warnings.simplefilter("ignore")
                pickle.dump(work(), pipe)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        sent = pipe.read()
    _, status = os.waitpid(child, 0)
    assert status == 0 and sent, f"the process ended with status {status}"
    return pickle.loads(sent)


@pytest.mark.parametrize("name", FILES)
def test_damaged_pictures_end_in_pixels_or_a_sentence(name: str, tmp_path: Path) -> None:
    mode, suffix, options = FILES[name]
    data, path = encoded(mode, suffix, **options), tmp_path / f"x.{suffix}"
    path.write_bytes(data)
    readers = {
        "read_image": lambda: read_image(path),
        "read_labels": lambda: read_labels(path),
        "image_size": lambda: image_size(path),
        "labels_size": lambda: labels_size(path),
        "is_turned": lambda: is_turned(path),
    }
    assert image_size(path) == read_image(path).shape[:2]
    assert labels_size(path) == read_labels(path).shape[:2]

    def work() -> list[str]:
        wrong = []
        for seed, changed in enumerate(mutations(data, 90)):
            path.write_bytes(changed)
            for reader, read in readers.items():
                if found := outcome(read):
                    wrong.append(f"seed {seed}, {reader}: {found}")
        return wrong

    assert apart(work) == []


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("colour", [0, 2, 3, 4, 6])
def test_pngs_of_another_mode_end_in_pixels_or_a_sentence(
    depth: int, colour: int, tmp_path: Path
) -> None:
    path = tmp_path / "x.png"

    def work() -> list[str]:
        wrong = []
        for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"):
            for size in (SIZE, (0, 0), (1, 2**31 - 1), (2**31, 2**31), (13000, 13000)):
                data = bytearray(encoded(mode, "png"))
                data[16:26] = struct.pack(">IIBB", size[1], size[0], depth, colour)
                path.write_bytes(resealed(bytes(data)))
                if found := outcome(lambda: read_image(path)):
                    wrong.append(f"{mode} as {size}: {found}")
        return wrong

    assert apart(work) == []


@pytest.mark.parametrize("name", ["turned.jpg", "turned.png", "turned.webp", "progressive.jpg"])
def test_noise_in_the_tags_does_not_reach_the_pixels(name: str, tmp_path: Path) -> None:
    mode, suffix, options = FILES[name]
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(encoded(mode, suffix, **options))
    stored = read_labels(path)
    turns = [np.rot90(array, k) for array in (stored, stored[:, ::-1]) for k in range(4)]

    def work() -> list[str]:
        wrong = []
        for seed in range(60):
            rng = np.random.default_rng(seed)
            exif = Image.Exif()
            exif[0x0112] = int(rng.integers(0, 12))
            tags = bytearray(exif.tobytes())
            for place in rng.integers(6, len(tags), size=rng.integers(4)):
                tags[place] = rng.integers(256)
            changed = options | {"orientation": 1, "exif": bytes(tags)}
            path.write_bytes(encoded(mode, suffix, **changed))
            pixels = read_image(path)
            if not any(np.array_equal(pixels, turn) for turn in turns):
                wrong.append(f"seed {seed}: other pixels")
        return wrong

    assert apart(work) == []


@pytest.mark.parametrize("kind", ["test", "depth-test", "semantic", "panoptic", "depth"])
@pytest.mark.parametrize("damaged", ["image", "labels"])
def test_damaged_files_of_a_data_set_are_one_sentence(
    cfg: CfgNode, kind: str, damaged: str, tmp_path: Path
) -> None:
    add_expedite_config(cfg)
    label_mode = {"depth": "I;16", "depth-test": "I;16", "panoptic": "RGB"}.get(kind, "L")
    contents = {"image": encoded("RGB", "jpg"), "labels": encoded(label_mode, "png")}
    paths = {"image": tmp_path / "image.jpg", "labels": tmp_path / "labels.png"}
    for part, path in paths.items():
        path.write_bytes(contents[part])
    labels = str(paths["labels"])
    entry: dict[str, Any] = {"file_name": str(paths["image"]), "segments_info": []}
    entry |= {"pan_seg_file_name": labels, "sem_seg_file_name": labels}
    entry |= {"depth_file_name": labels, "depth_scale": 1.0}
    cfg.INPUT.MIN_SIZE_TEST = cfg.INPUT.MAX_SIZE_TEST = 16
    cfg.INPUT.MIN_SIZE_TRAIN = (16,)
    cfg.MODEL.DPT.TEST_SIZE = [32, 32]
    names = {"semantic": "mask_former_semantic", "panoptic": "mask_former_panoptic"}
    cfg.INPUT.DATASET_MAPPER_NAME = names.get(kind, "depth")
    mappers: dict[str, type] = {
        "test": TestMapper, "depth-test": DepthTestMapper, "depth": DepthTrainMapper,
    }  # fmt: skip
    mapper = mappers.get(kind, TrainMapper)(cfg)
    arguments = [] if "test" in kind else [np.random.default_rng(0)]

    def work() -> tuple[list[str], int]:
        wrong, mapped = [], 0
        for seed, changed in enumerate(mutations(contents[damaged], 60)):
            paths[damaged].write_bytes(changed)
            try:
                mapper(entry, *arguments)
                mapped += 1
            except (ValueError, OSError) as error:
                if str(paths[damaged]) not in str(error) or "\n" in str(error):
                    wrong.append(f"seed {seed}: {error!r}")
            except BaseException as error:
                wrong.append(f"seed {seed}: {error!r}")
        return wrong, mapped

    wrong, mapped = apart(work)
    assert wrong == [] and (mapped < 60 or (kind == "test" and damaged == "labels"))


@pytest.mark.parametrize("mode", ["RGB", "L", "F", "P", "1", "RGBA"])
def test_pictures_that_are_no_depth_are_one_sentence(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("x.tif" if mode == "F" else "x.png")
    path.write_bytes(encoded(mode, path.suffix[1:]))
    with pytest.raises(ValueError, match=f"{path.name} is not a depth map"):
        read_depth(path, 1.0)

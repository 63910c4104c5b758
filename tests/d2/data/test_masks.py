"""Polygons and run lengths: what pycocotools would make of them, or one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from expedite_d2.d2.data import masks
from expedite_d2.d2.data.masks import (
    OtherSize,
    check_segmentation,
    decode_segmentation,
    decompressed,
    mask_box,
)

SIZE = (96, 128)
TRIANGLE = [10, 10, 60, 10, 60, 40]

# Each ends the process, takes all memory or reads beyond the end in pycocotools, or is no mask.
REFUSED = {
    "": "neither a list nor an object",
    "5": "neither a list nor an object",
    "[]": "no polygon of three or more points",
    "[[]]": "no polygon of three or more points",
    "[[5, 5]]": "no polygon of three or more points",
    "[[5, 5, 25, 25]]": "no polygon of three or more points",
    "[[1, 2, 3, 4, 5, 6, 7]]": "7 coordinates are no pairs",
    "[1, 2, 3, 4, 5, 6]": "a list of numbers in a list",
    "[[[1, 2], [3, 4], [5, 6]]]": "a coordinate is no number",
    '[["1", "2", "3", "4", "5", "6"]]': "a coordinate is no number",
    "[[null, 2, 3, 4, 5, 6]]": "a coordinate is no number",
    "[[true, 2, 3, 4, 5, 6]]": "a coordinate is no number",
    '["1 2 3 4 5 6"]': "a list of numbers in a list",
    "[[NaN, 10, 60, 10, 60, 40]]": "not finite",
    "[[10, NaN, NaN, 10, NaN, NaN]]": "not finite",
    "[[Infinity, 10, 60, 10, 60, 40]]": "farther from the image",
    "[[10, -Infinity, 60, 10, 60, 40]]": "farther from the image",
    "[[1e6, 10, 60, 10, 60, 40]]": "farther from the image",
    "[[10, 1e9, 60, 10, 60, 40]]": "farther from the image",
    "[[-1e9, 10, 60, 10, 60, 40]]": "farther from the image",
    f"[[NaN, {10**400}, 60, 10, 60, 40]]": "a segmentation must be polygons",
    f"[[{10**400}, 10, 60, 10, 60, 40]]": "farther from the image",
    f"[{[0, 0, 255, 220] * 10000}]": "an outline of more than",
    "{}": "two whole numbers",
    '{"counts": [12288]}': "two whole numbers",
    '{"size": [96, "128"], "counts": [12288]}': "two whole numbers",
    '{"size": [96, 128]}': "a list or a string",
    '{"size": [96, 128], "counts": 12288}': "a list or a string",
    '{"size": [96, 128], "counts": []}': "runs of 0 pixels, the image has 12288",
    '{"size": [96, 128], "counts": [5, 6]}': "runs of 11 pixels, the image has 12288",
    '{"size": [96, 128], "counts": [-5, 12293]}': "a run's length is negative",
    '{"size": [96, 128], "counts": [0.5, 12287.5]}': "no whole number",
    '{"size": [96, 128], "counts": [NaN, 12288]}': "no whole number",
    '{"size": [96, 128], "counts": [4294967296, 12288]}': "runs of 4294979584 pixels",
    '{"size": [96, 128], "counts": ""}': "runs of 0 pixels",
    '{"size": [96, 128], "counts": "PPPPPPPPP"}': "compressed run lengths are damaged",
    '{"size": [96, 128], "counts": "PPPPPPPPPPPPPPPPPPPP0"}': "compressed run lengths are damaged",
    '{"size": [96, 128], "counts": "0\\u00e9"}': "compressed run lengths are damaged",
    '{"size": [96, 128], "counts": "0 0"}': "compressed run lengths are damaged",
    '{"size": [96, 128], "counts": "oooooo0"}': "compressed run lengths are damaged",
}

# Runs a file alone, without the package, with a gigabyte of memory beyond what it has by then.
CHILD = """
import json, resource, runpy, sys
decode = runpy.run_path(sys.argv[1])["decode_segmentation"]
limit = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (1 << 30)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
for text in json.load(sys.stdin):
    try:
        decode(json.loads(text) if text else None, 96, 128)
        print("a mask", flush=True)
    except ValueError as error:
        print(error, flush=True)
"""


def test_what_pycocotools_cannot_take_is_one_sentence_and_never_ends_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, masks.__file__],
        input=json.dumps(list(REFUSED)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == len(REFUSED), done.stderr
    for line, (text, reason) in zip(lines, REFUSED.items(), strict=True):
        assert line.startswith("a segmentation must be polygons or run lengths, got "), text
        assert reason in line, text


@pytest.mark.parametrize(
    "segmentation",
    [
        [TRIANGLE],
        [[-9.5, -9, 60, 10, 140, 40]],
        [TRIANGLE, [70, 50, 80, 50, 80, 90.5]],
        [[5, 5, 5, 5, 5, 5]],
        {"size": list(SIZE), "counts": [0, 40, 12248]},
        {"size": list(SIZE), "counts": [12288]},
        {"size": list(SIZE), "counts": [10, 20, 0, 5, 12253]},
    ],
)
def test_masks_are_those_of_pycocotools(segmentation: Any) -> None:
    rle = coco_mask.frPyObjects(segmentation, *SIZE)
    rle = coco_mask.merge(rle) if isinstance(rle, list) else rle
    expected = coco_mask.decode(rle)
    text = {"size": list(SIZE), "counts": rle["counts"].decode()}
    for form in (segmentation, rle, text):
        assert np.array_equal(decode_segmentation(form, *SIZE), expected)
    assert mask_box(segmentation, *SIZE) == coco_mask.toBbox(rle).tolist()


@pytest.mark.parametrize("empty", [[], [10, 10], [10, 10, 50, 50]])
def test_parts_that_enclose_nothing_are_left_out(empty: list[float]) -> None:
    assert check_segmentation([empty, TRIANGLE], *SIZE) == [TRIANGLE]


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64])
def test_arrays_of_numbers_are_polygons(kind: type) -> None:
    expected = decode_segmentation([TRIANGLE], *SIZE)
    array = np.array(TRIANGLE, kind)
    for part in (array, list(array), tuple(TRIANGLE)):
        assert np.array_equal(decode_segmentation([part], *SIZE), expected)


@pytest.mark.parametrize("size", [[128, 96], [1, 12288], [96, 127]])
def test_masks_of_another_size_name_both(size: list[int]) -> None:
    with pytest.raises(OtherSize, match=f"size 96x128, got {size[0]}x{size[1]}"):
        check_segmentation({"size": size, "counts": [12288]}, *SIZE)


def test_compressed_runs_are_those_of_pycocotools() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        # Blocks of all sizes: short and long runs, differences of both signs.
        grid = rng.random(rng.integers(1, 30, 2)) < rng.random()
        mask = np.kron(grid, np.ones(rng.integers(1, 40, 2))).astype(np.uint8)
        edges = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=0))
        runs = np.diff(edges, prepend=0, append=mask.size)
        counts = coco_mask.encode(np.asfortranarray(mask))["counts"]
        found = decompressed(counts)
        # pycocotools writes no run of nothing at the end.
        assert np.array_equal(found, runs) and found.sum() == mask.size
        assert np.array_equal(decompressed(counts.decode()), found)


def test_flipped_bytes_of_compressed_runs_are_refused() -> None:
    rng = np.random.default_rng(1)
    mask = np.kron(rng.random((12, 16)) < 0.5, np.ones((8, 8))).astype(np.uint8)
    counts = coco_mask.encode(np.asfortranarray(mask))["counts"]
    for _ in range(300):
        damaged = bytearray(counts)
        damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
        # One length more or less changes how many pixels there are.
        with pytest.raises(ValueError, match="a segmentation must be polygons or run lengths"):
            decode_segmentation({"size": list(SIZE), "counts": bytes(damaged)}, *SIZE)

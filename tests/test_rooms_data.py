"""Laying out labelled NYU Depth v2, from folders like those that it comes in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from benchmarks.rooms_data import lay_out, main
from expedite_d2.d2.data import nyuv2_labeled

FRAMES = 100


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Frames whose number is the brightness and the depth; frame 0 has each label once."""
    folder = tmp_path / "source"
    for kind in ("nyu_images", "nyu_depths", "nyu_labels40"):
        (folder / kind).mkdir(parents=True)
    for number in range(FRAMES):
        grey = Image.fromarray(np.full((5, 8), number, np.uint8))
        grey.save(folder / f"nyu_images/{number}.jpg")
        grey.save(folder / f"nyu_depths/{number}.png")
        labels = np.arange(40, dtype=np.uint8).reshape(5, 8)
        Image.fromarray(labels).save(folder / f"nyu_labels40/{number}.png")
    numbers = np.arange(1, FRAMES + 1, dtype=np.uint16)[:, None]
    savemat(tmp_path / "splits.mat", {"trainNdxs": numbers[10:], "testNdxs": numbers[:10]})
    return folder


def test_the_loader_reads_what_was_laid_out(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "datasets/nyuv2_labeled"
    main([str(source), str(tmp_path / "splits.mat"), str(target)])
    frames = nyuv2_labeled.load_frames(
        "test", target, "test", lambda _, frame: {"labels": target / f"labels40/{frame}.png"}
    )
    assert [frame["image_id"] for frame in frames] == [f"{number:04}" for number in range(1, 11)]
    assert np.asarray(Image.open(frames[4]["file_name"])).mean() == 4
    assert np.asarray(Image.open(target / "depth/0005.png")).max() == 4
    labels = np.asarray(Image.open(frames[4]["labels"])).ravel()
    assert labels.tolist() == [*range(1, 40), 0]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda source: (source / "nyu_depths/50.png").unlink(), "No such file.*nyu_depths/50.png"),
        (
            lambda source: Image.new("L", (8, 5), 40).save(source / "nyu_labels40/50.png"),
            "nyu_labels40/50.png must hold one label of 0 to 39 per pixel",
        ),
        (
            lambda source: (source.parent / "splits.mat").write_text("1\n2\n" * 100),
            "splits.mat must be a MATLAB file with trainNdxs and testNdxs",
        ),
        (
            lambda source: savemat(source.parent / "splits.mat", {"train": [1, 2]}),
            "splits.mat must be a MATLAB file with trainNdxs and testNdxs",
        ),
        (
            lambda source: (source.parent / "data/nyuv2").mkdir(parents=True),
            "nyuv2 is there already",
        ),
    ],
)
def test_what_does_not_fit_leaves_nothing_behind(
    source: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(source)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((OSError, ValueError), match=message):
        lay_out(source, tmp_path / "splits.mat", tmp_path / "data/nyuv2")
    assert sorted(tmp_path.rglob("*")) in (before, sorted([*before, tmp_path / "data"]))

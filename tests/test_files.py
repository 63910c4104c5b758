"""Whole files or none, and names that fit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from expedite_d2.files import MAX_NAME, fitting_name, remove_leftovers, replacing


def test_replacing_keeps_the_old_file_when_interrupted(tmp_path: Path) -> None:
    target = tmp_path / "comparison.json"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(target) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["comparison.json"]


def test_replacing_puts_the_new_file_in_place(tmp_path: Path) -> None:
    target = tmp_path / "comparison.json"
    target.write_text("old")
    with replacing(target) as partial:
        partial.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["comparison.json"]


def test_replacing_needs_the_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"), replacing(tmp_path / "absent" / "file"):
        raise AssertionError("not reached")


@pytest.mark.parametrize(
    "name",
    [
        "short.png",
        "model_0000123.pth",
        251 * "n" + ".png",
        240 * "n" + ".png",
        83 * "日" + ".png",
        125 * "é" + ".jpeg",
        62 * "🙂" + ".json",
        "." + 254 * "h",
        os.fsdecode(b"\xff" * 251 + b".png"),
    ],
    ids=lambda name: f"{len(os.fsencode(name))} bytes",
)
def test_replacing_takes_no_longer_name_than_the_file_has(name: str, tmp_path: Path) -> None:
    target = tmp_path / name
    with replacing(target) as partial:
        partial.write_text("x")
        (directory,) = os.listdir(tmp_path)
        assert directory.startswith(".") and partial.name == name
        assert len(os.fsencode(directory)) <= max(len(os.fsencode(name)), 10)
    assert target.read_text() == "x" and os.listdir(tmp_path) == [name]


def _killed_while_writing(target: Path) -> Path:
    """What a process leaves that was killed while it wrote a file."""
    with replacing(target) as partial:
        partial.write_text("x")
    partial.parent.mkdir()
    target.rename(partial)
    return partial.parent


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    left = [
        _killed_while_writing(tmp_path / name)
        for name in ("model_0000009.pth", "model_12345678.pth", "model_final.pth")
    ]
    others = [
        _killed_while_writing(tmp_path / name)
        for name in ("head_0000009.pth", "model2_0000009.pth", "model_0000009.json")
    ]
    for name in (".backup-20240131", ".model_0", "model_0-20240131"):
        others.append(tmp_path / name)
        others[-1].mkdir()
        (others[-1] / "model_0000009.pth").write_text("mine")
    remove_leftovers(tmp_path, "model_*.pth")
    assert not any(directory.exists() for directory in left)
    assert all(len(os.listdir(directory)) == 1 for directory in others)


@pytest.mark.parametrize("character", ["n", "é", "日", "🙂", os.fsdecode(b"\xff")])
def test_fitting_name_shortens_what_is_too_long(character: str) -> None:
    width = len(os.fsencode(character))
    for bytes_of_stem in range(240, 270, width):
        stem = character * (bytes_of_stem // width)
        name = fitting_name(stem, ".png")
        assert name == fitting_name(stem, ".png") and name.endswith(".png")
        assert len(os.fsencode(name)) <= MAX_NAME
        if len(os.fsencode(stem)) + 4 <= MAX_NAME:
            assert name == f"{stem}.png"
        else:
            assert name.startswith(character * (220 // width)) and len(os.fsencode(name)) > 250


def test_fitting_name_keeps_long_stems_apart() -> None:
    stems = [251 * "n" + end for end in ("a", "b", "ab", "ba", "")]
    assert len({fitting_name(stem, ".png") for stem in stems}) == len(stems)

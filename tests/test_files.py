"""Whole files or none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from expedite_d2.files import replacing


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

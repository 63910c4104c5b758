"""The page of models: that it has every family, and is what its script makes."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from benchmarks import models_page
from benchmarks.common import ROOT
from benchmarks.families import NOTES
from benchmarks.published import MODELS
from expedite_d2 import families

PAGE = (ROOT / "docs/models.md").read_text(encoding="utf-8")
ROWS: dict[str, Any] = json.loads(models_page.COUNTS.read_text(encoding="utf-8"))
# The versions of the libraries are those that it was written with.
VERSION = re.compile(r"^(\| [a-z-]+ \|) \d[^ ]* \|", re.MULTILINE)


def names() -> list[str]:
    return sorted(family.name for family in families())


def test_every_family_is_on_the_page_and_no_other() -> None:
    tables = re.findall(r"^\| family \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    listed = [line.split(" | ")[0][2:] for table in tables for line in table.splitlines()]
    assert sorted(listed) == names()


def test_what_is_known_of_families_is_of_these() -> None:
    assert sorted(NOTES) == sorted(MODELS) == sorted(ROWS) == names()


def test_page_is_what_the_script_makes() -> None:
    made = models_page.page(ROWS, models_page.versions())
    assert VERSION.sub(r"\1", made) == VERSION.sub(r"\1", PAGE)
    assert PAGE.count("\n| torch | ") == 1 and "| transformers | 5" in PAGE


def test_counts_are_those_of_the_model() -> None:
    name = "transformers DeiTModel"
    assert json.loads(json.dumps(models_page.count(name))) == ROWS[name]


def test_only_what_is_new_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []
    monkeypatch.setattr(models_page, "count", lambda name: counted.append(name) or ROWS[name])
    new, other = "timm Eva", "timm Beit"
    old = {name: row for name, row in ROWS.items() if name != new}
    old[other] = {**ROWS[other], "title": "another model"}
    assert models_page.counted(old) == ROWS and sorted(counted) == [other, new]
    counted.clear()
    assert models_page.counted(ROWS, again=True) == ROWS and len(counted) == len(ROWS)

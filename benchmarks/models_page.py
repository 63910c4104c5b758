"""Writes docs/models.md from the registry of families and a published model of each.

python -m benchmarks.models_page
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.common import ROOT
from benchmarks.families import NOTES, Notes
from benchmarks.published import MODELS, on_meta
from expedite_d2 import Family, describe, expedite, families
from expedite_d2.adapters.refusals import REFUSALS
from expedite_d2.adapters.registry import find_encoder
from expedite_d2.errors import cli
from expedite_d2.files import replacing
from expedite_d2.reducers import Cluster
from expedite_d2.tools.tuning import in_words

COUNTS = Path(__file__).with_suffix(".json")
TEXT = Path(__file__).with_suffix(".md")
LIBRARIES = {
    "transformers": "transformers",
    "timm": "timm",
    "torchvision": "torchvision",
    "": "Files that projects have copies of",
    "detectron2": "Detectron2",
}
PACKAGES = ("torch", "transformers", "timm", "torchvision", "segment-anything")

Row = Mapping[str, Any]


def count(name: str) -> dict[str, Any]:
    """What is chosen for the published model of a family, and what that leaves.

    Raises:
        ValueError: a model that is not of the family.
    """
    model, notes = on_meta(name), NOTES[name]
    found, encoder = find_encoder(model)
    if found is None or (found.name != name and MODELS[name] != found.name):
        raise ValueError(f"the model of {name} must be of this family, got {found}")
    expedite(model, size=notes.size)
    told = describe(model, notes.size)
    assert told.reduction is not None
    step = told.reduction.steps[0]
    window = found.window(encoder, step.at)
    return {
        "title": notes.title,
        "size": told.size,
        "settings": in_words(told.reduction),
        "window": window,
        "clusters": step.cells(*window) if window and isinstance(step, Cluster) else None,
        "groups": found.attention(found.blocks(encoder)[step.at]) is not None,
        "multiply_adds": told.multiply_adds,
        "reduced_multiply_adds": told.reduced_multiply_adds,
    }


def counted(old: Mapping[str, Row], again: bool = False) -> dict[str, Row]:
    """The counts of all families.

    Args:
        old: those that there are.
        again: whether to count all, rather than those that are new or have another model.
    """
    rows = {}
    for family in families():
        row = old.get(family.name)
        if again or row is None or row["title"] != NOTES[family.name].title:
            row = count(family.name)
            print(f"counted {family.name}")
        rows[family.name] = row
    return rows


def takes(family: Family, row: Row) -> str:
    """The kinds of settings that a family takes."""
    if family.positions.needs_grid:
        return "clusters"
    return "clusters, merges, groups" if row["groups"] else "clusters, merges"


def reduced(notes: Notes, row: Row) -> str:
    """What is reduced together."""
    if row["window"] is None:
        return notes.within or "the image"
    (rows, columns), (few_rows, few_columns) = row["window"], row["clusters"]
    of = f", {notes.within}" if notes.within else ""
    return f"windows of {rows}x{columns} to {few_rows}x{few_columns}{of}"


def tables(found: Sequence[Family], rows: Mapping[str, Row]) -> str:
    """Two tables of the families of one library: what they are, and what is saved."""
    kinds, costs = [], []
    for family in found:
        notes, row = NOTES[family.name], rows[family.name]
        plain, left = row["multiply_adds"], row["reduced_multiply_adds"]
        kinds.append(
            {
                "family": family.name,
                "classes": ", ".join(f"`{name}`" for name in family.classes),
                "used by": notes.used_by,
                "positions": family.positions.kind,
                "takes": takes(family, row),
                "restrictions": notes.restrictions,
            }
        )
        costs.append(
            {
                "model": notes.title,
                "image": "x".join(map(str, row["size"])),
                "reduced": reduced(notes, row),
                "settings": row["settings"],
                "multiply-adds, G": f"{plain / 1e9:.1f} → {left / 1e9:.1f}",
                "left, %": f"{100 * left / plain:.1f}",
            }
        )
    both = (
        tabulate(t, headers="keys", tablefmt="github", disable_numparse=True)
        for t in (kinds, costs)
    )
    return "\n\n".join(_narrow(table) for table in both)


def _narrow(table: str) -> str:
    """A table without the blanks that align its columns, of which cells of prose make many."""
    return re.sub(r"-{4,}", "---", re.sub(r" {2,}", " ", table))


def versions() -> str:
    """Rows of the libraries: the version here, and those that pyproject.toml asks for."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lines = []
    for name in PACKAGES:
        asked = re.search(rf'"{name}([<>=!~][^"]*)?"', project)
        version = importlib.metadata.version(name).partition("+")[0]
        lines.append(f"| {name} | {version} | {(asked and asked[1]) or 'any'} |")
    return "\n".join(lines)


def refused() -> str:
    """Rows of the encoders that are refused for a reason."""
    return "\n".join(
        f"| {', '.join(f'`{name}`' for name in refusal.classes)} | {refusal.reason} |"
        for refusal in REFUSALS
    )


def page(rows: Mapping[str, Row], known: str) -> str:
    """The page.

    Args:
        rows: the counts of all families.
        known: the rows of `versions`.
    """
    parts = []
    for library, title in LIBRARIES.items():
        found = sorted(
            (family for family in families() if family.library == library),
            key=lambda family: list(NOTES).index(family.name),
        )
        parts.append(f"## {title}\n\n{tables(found, rows)}")
    text = TEXT.read_text(encoding="utf-8")
    return text.format(versions=known, libraries="\n\n".join(parts), refused=refused())


@cli
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs/models.md", metavar="FILE")
    parser.add_argument("--count", action="store_true", help="count all models again")
    args = parser.parse_args(argv)
    kept = json.loads(COUNTS.read_text(encoding="utf-8")) if COUNTS.exists() else {}
    rows = counted(kept, args.count)
    with replacing(COUNTS) as partial:
        partial.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    with replacing(args.output) as partial:
        partial.write_text(page(rows, versions()), encoding="utf-8")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()

"""The arrows between the parts of the package, held by reading and by running the imports."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import expedite_d2

PACKAGE = Path(expedite_d2.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# A part may import the parts before it, and itself.
LIBRARY = ["files", "profiling", "_ext", "ops", "reducers", "adapters", "tools"]
PROJECT = [
    "logger",
    "builtin",
    "provider",
    "progress",
    "config",
    "modeling",
    "visualize",
    "checkpoint",
    "data",
    "evaluation",
    "engine",
    "comparison",
]
# Standard library alone, for both rooms.
SHARED = {"errors", "files"}
# Packages of others that the library imports; the last two when a file is read or written.
THIRD_PARTY = {"torch", "yaml", "safetensors"}
# And those that these files import when they need them, with a sentence if they are missing.
EXTRAS = {
    ("tools", "tune"): {"tqdm"},
    ("tools", "tuning"): {"matplotlib"},
    ("tools", "named_models"): {"timm", "transformers", "PIL"},
}


def place(path: Path) -> tuple[str, ...]:
    """A file's name within the package, as an import has it."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(path: Path) -> list[tuple[str, ...]]:
    """Full names of everything that a file imports, also inside functions."""
    names: list[str] = []
    package = ["expedite_d2", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            names += [".".join([*base, alias.name]) for alias in node.names]
    return [tuple(name.split(".")) for name in names]


def own(path: Path) -> list[tuple[str, ...]]:
    """What a file imports of this package, without the package's name."""
    return [name[1:] for name in imports(path) if name[0] == "expedite_d2" and len(name) > 1]


def ids(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


IN_LIBRARY = [path for path in MODULES if place(path)[:1] != ("d2",) and path.name != "__main__.py"]
IN_PROJECT = [path for path in MODULES if place(path)[:1] == ("d2",)]


@pytest.mark.parametrize("path", IN_LIBRARY, ids=ids)
def test_imports_of_library_point_one_way(path: Path) -> None:
    part = (place(path) or ("",))[0]
    assert not any(name[0] == "d2" for name in own(path)), "the library imports the project"
    if part:
        assert part in {*LIBRARY, *SHARED}, f"{part} has no place in LIBRARY"
        before = LIBRARY[: LIBRARY.index(part) + 1] if part in LIBRARY else [part]
        assert {name[0] for name in own(path)} <= {*before, *SHARED, "_C"}
    third_party = {name[0] for name in imports(path)} - {"expedite_d2", *sys.stdlib_module_names}
    allowed = THIRD_PARTY | EXTRAS.get(place(path), set())
    assert third_party <= (allowed if part not in SHARED else set())


@pytest.mark.parametrize("path", IN_PROJECT, ids=ids)
def test_imports_of_project_point_one_way(path: Path) -> None:
    part = place(path)[1] if len(place(path)) > 1 else ""
    if not part:  # the door itself
        return
    assert part in PROJECT, f"{part} has no place in PROJECT"
    before = PROJECT[: PROJECT.index(part) + 1]
    parts = {child.name.removesuffix(".py") for child in (PACKAGE / "d2").iterdir()}
    used = {name[1] for name in own(path) if name[0] == "d2" and len(name) > 1}
    assert used <= parts, f"imports names from the door: {used - parts}"
    assert used <= set(before)


def test_imports_binary_in_one_place() -> None:
    assert [ids(path) for path in MODULES if ("_C",) in own(path)] == ["_ext.py"]


def test_imports_never_pretend_to_be_detectron2() -> None:
    fakes = [name for name in sys.modules if name.split(".")[0] == "detectron2"]
    for name in fakes:
        assert "expedite_d2" not in (getattr(sys.modules[name], "__file__", None) or "")

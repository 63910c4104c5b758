"""The arrows between the parts of the package, held by reading the imports."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import expedite_d2

PACKAGE = Path(expedite_d2.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# A part may import parts to its left, its neighbours between the same bars, and itself.
ORDER = [
    {"_ext", "files", "profiling"},
    {"ops"},
    {"reducers"},
    {"adapters"},
    {"tools"},
    {"models"},
    {"data", "evaluation", "checkpoint"},
    {"engine"},
    {"predict", "calibrate"},
]
# Everything from the models on may use these; they use nothing of ours but what stands here.
LEAVES: dict[str, set[str]] = {
    "progress": set(),
    "errors": set(),
    "d2": {"errors", "files"},
    "config": {"config_rules", "d2", "errors"},
    "config_rules": set(),
    "visualize": set(),
    "muon": {"d2"},
    "solver": {"config_rules", "d2", "muon"},
}
# What needs torch alone.
CORE = ("_ext", "files", "ops", "profiling", "reducers", "adapters", "tools")
RANK = {part: rank for rank, parts in enumerate(ORDER) for part in parts}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
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
    return names


def own_parts(path: Path) -> set[str]:
    names = [name.split(".") for name in imports(path)]
    return {name[1] for name in names if name[0] == "expedite_d2" and len(name) > 1}


def ids(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        return
    parts = {child.name.removesuffix(".py") for child in PACKAGE.iterdir()} | {"_C"}
    used = (own_parts(path) & parts) - {part, "_C"}
    if part in LEAVES:
        assert used <= LEAVES[part]
        return
    assert part in RANK, f"{part} has no place in ORDER"
    for other in used:
        if other in LEAVES:
            assert RANK[part] >= RANK["models"], f"{part} imports {other}"
        else:
            assert RANK[other] <= RANK[part], f"{part} imports {other}"


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if part_of(path) in CORE],
    ids=ids,
)
def test_imports_of_operators_adapters_and_tools_are_torch_alone(path: Path) -> None:
    foreign = {name.split(".")[0] for name in imports(path)}
    assert foreign - set(sys.stdlib_module_names) <= {"torch", "expedite_d2", "yaml"}


def test_imports_binary_in_one_place() -> None:
    users = [ids(path) for path in MODULES if "_C" in own_parts(path)]
    assert users == ["_ext.py"]


def test_imports_never_pretend_to_be_detectron2() -> None:
    fakes = [name for name in sys.modules if name.split(".")[0] == "detectron2"]
    for name in fakes:
        assert "expedite_d2" not in (getattr(sys.modules[name], "__file__", None) or "")

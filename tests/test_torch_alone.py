"""The library where torch, and what torch itself needs, is all there is."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import expedite_d2

# Begins with the example of CONTRIBUTING.md, which registers a family, expedites and restores.
SCRIPT = """
from importlib.util import find_spec
for package in ("numpy", "torchvision", "timm", "transformers", "fvcore", "yaml", "safetensors"):
    assert find_spec(package) is None, package

images = torch.rand(2, 3, 64, 96)
with torch.no_grad():
    plain = model(images)
    fewer = expedite(model, alpha=2, clusters=(4, 6))(images)
    restored = restore(model)(images)
assert fewer.shape == plain.shape and not torch.equal(fewer, plain)
assert torch.equal(restored, plain)

import expedite_d2

assert expedite_d2.families()[0].name == "my Encoder"
print(expedite_d2.describe(expedite(model, alpha=2, clusters=(4, 6)), size=(64, 96)))
"""


def needed_by(name: str) -> set[str]:
    """The installed distributions that one needs, and those that these need, without extras."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        try:
            distribution = metadata.distribution(waiting.pop())
        except metadata.PackageNotFoundError:  # of another platform
            continue
        if distribution.name not in found:
            found.add(distribution.name)
            needs = [need for need in distribution.requires or () if "extra ==" not in need]
            waiting += [re.split(r"[^\w.-]", need, maxsplit=1)[0] for need in needs]
    return found


@pytest.fixture(scope="module")
def torch_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search path of links: torch, what it needs, and this package."""
    folder = tmp_path_factory.mktemp("torch_alone")
    links = {"expedite_d2": Path(expedite_d2.__file__).parent}
    for name in needed_by("torch"):
        distribution = metadata.distribution(name)
        for file in distribution.files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__"):
                links[top] = Path(str(distribution.locate_file(top)))
    for name, target in links.items():
        (folder / name).symlink_to(target)
    return folder


def run(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python without site-packages."""
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(path)},
        cwd=path,
    )


def test_library_expedites_and_restores(torch_alone: Path) -> None:
    guide = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (example,) = re.findall("```python\n(.*?)```", guide, re.DOTALL)
    (torch_alone / "script.py").write_text(example + SCRIPT)
    result = run(torch_alone, "script.py")
    assert result.returncode == 0, result.stderr
    assert "blocks.5" in result.stdout


def test_verb_of_the_project_names_the_extra_that_it_needs(torch_alone: Path) -> None:
    result = run(torch_alone, "-m", "expedite_d2", "cost", "--config-file", "any.yaml")
    assert result.returncode == 2 and result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "needs its extra 'd2'" in line

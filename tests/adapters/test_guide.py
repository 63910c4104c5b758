"""The example of CONTRIBUTING.md: a family of one's own, as outsiders would add it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from expedite_d2.adapters import families, is_expedited, register_family, registry
from expedite_d2.adapters.family import Family

GUIDE = Path(__file__).parents[2] / "CONTRIBUTING.md"


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    """Families that a test registers are forgotten after it."""
    before = dict(registry._FAMILIES)
    yield
    registry._FAMILIES = before


def test_example_of_the_guide_runs() -> None:
    (text,) = re.findall("```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in text.splitlines() if line.strip()]) <= 30
    names: dict[str, Any] = {"__name__": "guide"}
    torch.manual_seed(0)
    exec(text, names)
    assert names["features"].shape == (1, 96, 32)
    assert families()[0].name == "my Encoder" and repr(families()[0]) == "Family('my Encoder')"
    model = names["model"]
    assert not is_expedited(model)
    seen: list[int] = []
    for block in model.blocks:
        block.linear2.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    with torch.no_grad():
        plain = model(torch.rand(1, 3, 64, 96))
        names["expedite"](model, alpha=2, clusters=(0.5, 0.5))
        model(torch.rand(1, 3, 64, 96))
    assert plain.shape == (1, 96, 32) and seen == [96] * 6 + [96] * 2 + [24] * 4


def test_a_family_replaces_the_one_of_its_name() -> None:
    count = len(families())
    first, second = (
        Family("mine", "", ("Mine",), blocks=list, tokens=None, grid=None)  # type: ignore[arg-type]
        for _ in range(2)
    )
    assert register_family(first) is first and register_family(second) is second
    assert len(families()) == count + 1 and families()[0] is second


@pytest.mark.parametrize("family", ["timm", None, {"name": "mine"}])
def test_what_is_no_family_is_refused(family: Any) -> None:
    with pytest.raises(ValueError, match="register_family takes a Family, got"):
        register_family(family)

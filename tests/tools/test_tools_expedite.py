"""The one line: settings chosen by a budget, and the context."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_cases import CASES
from family_cases.case import Case
from family_cases.plain import timm_beit, timm_vit
from settings_cases import clustered
from torch import nn

from expedite_d2 import describe, expedite, expedited, is_expedited, restore
from expedite_d2.d2.modeling.backbone.swin import ExpeditedSwinTransformer
from expedite_d2.d2.modeling.backbone.vit import ExpeditedViT
from expedite_d2.reducers import Cluster
from expedite_d2.tools import budget as budgets


@pytest.mark.parametrize("own", [False, True], ids=["timm", "this project's"])
def test_the_context_gives_back_what_was_there(own: bool) -> None:
    vit: Any = timm_vit().eval()
    model = ExpeditedViT(vit=vit).eval() if own else vit
    x = torch.randn(1, 3, 96, 96)

    def outputs() -> Any:
        with torch.no_grad():
            out = model(x)
        return out["last"] if own else out

    plain = outputs()
    with expedited(model, alpha=2, clusters=(3, 3)) as same:
        assert same is model and is_expedited(model)
        reduced = outputs()
    assert not is_expedited(model) and torch.equal(outputs(), plain)
    expedite(model, clustered(2, (3, 3)), **({} if own else {"outputs": (3,)}))
    before = outputs()
    with pytest.raises(KeyError), expedited(model, clustered(1, (2, 2))):
        assert not torch.equal(outputs(), before)
        with expedited(model, clustered(3, (2, 2))):
            restore(model)
        assert outputs().shape == before.shape and is_expedited(model)
        raise KeyError
    assert model.reduction == clustered(2, (3, 3)) and torch.equal(outputs(), before)
    assert torch.equal(reduced, before) and torch.equal(restore(model) and outputs(), plain)
    with pytest.raises(ValueError, match="or clusters"), expedited(model, alpha=1):
        pass
    assert not is_expedited(model)


def share(model: Any, size: tuple[int, int] | None = None) -> float:
    found = describe(model, size)
    return found.reduced_multiply_adds / found.multiply_adds


def swin() -> ExpeditedSwinTransformer:
    return ExpeditedSwinTransformer(
        embed_dim=16, depths=(1, 1, 6, 1), num_heads=(1, 2, 4, 8), window_size=6
    ).eval()


@pytest.mark.parametrize("budget", [0.85, 0.7])
def test_a_budget_is_met(budget: float) -> None:
    vit = expedite(timm_vit().eval(), budget=budget, size=(192, 192))
    assert isinstance(vit.reduction.steps[0], Cluster)
    assert budget - 0.2 < share(vit, (192, 192)) <= budget
    assert vit(torch.randn(2, 3, 192, 176)).isfinite().all()
    own = expedite(swin(), budget=budget, size=(192, 192))
    assert isinstance(own.reduction.steps[0], Cluster) and share(own, (192, 192)) <= budget


@pytest.mark.parametrize(("budget", "rounds"), [(0.64, 1), (0.5, 1), (0.4, 2)])
def test_below_two_thirds_attention_sees_groups(budget: float, rounds: int) -> None:
    vit = expedite(timm_vit().eval(), budget=budget, size=(192, 192))
    assert [step.rounds for step in vit.reduction.steps] == [rounds] * 4
    assert budget - 0.2 < share(vit, (192, 192)) <= budget


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.filterwarnings("ignore")
def test_without_a_budget_it_is_seven_tenths_and_never_nothing(case: Case) -> None:
    model = expedite(case.make(), size=case.size)
    assert is_expedited(model) and share(model, case.size) < 0.95


def test_what_cannot_be_reached_names_the_least_that_can() -> None:
    model = swin()
    with pytest.raises(ValueError, match=r"budget must be at least 0\.\d+ and less than 1"):
        expedite(model, budget=0.05, size=(192, 192))
    assert not is_expedited(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budgets, "BUDGET", 0.05)
        with pytest.warns(UserWarning, match=r"runs at 0\.\d+ of its encoder's .*: 0.05 was aimed"):
            expedite(model, size=(192, 192))
    assert model.reduction is not None


def test_encoders_that_cannot_merge_are_clustered() -> None:
    model = expedite(timm_beit(), budget=0.8)
    assert isinstance(model.reduction.steps[0], Cluster)


def test_one_of_several_encoders_is_named() -> None:
    model = nn.ModuleDict({"left": timm_vit(), "right": timm_vit()})
    with pytest.raises(ValueError, match="2 encoders, of which encoder= .* names one: left, right"):
        expedite(model, alpha=1, clusters=(3, 3))
    assert expedite(model, encoder="right", alpha=1, clusters=(3, 3)) is model
    assert is_expedited(model.right) and not is_expedited(model.left)
    with expedited(model, encoder="left", budget=0.7, size=(96, 96)):
        assert is_expedited(model.left)
    assert is_expedited(model.right) and not is_expedited(model.left)
    for name in ("middle", 1):
        with pytest.raises(ValueError, match="must be the name of a module of ModuleDict, got "):
            expedite(model, encoder=name)  # type: ignore[arg-type]


def test_warnings_are_told_of_the_line_that_expedites() -> None:
    with pytest.warns(UserWarning, match="what its blocks do") as told:
        expedite(timm_vit(), alpha=3, clusters=(6, 5))
    assert told[0].filename == __file__
    with pytest.warns(UserWarning, match="no fewer, in rows .* the 6x6 tokens") as told:
        expedite(timm_vit(), alpha=1, clusters=(6, 6))
    assert told[0].filename == __file__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 70}, "budget must be a share between 0 and 1, got 70"),
        ({"budget": "half"}, "budget must be a share between 0 and 1, got 'half'"),
        ({"budget": 0.5, "alpha": 1, "clusters": (2, 2)}, "budget must be left out where the set"),
        ({"size": (96, 96), "alpha": 1, "clusters": (2, 2)}, "size must be left out where the set"),
        ({"alpha": 1}, "expedite needs a reduction, or clusters"),
    ],
)
def test_two_kinds_of_settings_are_an_error(arguments: dict[str, Any], message: str) -> None:
    model = timm_vit()
    with pytest.raises(ValueError, match=message):
        expedite(model, **arguments)
    with pytest.raises(ValueError, match="model must be a torch.nn.Module, got str"):
        expedite("vit")  # type: ignore[type-var]
    assert not is_expedited(model)

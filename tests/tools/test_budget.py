"""Settings that meet a budget."""

from __future__ import annotations

from typing import Any

import pytest
from family_cases import CASES

from expedite_d2 import expedite, is_expedited
from expedite_d2.d2.modeling.backbone.swin import ExpeditedSwinTransformer
from expedite_d2.reducers import Merge
from expedite_d2.tools import describe
from expedite_d2.tools.budget import Clusters, Costs, Merges


def share(model: Any) -> float:
    found = describe(model, (192, 192))
    return found.reduced_multiply_adds / found.multiply_adds


def test_merges_keep_as_much_as_the_budget_allows() -> None:
    case = CASES["timm vit"]
    model = case.make()
    recipe = Merges((0.0, 0.5))
    found = Costs(model, (192, 192)).meet(recipe, 0.8)
    assert not is_expedited(model)
    blocks = len(describe(model, (192, 192)).blocks)
    assert [step.at for step in found.steps] == [0, round(blocks / 2)]
    assert 0.75 < share(expedite(model, found)) <= 0.8
    more = Merge(tuple(step.at for step in found.steps), found.steps[0].keep + 0.01)
    assert share(expedite(model, type(found)((more,)))) > 0.8


def test_on_small_images_merges_keep_less_than_all() -> None:
    found = Costs(CASES["timm vit"].make(), (24, 24)).meet(Merges((0.0,)), 0.995)
    assert found.steps[0].merged(36) == 1  # keeping more would merge none


def test_clusters_start_as_late_as_the_budget_demands_in_the_dearest_stage() -> None:
    model = ExpeditedSwinTransformer(
        embed_dim=16, depths=(1, 1, 4, 1), num_heads=(1, 2, 4, 8), window_size=6
    ).eval()
    starts = []
    for budget in (0.9, 0.75, 0.65):
        settings = Costs(model, (192, 192)).meet(Clusters(0.5), budget)
        assert model.reduction is None
        starts.append(settings.alpha)
        model.reduction = settings
        assert share(model) <= budget
        model.reduction = None
    assert starts == sorted(starts, reverse=True) and starts[0] > starts[-1] >= 2
    with pytest.raises(ValueError, match=r"budget must be at least 0\.\d+ and less than 1 for Exp"):
        Costs(model, (192, 192)).meet(Clusters(0.5), 0.1)
    with pytest.raises(ValueError, match="budget must be .*, got 1.5"):
        Costs(model, (192, 192)).meet(Clusters(0.5), 1.5)

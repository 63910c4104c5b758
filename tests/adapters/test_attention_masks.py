"""Attention masks have rows for tokens: those without effect are dropped, the others refused."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from family_cases import CASES, SEQUENCES
from family_cases.case import Case, images
from torch import Tensor, nn

from expedite_d2 import expedite, restore


def bools(*shape: int, seen: bool = True) -> Tensor:
    mask = torch.ones(*shape, dtype=torch.bool)
    mask[..., -1] = seen
    return mask


PAIRS = (1, 1, 37, 37)
# (name of a case, keyword, a mask without effect, one with it)
MASKS: list[tuple[str, str, Tensor, Tensor]] = [
    ("timm vit", "attn_mask", bools(*PAIRS), bools(*PAIRS, seen=False)),
    ("timm vit", "attn_mask", torch.zeros(PAIRS), torch.arange(37.0).expand(PAIRS)),
    ("timm vit", "attn_mask", bools(37, 37), bools(37, 37, seen=False)),
    *(
        (name, "attention_mask", *masks)
        for name in (
            "transformers vit",
            "transformers dinov2",
            "transformers beit, both biases",
        )
        for masks in (
            (bools(1, 37), bools(1, 37, seen=False)),
            (bools(1, 37).long(), bools(1, 37, seen=False).long()),
            (bools(1, 37).float(), bools(1, 37, seen=False).float()),
            (torch.zeros(PAIRS), torch.arange(37.0).expand(PAIRS)),
            (bools(*PAIRS), bools(*PAIRS, seen=False)),
        )
    ),
]


def called(model: Any, x: Tensor, **masks: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(x, **masks)
    return out if isinstance(out, Tensor) else out.last_hidden_state


@pytest.mark.parametrize("number", range(len(MASKS)))
def test_attention_mask_is_refused_where_it_has_an_effect(number: int) -> None:
    name, keyword, without, effective = MASKS[number]
    model, x = expedite(CASES[name].make(), alpha=1, clusters=(4, 3)), images(24, 24, batch=1)
    torch.testing.assert_close(called(model, x, **{keyword: without}), called(model, x))
    with pytest.raises(ValueError, match="takes no attention mask with an effect, got one of shap"):
        called(model, x, **{keyword: effective})


@pytest.mark.parametrize("name", ["transformers vit", "transformers dinov2"])
def test_attention_mask_is_found_by_its_place(name: str) -> None:
    model, x = expedite(CASES[name].make(), alpha=1, clusters=(4, 3)), images(24, 24, batch=1)
    names = list(inspect.signature(model.forward).parameters)
    if "attention_mask" not in names:
        pytest.skip("no such argument in this version of transformers")
    before = [None] * (names.index("attention_mask") - 1)
    with pytest.raises(ValueError, match="takes no attention mask with an effect, got one of shap"):
        model(x, *before, bools(1, 37, seen=False))


class Called(nn.Module):
    """A model as a family's users call it."""

    def __init__(self, case: Case, model: nn.Module) -> None:
        super().__init__()
        self.case, self.model = case, model

    def forward(self, x: Tensor) -> Tensor:
        return self.case.run(self.model, x)


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        *((name, "sdpa") for name in SEQUENCES if name.startswith("transformers")),
        ("transformers vit", "eager"),
        ("transformers beit, no bias", "eager"),
    ],
)
def test_transformers_exports_though_it_makes_masks_of_its_own(name: str, attention: str) -> None:
    case = CASES[name]
    model, x = expedite(case.make(), alpha=2, clusters=(4, 3)), case.images()[:2]
    model.set_attn_implementation(attention)
    with torch.no_grad():
        expected = case.run(model, x)
        program = torch.export.export(Called(case, model), (x,)).module()
        torch.testing.assert_close(program(x), expected)


@pytest.mark.parametrize("name", ["timm vit", "transformers vit", "transformers beit, no bias"])
@pytest.mark.parametrize("seen", [True, False])
def test_callers_mask_is_refused_while_exporting(name: str, seen: bool) -> None:
    keyword = "attn_mask" if name.startswith("timm") else "attention_mask"
    model, x = expedite(CASES[name].make(), alpha=1, clusters=(4, 3)), images(24, 24, batch=1)
    with pytest.raises(ValueError, match="takes no attention mask, got one while the model is tr"):
        torch.export.export(model, (x,), {keyword: bools(*PAIRS, seen=seen)})


@pytest.mark.parametrize("name", ["transformers vit", "transformers beit, both biases"])
def test_gate_leaves_signature_and_comes_off(name: str) -> None:
    model = CASES[name].make()
    signature, before = inspect.signature(model.forward), dict(vars(model))
    expedited = pickle.loads(
        pickle.dumps(
            copy.deepcopy(
                expedite(expedite(model, alpha=1, clusters=(4, 3)), alpha=1, clusters=(3, 3))
            )
        )
    )
    assert inspect.signature(expedited.forward) == signature
    assert len(expedited._forward_pre_hooks) == 1
    mask = bools(1, 37, seen=False)
    with pytest.raises(ValueError, match="takes no attention mask"):
        expedited(images(24, 24), attention_mask=mask)
    restore(expedited)(images(24, 24, batch=1), attention_mask=mask)
    assert not expedited._forward_pre_hooks and not expedited._forward_pre_hooks_with_kwargs
    restore(model)
    assert dict(vars(model)) == before

"""The fused attention that takes the place of eager ones on clusters, and which ones are eager."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from family_cases.case import Case, images
from family_cases.decomposed import (
    CASES,
    segment_anything,
    vitdet,
    with_positions,
)
from family_cases.swin import CASES as SWINS
from official_shaped import Detectron2ViT
from torch import Tensor, nn

from expedite_d2 import expedite
from expedite_d2.adapters import swin, transformers_swin
from expedite_d2.adapters.decomposed import attend
from expedite_d2.adapters.registry import find_encoder

# The libraries whose own attention writes out its matrix, and its attentions.
EAGER: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "detectron2": (
        lambda: with_positions(Detectron2ViT),
        lambda model: [block.attn for block in model.blocks],
    ),
    "segment_anything": (
        segment_anything,
        lambda model: [block.attn for block in model.blocks],
    ),
    "transformers vitdet": (
        vitdet,
        lambda model: [layer.attention for layer in model.encoder.layer],
    ),
}
eager = pytest.mark.parametrize(("make", "attentions"), EAGER.values(), ids=EAGER)


def output(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(x)
    return out if isinstance(out, Tensor) else next(iter(out.values()))


@eager
def test_fused_attention_equals_the_librarys_own(make: Any, attentions: Any) -> None:
    attention = attentions(make().double())[1]
    attention.scale = 0.5  # not the one that the kernel would take by itself
    depth = attention.rel_pos_h.shape[1]
    for rows, columns in ((6, 6), (5, 8)):
        tables = [torch.randn(2 * side - 1, depth).double() for side in (rows, columns)]
        attention.rel_pos_h, attention.rel_pos_w = map(nn.Parameter, tables)
        x = torch.randn(2, rows, columns, 16, generator=torch.Generator().manual_seed(1)).double()
        with torch.no_grad():
            own = attention(x)
            fused = attend(attention, x, (tables[0], tables[1]))
        own = own if isinstance(own, Tensor) else own[0]
        torch.testing.assert_close(fused, own, rtol=1e-10, atol=1e-10)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows with each call of a fused kernel."""
    seen: list[Any] = []
    kernel = F.scaled_dot_product_attention

    def fused(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(args)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    return seen


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_families_tell_whether_attention_is_eager(case: Case, calls: list[Any]) -> None:
    model = case.make()
    family, encoder = find_encoder(model)
    assert family is not None
    with torch.no_grad():
        case.run(model, case.images())
    assert family.eager(encoder) == (not calls)


@eager
def test_eager_libraries_are_fused_on_clusters_alone(
    make: Any, attentions: Any, calls: list[Any]
) -> None:
    model, x = make().double(), images(32, 32).double()
    copied = copy.deepcopy(model)
    for attention in attentions(copied):
        # A copy of the file whose attention holds more than is known runs as it is.
        attention.adapter = nn.Identity()
    output(model, x)
    output(expedite(copied, alpha=2, clusters=(3, 3)), x)
    assert not calls
    out = output(expedite(model, alpha=2, clusters=(3, 3)), x)
    assert len(calls) == 2  # of four blocks
    torch.testing.assert_close(out, output(copied, x), rtol=1e-10, atol=1e-10)


@eager
def test_an_attention_that_was_replaced_is_not_passed_over(make: Any, attentions: Any) -> None:
    model = make()
    for attention in attentions(model):
        attention.forward = type(attention).forward.__get__(attention)
    expedite(model, alpha=2, clusters=(3, 3))
    with pytest.raises(ValueError, match="replaced before the model was expedited"):
        output(model, images(32, 32))


def test_vitdets_attention_maps_are_those_of_clusters() -> None:
    model = expedite(vitdet(window_block_indices=[]), alpha=2, clusters=(4, 5))
    x = images(32, 40)
    with torch.no_grad():
        out = model(x, output_attentions=True)
        same = model(x).last_hidden_state
    assert [len(part[0, 0]) for part in out.attentions] == [80, 80, 20, 20]
    assert all(part.sum(-1).allclose(torch.ones(())) for part in out.attentions)
    torch.testing.assert_close(out.last_hidden_state, same, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["official swin", "video swin", "transformers maskformer swin"])
@pytest.mark.parametrize("training", [False, True])
def test_windows_are_fused_on_clusters(
    kind: str, training: bool, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = SWINS[kind]
    model, x = case.make().double().train(training), case.images().double()
    expedite(model, alpha=case.alpha, clusters=case.clusters)
    fused = case.run(model, x)
    (count,) = {len(calls)}
    assert count > 0
    # As a copy of the file that holds more than the official one, and as who asks for the matrix.
    monkeypatch.setattr(swin, "_PARTS", set())
    monkeypatch.setattr(transformers_swin, "_reads_matrix", lambda args: True)
    own = case.run(model, x)
    assert len(calls) == count
    torch.testing.assert_close(fused, own, rtol=1e-10, atol=1e-10)


def test_an_attention_that_was_replaced_is_not_left_out() -> None:
    case = SWINS["official swin"]
    model = case.make()
    attention = model.layers[2].blocks[-1].attn
    own = attention.forward
    attention.forward = lambda *args, **kwargs: own(*args, **kwargs)
    expedite(model, alpha=case.alpha, clusters=case.clusters)
    with pytest.raises(ValueError, match="forward of a WindowAttention was replaced before"):
        case.run(model, case.images())


def test_a_block_that_calls_super_is_refused_in_a_sentence() -> None:
    case = SWINS["official swin"]
    model = case.make()
    block = model.layers[2].blocks[-1]

    class Traced(type(block)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(*args, **kwargs)

    block.__class__ = Traced
    case.run(model, case.images())
    expedite(model, alpha=case.alpha, clusters=case.clusters)
    with pytest.raises(ValueError, match=r"forward of a Traced calls super\(\), and cannot run on"):
        case.run(model, case.images())

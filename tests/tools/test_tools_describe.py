"""What `describe` says of encoders, third-party and our own."""

from __future__ import annotations

from typing import Any

import official_shaped
import pytest
import torch
from family_cases import CASES
from family_cases.case import Case
from family_cases.plain import timm_vit, transformers_vit
from settings_cases import clustered
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock
from torch import nn

from expedite_d2 import expedite, restore
from expedite_d2.d2.modeling.backbone.swin import ExpeditedSwinTransformer
from expedite_d2.tools import count_multiply_adds, describe


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_describe_lists_tokens_and_costs_by_block(case: Case) -> None:
    model = case.make()
    plain = describe(model, case.size)
    assert plain.reduction is None and plain.size == case.size
    assert all(b.tokens == b.reduced_tokens and b.multiply_adds > 0 for b in plain.blocks)
    assert (
        plain.multiply_adds
        == plain.reduced_multiply_adds
        > sum(block.multiply_adds for block in plain.blocks)
    )
    expedite(nn.Sequential(model), alpha=case.alpha, clusters=case.clusters)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    found = describe(nn.ModuleList([model]), case.size)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert found.reduction == model.reduction and found.multiply_adds == plain.multiply_adds
    span = vars(model)["_hourglass"].span
    for number, (block, same) in enumerate(zip(found.blocks, plain.blocks, strict=True)):
        assert (block.name, block.tokens) == (same.name, same.tokens)
        if number in span:
            assert block.reduced_tokens < block.tokens
        else:
            assert block.reduced_tokens == block.tokens
    with torch.no_grad():
        counted = count_multiply_adds(model, case.images()[:1], call=lambda x: case.run(model, x))
    assert found.reduced_multiply_adds == counted.total()
    text = str(found)
    assert "Cluster(at=" in text and f"{case.size[0]}x{case.size[1]}" in text
    assert len(text.splitlines()) == 4 + len(found.blocks) + len(found.notes)


@pytest.mark.parametrize("block", [ParallelScalingBlock, ParallelThingsBlock])
def test_describe_knows_blocks_without_an_attention_of_their_own(block: Any) -> None:
    found = describe(expedite(timm_vit(block_fn=block), size=(64, 64)), (64, 64))
    assert found.share < 0.95 and not found.notes


@pytest.mark.parametrize("size", [(2, 2), (20, 20), (10**7, 10**7)], ids=str)
def test_sizes_that_the_encoder_does_not_take_are_told(size: tuple[int, int]) -> None:
    model = timm_vit(dynamic_img_size=False)
    for call in (describe, lambda model, size: expedite(model, size=size)):
        with pytest.raises(ValueError, match="size must be one that VisionTransformer takes, got"):
            call(model, size)


def test_a_quantized_model_is_refused() -> None:
    model = timm_vit()
    for block in model.blocks:
        block.attn, block.mlp = nn.Identity(), nn.Identity()  # quantized layers are no nn.Linear
    with pytest.raises(ValueError, match="must hold layers torch.nn.Linear, .* it is quantized"):
        expedite(model)


def test_describe_knows_our_own_swin() -> None:
    model = ExpeditedSwinTransformer(
        embed_dim=16, depths=(1, 1, 4, 1), num_heads=(1, 2, 4, 8), window_size=6
    ).eval()
    plain = describe(model, (192, 192))
    model.reduction = clustered(3, (4, 4))
    found = describe(model, (192, 192))
    assert [b.tokens for b in found.blocks] == [2304, 576, 144, 144, 144, 144, 36]
    assert [b.reduced_tokens for b in found.blocks] == [2304, 576, 144, 64, 64, 64, 36]
    assert found.multiply_adds == plain.multiply_adds > found.reduced_multiply_adds
    assert model.reduction == clustered(3, (4, 4))


class FreezingSwin(official_shaped.SwinTransformer):
    """Keeps its own `train`, which returns nothing, as official ones do."""

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


def test_describe_knows_encoders_that_train_in_their_own_way() -> None:
    found = describe(FreezingSwin(), (192, 192))
    assert found.blocks == describe(official_shaped.SwinTransformer(), (192, 192)).blocks


def test_describe_takes_the_size_that_the_encoder_was_made_for() -> None:
    assert describe(CASES["timm vit"].make()).size == (24, 24)
    assert describe(CASES["transformers vit"].make()).size == (24, 24)
    assert describe(CASES["official swin"].make()).size == (512, 512)


@pytest.mark.parametrize(
    ("model", "size", "message"),
    [
        (nn.Linear(2, 2), None, "Linear holds no encoder"),
        ("vit", None, "model must be a torch.nn.Module, got str"),
        (CASES["timm vit"].make(), (0, 24), r"size must be two numbers of pixels, got \(0, 24\)"),
        (CASES["timm vit"].make(), 24, "size must be two numbers of pixels, got 24"),
    ],
)
def test_describe_refuses(model: Any, size: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        describe(model, size)


def test_describe_of_a_restored_model_is_that_of_the_plain_one() -> None:
    model = CASES["timm vit"].make()
    plain = describe(model)
    restored = restore(expedite(model, alpha=1, clusters=(3, 3)))
    assert describe(restored) == plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_describe_takes_models_of_any_type(dtype: torch.dtype) -> None:
    model = CASES["timm vit"].make()
    expected = describe(model).multiply_adds
    assert describe(model.to(dtype)).multiply_adds == expected


def test_describe_tells_that_the_plain_model_is_eager() -> None:
    fused, eager = transformers_vit(), transformers_vit(attn_implementation="eager")
    assert describe(fused).notes == ()
    first, second = describe(eager).notes
    assert "writes out its matrix" in first and "attn_implementation='sdpa'" in second
    assert str(describe(eager)).endswith(f"note: {second}")
    assert len(describe(CASES["segment_anything"].make()).notes) == 1  # it knows no other

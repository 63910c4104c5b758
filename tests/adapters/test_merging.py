"""Merging and grouped attention in third-party encoders, against a pass composed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_cases import CASES
from family_cases.case import Case
from family_cases.plain import timm_beit, timm_vit
from torch import Tensor, nn

from expedite_d2 import expedite, restore
from expedite_d2.reducers import Merge, Points, Reduction, State

KINDS = ["timm vit", "timm vit, registers and pre-norm", "timm vit, distilled"]
KINDS += ["transformers vit", "transformers dpt", "transformers dinov2, registers"]
KINDS += ["transformers clip", "torchvision vit", "transformers yolos"]
kinds = pytest.mark.parametrize("case", [CASES[name] for name in KINDS], ids=KINDS)


def parts(block: Any) -> tuple[Any, Any, Any]:
    """A block's norm, its attention, and what follows the attention."""

    def part(*names: str) -> Any:
        return next((getattr(block, name) for name in names if hasattr(block, name)), None)

    attend = part("attn", "attention", "self_attn", "self_attention")
    norm = part("norm1", "layernorm_before", "layer_norm1", "ln_1")
    second = part("norm2", "layernorm_after", "layer_norm2", "ln_2")
    scale = part("ls1", "layer_scale1") or nn.Identity()
    last = part("ls2", "layer_scale2") or nn.Identity()
    mlp = part("mlp") or nn.Sequential(block.intermediate, block.output.dense)

    def attention(x: Tensor) -> Tensor:
        out = attend(x, x, x) if isinstance(attend, nn.MultiheadAttention) else attend(x)
        return scale(out if isinstance(out, Tensor) else out[0])

    return norm, attention, lambda x: x + last(mlp(second(x)))


def grouped_block(case: Case, model: Any, number: int, x: Tensor, state: State) -> Tensor:
    """One block whose attention sees the means of the groups, one image after another."""
    norm, attention, rest = parts(case.blocks(model)[number])
    assert isinstance(state.layout, Points) and state.layout.groups
    places, count = state.layout.groups
    p, end, images = case.prefixes, x.shape[1] - case.suffixes, []
    for image, groups in zip(x, places.tolist(), strict=True):
        members = [[i] for i in range(p)]
        members += [[p + i for i, g in enumerate(groups) if g == k] for k in range(count)]
        members += [[i] for i in range(end, x.shape[1])]
        means = torch.stack([image[who].mean(0) for who in members])
        given = attention(norm(means[None]))[0]
        gained = torch.empty_like(image)
        for group, who in enumerate(members):
            gained[who] = given[group]
        images.append(rest(image + gained))
    return torch.stack(images)


def shares(state: State) -> Tensor | None:
    """(B, n, H * W): the share of each of the image's tokens in each merged one; None before."""
    if not state.steps:
        return None
    rows, columns = state.grid
    images = []
    for image in range(len(state.steps[0].places)):  # type: ignore[attr-defined]
        members = [[i] for i in range(rows * columns)]
        for step in state.steps:
            places = step.places[image].tolist()  # type: ignore[attr-defined]
            merged: list[list[int]] = [[] for _ in range(max(places) + 1)]
            for who, place in zip(members, places, strict=True):
                merged[place] += who
            members = merged
        share = torch.zeros(len(members), rows * columns)
        for place, who in enumerate(members):
            share[place, who] = 1 / len(who)
        images.append(share)
    return torch.stack(images)


@torch.no_grad()
def by_hand(case: Case, model: Any, x: Tensor, reduction: Reduction) -> list[Tensor]:
    """Outputs of all blocks, reconstructed."""
    tokens, outputs = case.embed(model, x), []
    state = State.of_image(*case.grid)
    for number in range(len(case.blocks(model))):
        first, rest, last = case.split(tokens)
        rest = rest if state.steps else rest.unflatten(1, case.grid)
        rest, state = reduction.enter(rest, state, number, None)
        tokens = torch.cat([first, rest.flatten(1, -2), last], 1)
        if isinstance(state.layout, Points) and state.layout.groups:
            tokens = grouped_block(case, model, number, tokens, state)
        else:
            tokens = case.block(model, number, tokens, None)
        first, rest, last = case.split(tokens)
        full = state.reconstruct(rest) if state.steps else rest
        outputs.append(torch.cat([first, full, last], 1))
        tokens = case.between(model, number, tokens, shares(state))
    return outputs


@kinds
@pytest.mark.parametrize(
    "reduction",
    [
        Reduction(Merge((1, 3), 0.7)),
        Reduction(Merge((0, 2), 0.8), "replace"),
        Reduction(Merge((1, 2), 0.8, rounds=2)),
        Reduction((Merge(0, 0.8), Merge(2, 0.9, rounds=1))),
        Reduction((Merge(0, 0.8, rounds=1), Merge(2, 0.9))),
    ],
    ids=["merging", "replace", "grouped", "grouped late", "grouped early"],
)
def test_expedite_equals_hand_composition(case: Case, reduction: Reduction) -> None:
    model, x = case.make(), case.images()
    expected = by_hand(case, model, x, reduction)
    expedite(model, reduction)
    seen: list[Tensor] = []
    for block in case.blocks(model):
        block.register_forward_hook(lambda _, args, out: seen.append(out))
    with torch.no_grad():
        case.run(model, x)
    for ours, theirs in zip(seen, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_grouped_attention_runs_on_the_groups() -> None:
    model = timm_vit()
    expedite(model, Reduction(Merge(1, 0.8, rounds=2)))
    rows: list[int] = []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda _, args, out: rows.append(args[0].shape[1]))
    with torch.no_grad():
        model(torch.randn(1, 3, 40, 40))
    # 100 tokens; 80 are kept; groups 80 - 39 = 41 and 41 - 19 = 22; and the class token.
    assert rows == [101, 23, 23, 23]
    restore(model)
    rows.clear()
    with torch.no_grad():
        model(torch.randn(1, 3, 40, 40))
    assert rows == [101] * 4


def test_encoders_that_cannot_merge_or_group_say_why() -> None:
    for case in ("official swin", "detectron2 vit", "timm beit, own bias"):
        with pytest.raises(ValueError, match="takes a Cluster alone, got Merge: its relative posi"):
            expedite(CASES[case].make(), Reduction(Merge(1, 0.8)))
    from timm.models.vision_transformer import ParallelScalingBlock

    parallel = timm_vit(block_fn=ParallelScalingBlock)
    with pytest.raises(ValueError, match="rounds must be 0 for timm VisionTransformer: block 1"):
        expedite(parallel, Reduction(Merge(1, 0.8, rounds=1)))
    expedite(parallel, Reduction(Merge(1, 0.8)))
    with pytest.raises(ValueError, match="keep must leave fewer than the 36 tokens that reach"):
        expedite(timm_vit(), Reduction(Merge(1, 0.99)))
    with pytest.raises(ValueError, match=r"reduction must be a Reduction, such as .*got Merge\("):
        expedite(timm_vit(), Merge(1, 0.8))  # type: ignore[arg-type]
    assert not hasattr(timm_beit(), "reduction")

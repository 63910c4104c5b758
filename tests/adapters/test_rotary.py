"""Rotary positions of clusters, merged tokens and groups, and the models that have them."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
import transformers
from family_cases import CASES
from family_cases.case import Case, images, randomised
from family_cases.plain import CONFIG, timm_naflex
from family_cases.rotary import EomtCase, eomt, timm_eva, transformers_dinov3
from settings_cases import clustered
from torch import Tensor, nn

from expedite_d2 import expedite, restore
from expedite_d2.adapters.override import first_of
from expedite_d2.reducers import Merge, Reduction, state_of
from expedite_d2.tools.budget import choose
from expedite_d2.tools.describe import describe

Grid = tuple[int, int]
CELLS: Grid = (4, 3)
KINDS = ["transformers dinov3", "dinov3", "timm eva02", "timm eva, dinov3", "timm eva, mixed"]
KINDS += ["timm naflexvit, rotary"]
kinds = pytest.mark.parametrize("case", [CASES[name] for name in KINDS], ids=KINDS)


# ---- clusters --------------------------------------------------------------------------------


def dinov3_angle(place: tuple[float, float], grid: Grid, number: int) -> float:
    """Half of the angles are of the row, half of the column, each -1 ... 1 across the image."""
    axis, band = divmod(number, 2)
    share = (place[axis] + 0.5) / grid[axis]
    return 2 * math.pi * (2 * share - 1) / 100 ** (band / 2)


def eva02_angle(place: tuple[float, float], grid: Grid, number: int) -> float:
    """As before, and in rows and columns of the 6x6 tokens of pre-training."""
    axis, band = divmod(number, 2)
    return place[axis] / grid[axis] * 6 / 10000 ** (band / 2)


def turned(vector: Tensor, angles: list[float], pairs: list[tuple[int, int]]) -> Tensor:
    """A vector after rotation matrices in its planes."""
    matrix = torch.eye(len(vector))
    for angle, (i, j) in zip(angles, pairs, strict=True):
        matrix[i, i] = matrix[j, j] = math.cos(angle)
        matrix[i, j], matrix[j, i] = -math.sin(angle), math.sin(angle)
    return matrix @ vector


def qkv_of(attention: Any, x: Tensor) -> list[Tensor]:
    """Queries, keys and values, (N, heads, d) each."""
    if hasattr(attention, "qkv"):
        bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        parts = (x @ attention.qkv.weight.T + bias).chunk(3, -1)
    else:
        parts = tuple(p(x) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    return [part.unflatten(-1, (2, 8)) for part in parts]


@pytest.mark.parametrize(
    ("name", "angle", "pairs"),
    [
        ("transformers dinov3", dinov3_angle, [(i, i + 4) for i in range(4)]),
        ("timm eva02", eva02_angle, [(2 * i, 2 * i + 1) for i in range(4)]),
    ],
)
@torch.no_grad()
def test_attention_among_clusters_pair_by_pair(name: str, angle: Any, pairs: Any) -> None:
    case = CASES[name]
    model, x = expedite(case.make(), clustered(1, CELLS)), case.images()[:1]
    block: Any = case.blocks(model)[2]
    attention = getattr(block, "attention", None) or block.attn
    project = attention.o_proj if hasattr(attention, "o_proj") else attention.proj
    seen: list[tuple[Tensor, Tensor]] = []
    block.norm1.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    outputs: list[Tensor] = []
    attention.register_forward_hook(lambda _, args, out: outputs.append(first_of(out)))
    case.run(model, x)
    query, key, value = qkv_of(attention, seen[0][1][0])

    (rows, columns), (h, w) = case.grid, CELLS
    places: list[Any] = [None] * case.prefixes
    for y, x_ in itertools.product(range(h), range(w)):
        places.append(((y + 0.5) * rows / h - 0.5, (x_ + 0.5) * columns / w - 0.5))
    assert len(places) == len(query)

    def rotated(vector: Tensor, place: Any) -> Tensor:
        if place is None:
            return vector
        return turned(vector, [angle(place, case.grid, i) for i in range(4)], pairs)

    expected = torch.zeros(len(places), 2, 8)
    for i, head in itertools.product(range(len(places)), range(2)):
        mine = rotated(query[i, head], places[i])
        logits = [
            float(mine @ rotated(key[j, head], place)) / math.sqrt(8)
            for j, place in enumerate(places)
        ]
        for j, weight in enumerate(torch.tensor(logits).softmax(0)):
            expected[i, head] += weight * value[j, head]
    found = outputs[0][0]
    torch.testing.assert_close(found, project(expected.flatten(1)), rtol=1e-4, atol=1e-4)


def tables(case: Case, model: Any, x: Any) -> list[Any]:
    """The rotations that each block's attention is given."""
    seen: list[Any] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["rope"] if "rope" in kwargs else kwargs["position_embeddings"])

    hooks = [
        (getattr(block, "attention", None) or block.attn).register_forward_pre_hook(
            note, with_kwargs=True
        )
        for block in case.blocks(model)
    ]
    with torch.no_grad():
        case.run(model, x)
    for hook in hooks:
        hook.remove()
    return seen


def joined(table: Any) -> Tensor:
    return table if isinstance(table, Tensor) else torch.cat(table, -1)


def test_in_training_clusters_have_the_coordinates_drawn_for_their_pass() -> None:
    model: Any = transformers_dinov3(
        pos_embed_shift=0.3, pos_embed_jitter=1.5, pos_embed_rescale=2.0
    ).train()
    # At three times the scale, tokens are less than half a turn apart on more than 12 rows.
    case, x = CASES["transformers dinov3"], images(56, 64)
    expedite(model, clustered(1, CELLS))
    torch.manual_seed(5)
    full, *cells = tables(case, model, x)
    torch.manual_seed(5)
    assert torch.equal(joined(full), joined(model.rope_embeddings(x)))
    torch.manual_seed(5)  # which draws the same shift and scales for any number of patches
    expected = joined(model.rope_embeddings(images(16, 12)))
    for table in cells:
        torch.testing.assert_close(joined(table), expected, rtol=1e-5, atol=1e-5)


def test_half_types_keep_the_type_of_the_table() -> None:
    case = CASES["transformers dinov3"]
    model = expedite(case.make().bfloat16(), clustered(1, CELLS))
    exact = joined(model.rope_embeddings(images(16, 12)))
    for table in tables(case, model, case.images())[1:]:
        assert all(part.dtype == torch.bfloat16 for part in table)
        torch.testing.assert_close(joined(table).float(), exact, rtol=0, atol=0.02)


# ---- merged tokens and groups ----------------------------------------------------------------


def members(model: Any, case: Case, x: Tensor, number: int) -> list[list[list[int]]]:
    """For each image and token that reaches a block: the image's tokens that it stands for."""
    outputs: list[Tensor] = []
    hook = case.blocks(model)[number].register_forward_hook(
        lambda _, args, out: outputs.append(first_of(out))
    )
    with torch.no_grad():
        case.run(model, x)
    hook.remove()
    state: Any = state_of(outputs[0])
    found = []
    for image in range(len(x)):
        stands = [[i] for i in range(case.grid[0] * case.grid[1])]
        for step in state.steps:
            places = step.places[image].tolist()
            merged: list[list[int]] = [[] for _ in range(max(places) + 1)]
            for place, who in zip(places, stands, strict=True):
                merged[place] += who
            stands = merged
        if state.layout.groups is not None:
            places = state.layout.groups.places[image, case.prefixes :].tolist()
            groups: list[list[Any]] = [[] for _ in set(places)]
            for place, who in zip(places, stands, strict=True):
                groups[place - case.prefixes].append(who)
            stands = groups
        found.append(stands)
    return found


@kinds
@pytest.mark.parametrize("rounds", [0, 1], ids=["merged", "grouped"])
@torch.no_grad()
def test_merged_tokens_have_the_mean_rotation_of_all_they_stand_for(
    case: Case, rounds: int
) -> None:
    model, x = case.make(), case.images()[:2]
    plain = [joined(table) for table in tables(case, model, x)]
    expedite(model, Reduction(Merge((1, 2), 0.7, rounds)))
    found = [joined(table) for table in tables(case, model, x)]
    assert torch.equal(found[0], plain[0])
    for number in (1, 3):
        stands = members(model, case, x, number)
        for image, whom in enumerate(stands):
            expected = []
            for who in whom:
                each = [[i] for i in who] if rounds == 0 else who
                means = [plain[number][..., m, :].mean(-2) for m in ([who] if not rounds else each)]
                expected.append(torch.stack(means).mean(0))
            row = torch.stack(expected, -2)
            ours = found[number][image]
            torch.testing.assert_close(ours, row.expand_as(ours), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_logits_of_a_merged_key_are_the_means_of_its_members() -> None:
    case = CASES["transformers dinov3"]
    model, x = case.make(), case.images()[:1]
    cos, sin = tables(case, model, x)[0]
    expedite(model, Reduction(Merge((1, 2), 0.7)))
    merged_cos, merged_sin = tables(case, model, x)[3]
    query, key = torch.randn(2, 8)

    def rotated(v: Tensor, c: Tensor, s: Tensor) -> Tensor:
        return v * c + torch.cat([-v[4:], v[:4]]) * s

    for place, who in enumerate(members(model, case, x, 3)[0]):
        logit = query @ rotated(key, merged_cos[0, 0, place], merged_sin[0, 0, place])
        theirs = [float(query @ rotated(key, cos[i], sin[i])) for i in who]
        assert float(logit) == pytest.approx(sum(theirs) / len(theirs), abs=1e-5)


def test_one_table_serves_all_blocks_of_a_layout() -> None:
    for name in ("transformers dinov3", "timm eva02"):
        case = CASES[name]
        for reduction in (clustered(1, CELLS), Reduction(Merge((1, 3), 0.7))):
            seen = tables(case, expedite(case.make(), reduction), case.images())
            assert seen[1] is seen[2] and seen[0] is not seen[1]
            assert (seen[3] is seen[2]) == (len(reduction.steps) == 1)


# ---- DINOv3's own class ----------------------------------------------------------------------


@torch.no_grad()
def test_lists_of_tensors_are_reduced_one_by_one() -> None:
    case = CASES["dinov3"]
    model = expedite(case.make(), clustered(1, CELLS))
    crops = [images(32, 40, batch=2), images(24, 24, batch=3)]
    together = model.forward_features(crops)
    for features, crop in zip(together, crops, strict=True):
        assert torch.equal(features["x_prenorm"], model.forward_features(crop)["x_prenorm"])
    by_hand = case.by_hand(restore(copy.deepcopy(model)), case.images(), clustered(1, CELLS))
    for ours, number in zip(
        model.get_intermediate_layers(case.images(), [0, 2]), [0, 2], strict=True
    ):
        theirs = model.norm(by_hand[number])[:, 3:]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# ---- models for tasks ------------------------------------------------------------------------


def chmv2() -> Any:
    backbone = transformers.DINOv3ViTConfig(
        **CONFIG, num_register_tokens=2, out_indices=[1, 2, 3, 4], return_class_token=True,
        reshape_hidden_states=True,
    )  # fmt: skip
    config = transformers.CHMv2Config(
        backbone_config=backbone, patch_size=4, post_process_channels=[8] * 4,
        fusion_hidden_size=8, head_hidden_size=8, number_output_channels=8,
    )  # fmt: skip
    return randomised(transformers.CHMv2ForDepthEstimation, config)


@pytest.mark.parametrize("size", [(32, 32), (40, 64)], ids=str)
@pytest.mark.parametrize(
    "reduction",
    [clustered(1, (3, 4)), Reduction(Merge((1, 2), 0.7)), Reduction(Merge(1, 0.8, rounds=2))],
    ids=["cluster", "merge", "grouped"],
)
@torch.no_grad()
def test_depth_head_on_dinov3_reads_full_maps(size: Grid, reduction: Reduction) -> None:
    model, x = chmv2(), images(*size, batch=2)
    plain = model(x).predicted_depth
    depth = expedite(model, reduction)(x).predicted_depth
    assert depth.shape == plain.shape and depth.isfinite().all() and not torch.equal(depth, plain)
    assert torch.equal(restore(model)(x).predicted_depth, plain)


class BeforeQueries(EomtCase):
    """The layers that queries have not joined yet."""

    def blocks(self, model: Any) -> list[nn.Module]:
        return list(model.layers)[:-1]

    def embed(self, model: Any, x: Tensor) -> Tensor:
        return model.embeddings(x)

    def block(self, model: Any, number: int, x: Tensor, cells: Grid | None) -> Tensor:
        if not hasattr(model, "rope_embeddings"):
            return model.layers[number](x)
        rows, columns = cells or self.grid
        table = model.rope_embeddings(x.new_empty(1, 3, rows * self.patch, columns * self.patch))
        return model.layers[number](x, position_embeddings=table)


@pytest.mark.parametrize("name", ["eomt", "eomt dinov3", "videomt"])
@torch.no_grad()
def test_queries_join_all_tokens(name: str) -> None:
    case = CASES[f"transformers {name}"]
    model, x, reduction = case.make(), case.images(), clustered(1, CELLS)
    plain = case.run(model, x)
    before = BeforeQueries(case.make)
    tokens = before.by_hand(model, x, reduction)[-1]
    tokens = torch.cat([model.query.weight.expand(3, -1, -1), tokens], 1)
    expected = model.predict(model.layernorm(before.block(model, 3, tokens, None)))[0]
    found = case.run(expedite(model, reduction), x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(case.run(restore(model), x), plain) and not torch.equal(found, plain)


@torch.no_grad()
def test_eomt_with_masks_of_its_queries() -> None:
    case = CASES["transformers eomt dinov3"]
    model, x = case.make(), case.images()
    without = case.run(model, x)
    model.attn_mask_probs.fill_(1)
    masked = case.run(model, x)
    found = case.run(expedite(model, clustered(1, CELLS)), x)
    assert not torch.equal(masked, without)
    assert found.isfinite().all() and not torch.equal(found, masked)


# ---- what is refused -------------------------------------------------------------------------


def test_what_rotary_encoders_refuse() -> None:
    x = images(32, 40)
    with pytest.raises(ValueError, match="alpha must be less than 3 for Eomt.*, got 3"):
        expedite(eomt("Eomt", mlp_ratio=2), clustered(3, CELLS))
    with pytest.raises(ValueError, match="steps must stand before blocks 1 to 2 of EomtFor"):
        expedite(eomt("Eomt", mlp_ratio=2), Reduction(Merge((1, 3), 0.7)))
    for make, name in ((timm_eva, "Eva"), (timm_naflex, "NaFlexVit")):
        dropping = expedite(make(patch_drop_rate=0.3), clustered(1, CELLS))
        dropping(x)
        with pytest.raises(ValueError, match=f"an expedited {name} drops no patches"):
            dropping.train()(x)
    case = CASES["dinov3"]
    grouped = expedite(case.make(), Reduction(Merge(1, 0.7, rounds=1)))
    for block in grouped.blocks:
        block.sample_drop_ratio = 0.1
    case.run(grouped, x)
    with pytest.raises(ValueError, match="with drop_path_rate=0 alone, got 0.1"):
        case.run(grouped.train(), x)
    masked = expedite(transformers_dinov3(), clustered(1, CELLS))
    with pytest.raises(ValueError, match="takes no attention mask with an effect"):
        masked(x, attention_mask=torch.arange(83.0).expand(1, 1, 83, 83))


def test_budgets_count_eomt_without_masks() -> None:
    model = eomt("EomtDinov3", num_hidden_layers=6)
    model.attn_mask_probs.fill_(1)  # which nothing asks for where there are no values
    reduction = choose(model, 0.6)
    assert reduction.steps[-1].at < 5
    description = describe(expedite(model, reduction))
    assert description.share < 0.6
    tokens = [block.reduced_tokens for block in description.blocks]
    assert tokens[-1] == 72 and all(count < 60 for count in tokens[:-1])

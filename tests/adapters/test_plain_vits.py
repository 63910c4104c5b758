"""Models on plain ViTs of several libraries: what their heads read, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from family_cases import CASES
from family_cases.case import images, randomised
from family_cases.plain import CONFIG, timm_naflex, transformers_dinov2, vitpose, yolos
from official_shaped import DinoVisionTransformer
from settings_cases import clustered
from torch import Tensor, nn

from expedite_d2 import expedite, restore
from expedite_d2.reducers import Cluster, Merge, Reduction, clustering_of, reconstruct

SETTINGS = [clustered(1, (3, 4)), Reduction(Merge((1, 2), 0.7)), Reduction(Merge(1, 0.8, rounds=2))]
settings = pytest.mark.parametrize("reduction", SETTINGS, ids=["cluster", "merge", "grouped"])
NECK: dict[str, Any] = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8}
BACKBONE = {**CONFIG, "mlp_ratio": 2, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False}


def depth_anything() -> Any:
    config = transformers.DepthAnythingConfig(
        backbone_config=transformers.Dinov2Config(**BACKBONE),
        patch_size=4, reassemble_hidden_size=16, head_hidden_size=8, **NECK,
    )  # fmt: skip
    return randomised(transformers.DepthAnythingForDepthEstimation, config)


def dpt() -> Any:
    config = transformers.DPTConfig(backbone_config=transformers.Dinov2Config(**BACKBONE), **NECK)
    return randomised(transformers.DPTForDepthEstimation, config)


def tokens_in_blocks(blocks: list[Any]) -> list[list[int]]:
    """Tokens that each block's attention and MLP are given, filled in by a pass."""
    seen: list[list[int]] = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[-1].append(args[0].shape[1])

    for block in blocks:
        block.norm1.register_forward_pre_hook(lambda module, args: seen.append([]))
        block.attention.register_forward_hook(lambda module, args, out: note(module, args))
        block.mlp.register_forward_pre_hook(note)
    return seen


@pytest.mark.parametrize("make", [depth_anything, dpt])
@pytest.mark.parametrize("size", [(32, 32), (28, 48)], ids=str)
@settings
def test_depth_heads_read_full_maps_of_reduced_blocks(
    make: Any, size: tuple[int, int], reduction: Reduction
) -> None:
    model, x = make(), images(*size, batch=2)
    with torch.no_grad():
        plain = model(x).predicted_depth
        expedite(model, reduction)
        seen = tokens_in_blocks(list(model.backbone.encoder.layer))
        depth = model(x).predicted_depth
        restored = restore(model)(x).predicted_depth
    assert depth.shape == plain.shape and depth.isfinite().all() and not torch.equal(depth, plain)
    assert torch.equal(restored, plain)
    tokens = size[0] * size[1] // 16
    assert seen[0] == [1 + tokens] * 2
    for attention, mlp in seen[1:4]:
        assert mlp < 0.85 * tokens and attention <= mlp
        grouped = isinstance(reduction.steps[0], Merge) and reduction.steps[0].rounds
        assert attention < 0.4 * mlp if grouped else attention == mlp


@pytest.mark.parametrize("registers", [False, True], ids=["plain", "registers"])
def test_backbone_gives_the_maps_of_its_blocks_run_by_hand(registers: bool) -> None:
    name = "Dinov2WithRegistersBackbone" if registers else "Dinov2Backbone"
    changes = {"out_indices": [0, 1, 3, 4], **({"num_register_tokens": 2} if registers else {})}
    case = CASES["transformers dinov2, registers" if registers else "transformers dinov2"]
    model, x = transformers_dinov2(name, **changes), case.images()
    reduction = clustered(2, (4, 3))
    blocks = case.by_hand(model, x, reduction)
    with torch.no_grad():
        tokens = [case.embed(model, x), blocks[0], blocks[2], blocks[3]]
        expected = [model.layernorm(t)[:, case.prefixes :] for t in tokens]
        found = expedite(model, reduction)(x).feature_maps
    assert len(found) == 4
    for ours, theirs in zip(found, expected, strict=True):
        theirs = theirs.unflatten(1, case.grid).permute(0, 3, 1, 2)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunks", [0, 2])
def test_dinov2_gives_full_maps_of_several_blocks(chunks: int) -> None:
    case = CASES["dinov2"]
    model, x = randomised(DinoVisionTransformer, block_chunks=chunks), case.images()
    reduction = clustered(1, (4, 3))
    expected = case.by_hand(model, x, reduction)
    with torch.no_grad():
        found = expedite(model, reduction).get_intermediate_layers(x, [0, 1, 3])
        for ours, number in zip(found, [0, 1, 3], strict=True):
            theirs = model.norm(expected[number])[:, 1:]
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        masks = torch.zeros(3, 80, dtype=torch.bool)
        masks[:, :7] = True
        features = model(x, masks, is_training=True)
    assert features["x_norm_patchtokens"].shape == (3, 80, 16)


def test_vitpose_experts_are_chosen_for_each_image() -> None:
    model = vitpose(num_experts=2, part_features=4)
    x, chosen = images(64, 80, batch=2), torch.tensor([0, 1])
    with torch.no_grad():
        plain = model(x, dataset_index=chosen).feature_maps[0]
        expedite(model, alpha=2, clusters=(4, 5))
        both = model(x, dataset_index=chosen).feature_maps[0]
        assert both.shape == plain.shape and not torch.equal(both, plain)
        for i in range(2):
            single = model(x[i : i + 1], dataset_index=chosen[i : i + 1]).feature_maps[0]
            torch.testing.assert_close(both[i : i + 1], single, rtol=1e-4, atol=1e-4)
        others = model(x, dataset_index=1 - chosen).feature_maps[0]
        assert not torch.equal(others, both)


@pytest.mark.parametrize("between", [True, False], ids=["positions between", "none"])
@settings
def test_detectors_read_tokens_behind_reduced_patches(between: bool, reduction: Reduction) -> None:
    model = yolos("YolosForObjectDetection", None, use_mid_position_embeddings=between)
    x, seen = images(32, 40, batch=2), []
    model.vit.encoder.layer[3].register_forward_hook(lambda _, args, out: seen.append(out))
    with torch.no_grad():
        plain = model(x)
        full = expedite(model, reduction)(x)
        low = expedite(model, reduction, outputs=())(x)
    assert full.last_hidden_state.shape == plain.last_hidden_state.shape == (2, 1 + 80 + 5, 16)
    assert not torch.equal(full.logits, plain.logits)
    assert torch.equal(low.logits, full.logits) and torch.equal(low.pred_boxes, full.pred_boxes)
    assert low.last_hidden_state.shape[1] < 1 + 70 + 5
    if isinstance(reduction.steps[0], Cluster):
        (clusters, clustering), (same, _) = map(clustering_of, seen[1:])  # type: ignore[misc]
        assert clusters.shape == (2, 3, 4, 16) and torch.equal(clusters, same)
        assert torch.equal(reconstruct(clusters, clustering).flatten(1, 2), seen[1][:, 1:-5])


def test_the_vision_encoder_of_clip_is_found() -> None:
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
    text |= {"num_attention_heads": 2}
    config = transformers.CLIPConfig(text_config=text, vision_config=CONFIG, projection_dim=4)
    model, x = randomised(transformers.CLIPModel, config), images(24, 24)
    expedite(model, alpha=1, clusters=(3, 3))
    assert model.vision_model.reduction == clustered(1, (3, 3))
    with torch.no_grad():
        assert model.get_image_features(x).pooler_output.shape == (3, 4)


# ---- what is refused --------------------------------------------------------------------------


def test_naflexvit_takes_images_alone() -> None:
    model = expedite(timm_naflex(), alpha=1, clusters=(3, 3))
    places = torch.cartesian_prod(torch.arange(6), torch.arange(6))[None]
    valid = torch.ones(1, 36, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"takes images \(B, 3, H, W\), got patches"):
        model(torch.randn(1, 36, 48), patch_coord=places, patch_valid=valid)

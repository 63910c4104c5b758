"""Windowed ViTs of maps: slow loops over pairs of cells, one model in three libraries, use."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from family_cases.case import images, randomised
from family_cases.decomposed import sam, sam_3, segment_anything, timm_sam, vitdet, with_positions
from official_shaped import Detectron2ViT
from settings_cases import clustered
from torch import Tensor, nn
from transformers import (
    Sam3VisionConfig,
    Sam3VisionModel,
    SamConfig,
    SamModel,
    VitMatteConfig,
    VitMatteForImageMatting,
)
from transformers.models.sam_hq.configuration_sam_hq import SamHQConfig
from transformers.models.sam_hq.modeling_sam_hq import SamHQModel
from transformers.models.vitdet.modeling_vitdet import VitDetBackbone
from windows_by_hand import in_windows, slow_attention

from expedite_d2.adapters import expedite, restore
from expedite_d2.adapters.decomposed import attend
from expedite_d2.reducers import Reduction, clustering_of, reconstruct, reduce
from expedite_d2.tools import describe
from expedite_d2.tools.calibrate import calibrate, distance

WINDOW = 6

# ---- by hand ------------------------------------------------------------------------------------


def sam_attention(
    layer: Any, x: Tensor, tokens: tuple[int, int], steps: tuple[float, float], unit: float
) -> Tensor:
    return slow_attention(layer.attn, layer.attn.num_attention_heads, x, tokens, steps)


def sam_3_attention(
    layer: Any, x: Tensor, tokens: tuple[int, int], steps: tuple[float, float], unit: float
) -> Tensor:
    """Each pair of channels is a complex number, turned by where its cell has its centre.

    The first half of the pairs tells the column, the second half the row, in units.
    """
    attn, (rows, columns, channels) = layer.attention, x.shape[1:]
    heads = attn.num_attention_heads
    quarter = channels // heads // 4
    speeds = [10_000 ** (-i / quarter) for i in range(quarter)]
    turned = x.new_empty(rows, columns, 2 * quarter, dtype=torch.complex128)
    for row, column in itertools.product(range(rows), range(columns)):
        at_row, at_column = ((i + 0.5) * s - 0.5 for i, s in zip((row, column), steps, strict=True))
        angles = [at * unit * speed for at in (at_column, at_row) for speed in speeds]
        turned[row, column] = torch.polar(x.new_ones(2 * quarter), x.new_tensor(angles))
    q, k, v = (
        project(x).flatten(1, 2).unflatten(2, (heads, -1)).transpose(1, 2)
        for project in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    q, k = (
        torch.view_as_complex(part.unflatten(3, (-1, 2)).contiguous()) * turned.flatten(0, 1)
        for part in (q, k)
    )
    logits = (q @ k.mH).real * (channels // heads) ** -0.5
    out = (logits.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
    return attn.o_proj(out)


@torch.no_grad()
def by_hand(
    model: Any, x: Tensor, reduction: Reduction, attention: Callable[..., Tensor]
) -> Tensor:
    """The map after the last layer, (B, H, W, C)."""
    for layer in model.layers[: reduction.alpha]:
        x = layer(x)
    grid = (x.shape[1], x.shape[2])
    window = max(layer.window_size for layer in model.layers)
    low, clustering = reduce(x, reduction, (window, window) if window else None)
    side = reduction.cluster.cells(window, window)[0] if window else 0
    steps = (grid[0] / low.shape[1], grid[1] / low.shape[2])
    if window:
        steps = (window / side, window / side)
    for layer in model.layers[reduction.alpha :]:
        normed = layer.layer_norm1(low)
        if layer.window_size:
            inside = partial(attention, layer, tokens=(window, window), steps=steps, unit=1.0)
            low = low + in_windows(inside, normed, side)
        else:
            # SAM 3 counts as many steps along a whole image as along a window.
            low = low + attention(layer, normed, grid, steps, WINDOW / grid[0])
        low = low + layer.mlp(layer.layer_norm2(low))
    return reconstruct(low, clustering)


SETTINGS = [
    clustered(1, (4, 4)),
    clustered(0, (3, 3), iterations=1, mode="replace", temperature=0.1),
    clustered(2, (0.5, 0.5), neighbourhood=3, topk=2),
]
# Whole windows, ragged ones, less than one; then without windows.
KINDS: list[tuple[dict[str, Any], Reduction]] = [
    *(({"image_size": side}, reduction) for side in (48, 32, 20) for reduction in SETTINGS),
    ({"image_size": 32, "global_attn_indexes": [0, 1, 2, 3]}, clustered(1, (5, 3))),
]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("changes", "reduction"), KINDS)
def test_sam_equals_hand_composition(
    changes: dict[str, Any], reduction: Reduction, attention: str
) -> None:
    model = sam(**changes, attn_implementation=attention).double()
    x = images(changes["image_size"], changes["image_size"], batch=2).double()
    with torch.no_grad():
        tokens = model.patch_embed(x) + model.pos_embed
        expected = model.neck(by_hand(copy.deepcopy(model), tokens, reduction, sam_attention))
        out = expedite(model, reduction)(x).last_hidden_state
    # transformers' eager softmax is in float32.
    tolerance = 1e-10 if attention == "sdpa" else 1e-5
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("changes", "reduction"), KINDS)
def test_sam_3_equals_hand_composition(changes: dict[str, Any], reduction: Reduction) -> None:
    model, side = sam_3(**changes).double(), changes["image_size"]
    x = images(side, side, batch=2).double()
    with torch.no_grad():
        tokens = model.embeddings(x).unflatten(1, (side // 4, side // 4))
        tokens = model.layer_norm(tokens)
        expected = by_hand(copy.deepcopy(model), tokens, reduction, sam_3_attention).flatten(1, 2)
        out = expedite(model, reduction)(x).last_hidden_state
    # transformers rotates in float32.
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


# ---- one model in three libraries ---------------------------------------------------------------


def in_timm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("mlp.lin", "mlp.fc"): tensor for name, tensor in weights.items()}


def in_transformers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "blocks.": "layers.",
        ".norm": ".layer_norm",
        "patch_embed.proj.": "patch_embed.projection.",
        "neck.0": "neck.conv1",
        "neck.1": "neck.layer_norm1",
        "neck.2": "neck.conv2",
        "neck.3": "neck.layer_norm2",
    }
    converted = {}
    for name, tensor in weights.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        converted[name] = tensor
    return converted


@pytest.mark.parametrize("reduction", SETTINGS)
def test_one_sam_is_the_same_in_three_libraries(reduction: Reduction) -> None:
    norm = partial(nn.LayerNorm, eps=1e-6)
    official = segment_anything(norm_layer=norm).double()
    weights = official.state_dict()
    timms, theirs, eager = timm_sam(norm_layer=norm), sam(), sam(attn_implementation="eager")
    timms.load_state_dict(in_timm(weights))
    theirs.load_state_dict(in_transformers(weights))
    eager.load_state_dict(in_transformers(weights))
    others = [timms.double(), theirs.double(), eager.double()]
    x = images(32, 32).double()

    def outputs() -> list[Tensor]:
        with torch.no_grad():
            out = [official(x), *(other(x) for other in others)]
        return [part if isinstance(part, Tensor) else part.last_hidden_state for part in out]

    plain = outputs()
    for model in (official, *others):
        expedite(model, reduction)
    fast = outputs()
    assert not torch.allclose(fast[0], plain[0], rtol=1e-2, atol=1e-2)
    for expected, *rest in (plain, fast):
        for got, tolerance in zip(rest, (1e-10, 1e-10, 1e-5), strict=True):
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


# ---- fused attention ----------------------------------------------------------------------------

# The libraries whose own attention writes out its matrix, and the name of a block's attention.
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


@eager
def test_eager_libraries_are_fused_on_clusters_alone(
    make: Any, attentions: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, fused = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: calls.append(a) or fused(*a, **k)
    )
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


def test_vitdet_may_stay_on_its_clusters() -> None:
    model, x = expedite(vitdet(), alpha=1, clusters=(4, 4), outputs=()), images(32, 40)
    with torch.no_grad():
        low = model(x).last_hidden_state
        found = clustering_of(low)
        assert found is not None and low.shape == (3, 16, 6, 7)
        expected = expedite(model, alpha=1, clusters=(4, 4))(x).last_hidden_state
    assert torch.equal(reconstruct(*found).permute(0, 3, 1, 2), expected)


def test_vitdets_maps_of_detail_are_fitted() -> None:
    model, x = vitdet(), images(32, 40, batch=12)
    plain = output(model, x)
    expedite(model, alpha=1, clusters=(3, 3))
    before = distance([output(model, x)], [plain])
    found = calibrate(model, [image[None] for image in x], temperature=False)
    assert found.correction is not None
    assert distance([output(model, x)], [plain]) < 0.95 * before


# ---- whole models -------------------------------------------------------------------------------

VISION: dict[str, Any] = {
    "image_size": 32, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 4,
    "num_attention_heads": 2, "window_size": 6, "global_attn_indexes": [0, 3],
    "output_channels": 16, "num_pos_feats": 8,
}  # fmt: skip
DECODER = {"hidden_size": 16, "num_attention_heads": 2, "mlp_dim": 32, "iou_head_hidden_dim": 16}


def prompted(model: Any, config: Any, **decoder: Any) -> Any:
    prompts = {"hidden_size": 16, "image_size": 32, "patch_size": 4, "mask_input_channels": 4}
    parts = {"vision_config": VISION, "prompt_encoder_config": prompts}
    return randomised(model, config(**parts, mask_decoder_config={**DECODER, **decoder}))


def matting() -> Any:
    backbone = vitdet(VitDetBackbone, num_channels=4, out_features=["stage4"]).config
    sizes = {"convstream_hidden_sizes": [4], "fusion_hidden_sizes": [8, 8]}
    return randomised(
        VitMatteForImageMatting, VitMatteConfig(backbone_config=backbone, hidden_size=16, **sizes)
    )


def sam_3_pyramid() -> Any:
    sizes = [[32, 32], [16, 16], [8, 8]]
    config = Sam3VisionConfig(
        backbone_config=sam_3().config, fpn_hidden_size=16, backbone_feature_sizes=sizes
    )
    return randomised(Sam3VisionModel, config)


def point(model: Any) -> list[Tensor]:
    points = torch.tensor([[[[9.0, 20.0]]], [[[25.0, 3.0]]]])
    out = model(pixel_values=images(32, 32, batch=2), input_points=points)
    return [out.pred_masks, out.iou_scores]


def mattes(model: Any) -> list[Tensor]:
    x = images(32, 48, batch=2)
    return [model(pixel_values=torch.cat([x, x[:, :1]], 1)).alphas]


def pyramid(model: Any) -> list[Tensor]:
    return list(model(images(32, 32, batch=2)).fpn_hidden_states)


@pytest.mark.parametrize(
    ("make", "run"),
    [
        (lambda: prompted(SamModel, SamConfig), point),
        (lambda: prompted(SamHQModel, SamHQConfig, vit_dim=16), point),
        (matting, mattes),
        (sam_3_pyramid, pyramid),
    ],
    ids=["sam", "sam hq", "vitmatte", "sam 3"],
)
def test_whole_models_run_and_are_restored(make: Any, run: Any) -> None:
    model = make()
    with torch.no_grad():
        plain = run(model)
        expedite(model, alpha=1, clusters=(4, 4))
        assert describe(model).share < 1
        for fast, before in zip(run(model), plain, strict=True):
            assert fast.shape == before.shape and fast.isfinite().all()
            assert not torch.equal(fast, before)
        restore(model)
        assert all(map(torch.equal, run(model), plain))


def test_layers_inside_the_span_are_read_at_full_resolution() -> None:
    x = images(32, 32, batch=2)
    theirs = expedite(sam(), alpha=1, clusters=(3, 3))
    timms = expedite(timm_sam(), alpha=1, clusters=(3, 3))
    with torch.no_grad():
        states = theirs(x, output_hidden_states=True).hidden_states
        features = timms.forward_intermediates(x, intermediates_only=True)
    assert {state.shape for state in states} == {(2, 8, 8, 16)}
    assert {feature.shape for feature in features} == {(2, 16, 8, 8)}
    assert len(states) in (4, 5) and len(features) == 4


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sam, segment_anything, timm_sam, vitdet, sam_3])
def test_windows_are_square_and_smaller(make: Any) -> None:
    model = make()
    with pytest.raises(ValueError, match="as many rows as columns in the square windows of .* 4x3"):
        expedite(model, alpha=1, clusters=(4, 3))
    with pytest.raises(ValueError, match="clusters must be smaller than the 6x6 window, got 6x6"):
        expedite(model, alpha=1, clusters=(6, 6))
    assert not hasattr(model, "reduction")


def test_sam_3_takes_square_images() -> None:
    with pytest.raises(ValueError, match="image_size of Sam3ViTModel must be square, got 32x40"):
        expedite(sam_3(image_size=[32, 40]), alpha=1, clusters=(3, 3))


def test_encoders_that_only_share_a_name_are_not_known() -> None:
    class ImageEncoderViT(nn.Module):
        """As EfficientSAM's: a plain ViT."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(16, 2)])

    rotary = timm_sam(use_rel_pos=False, use_rope=True)
    for model in (ImageEncoderViT(), rotary):
        with pytest.raises(ValueError, match="holds no encoder that can be expedited"):
            expedite(model, alpha=1, clusters=(3, 3))

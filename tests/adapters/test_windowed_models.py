"""Models around windowed ViTs of maps, what they read of them, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_cases.case import images, randomised
from family_cases.decomposed import (
    sam,
    sam_3,
    segment_anything,
    timm_sam,
    vitdet,
)
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

from expedite_d2 import expedite, restore
from expedite_d2.reducers import clustering_of, reconstruct
from expedite_d2.tools import describe
from expedite_d2.tools.calibrate import calibrate, distance

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
    with torch.no_grad():
        plain = model(x).last_hidden_state
        expedite(model, alpha=1, clusters=(3, 3))
        before = distance([model(x).last_hidden_state], [plain])
        found = calibrate(model, [image[None] for image in x], temperature=False)
        assert found.correction is not None
        assert distance([model(x).last_hidden_state], [plain]) < 0.95 * before


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

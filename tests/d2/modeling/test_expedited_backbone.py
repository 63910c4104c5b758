"""The backbone that builds another one by its name and expedites it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from settings_cases import clustered
from torch import Tensor

import expedite_d2.d2.modeling  # noqa: F401 (registers the backbones)
from expedite_d2.adapters import restore
from expedite_d2.d2 import BACKBONE_REGISTRY, PROVIDER, build_backbone, build_model
from expedite_d2.d2.comparison.cost import count_gflops
from expedite_d2.d2.config import load_config
from expedite_d2.d2.modeling.backbone import ExpeditedSwinTransformer, ExpeditedViT

HERE = Path(__file__).parent
SETTINGS = ["MODEL.EXPEDITE.ALPHA", 3, "MODEL.EXPEDITE.CLUSTERS", [2, 2]]
VIT = [
    *("MODEL.VIT.EMBED_DIM", 16, "MODEL.VIT.DEPTH", 5, "MODEL.VIT.NUM_HEADS", 2),
    *("MODEL.VIT.PATCH_SIZE", 4, "MODEL.VIT.IMG_SIZE", 32),
]
DETECTRON2_VIT = [
    *VIT,
    *("MODEL.VIT.WINDOW_SIZE", 3, "MODEL.VIT.WINDOW_BLOCKS", [0, 1, 3]),
    *("MODEL.VIT.USE_REL_POS", True, "MODEL.VIT.PRETRAIN_IMG_SIZE", 16),
]


def config(name: str, *opts: Any, expedited: bool = False) -> Any:
    return load_config(
        HERE / "detector_tiny.yaml",
        [
            *("MODEL.BACKBONE.NAME", "ExpeditedBackbone", "MODEL.EXPEDITE.BACKBONE", name),
            *("MODEL.EXPEDITE.ENABLED", expedited, *SETTINGS, *opts),
        ],
    )


def build(name: str, *opts: Any, expedited: bool = False) -> Any:
    torch.manual_seed(0)
    model = build_backbone(config(name, *opts, expedited=expedited))
    model.eval()  # returns nothing in Mask2Former's Swin
    return model


def run(model: Any, height: int = 70, width: int = 102) -> dict[str, Tensor]:
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(x)


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize(
    ("name", "cls"),
    [("ExpeditedSwinTransformer", ExpeditedSwinTransformer), ("ExpeditedViT", ExpeditedViT)],
)
def test_own_backbones_are_built_as_they_are(name: str, cls: type) -> None:
    for expedited in (False, True):
        model = build(name, *VIT, expedited=expedited)
        assert type(model) is cls
        assert model.reduction == (clustered(3, (2, 2)) if expedited else None)


def test_official_name_has_a_stand_in() -> None:
    if "D2SwinTransformer" in BACKBONE_REGISTRY:
        pytest.skip("Mask2Former registered its own")
    assert type(build("D2SwinTransformer")) is ExpeditedSwinTransformer


@pytest.mark.parametrize(
    "name", ["", "NoBackbone", "ExpeditedBackbone", "build_expedited_fpn_backbone"]
)
def test_name_that_is_no_backbone_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"BACKBONE must name a registered .*, got '{name}'"):
        build(name)


@pytest.fixture
def detectron2() -> None:
    pytest.importorskip("detectron2", reason="needs the real Detectron2")
    if PROVIDER != "detectron2":
        pytest.skip("the stand-in is forced")


THIRD_PARTY = pytest.mark.parametrize(
    ("name", "opts", "output"),
    [
        ("D2SwinTransformer", [], "res4"),
        ("SwinTransformer", [], "p2"),
        ("ViT", DETECTRON2_VIT, "last_feat"),
    ],
)


@pytest.mark.detectron2
@THIRD_PARTY
def test_third_party_backbone_is_itself(
    mask2former_swin: ModuleType, name: str, opts: list[Any], output: str
) -> None:
    plain = build(name, *opts)
    expedited = build(name, *opts, expedited=True)
    assert type(plain) is type(expedited) and type(plain).__name__ == name
    assert expedited.reduction == clustered(3, (2, 2)) and not hasattr(plain, "reduction")
    assert plain.output_shape() == expedited.output_shape()
    assert list(plain.state_dict()) == list(expedited.state_dict())
    plain.load_state_dict(expedited.state_dict())
    outputs, fewer = run(plain), run(expedited)
    assert list(outputs) == list(plain.output_shape())
    for feature, shape in plain.output_shape().items():
        assert fewer[feature].shape == outputs[feature].shape
        assert outputs[feature].shape[1] == shape.channels
    assert not torch.equal(fewer[output], outputs[output])
    assert equal(run(restore(expedited)), outputs)


@pytest.mark.detectron2
@pytest.mark.parametrize("epsilon", [1e-6, 1e-5])
def test_detectron2s_vit_has_the_epsilon_of_the_config(
    mask2former_swin: ModuleType, epsilon: float
) -> None:
    model = build("ViT", *DETECTRON2_VIT, "MODEL.VIT.NORM_EPS", epsilon)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert norms and all(norm.eps == epsilon for norm in norms)


def mask2former(name: str, backbone: str, expedited: bool) -> Any:
    """Config of a Mask2Former on a backbone."""
    opts = ["MODEL.BACKBONE.NAME", name, "MODEL.EXPEDITE.BACKBONE", backbone]
    opts += ["MODEL.EXPEDITE.ENABLED", expedited, *SETTINGS]
    return load_config(HERE / "mask2former_tiny.yaml", opts)


@pytest.mark.detectron2
def test_mask2formers_swin_equals_ours_with_its_names(mask2former_swin: ModuleType) -> None:
    torch.manual_seed(0)
    theirs = build_model(mask2former("ExpeditedBackbone", "D2SwinTransformer", True)).eval()
    ours = build_model(mask2former("ExpeditedSwinTransformer", "", True)).eval()
    constant = "relative_position_index"
    names = [name for name in theirs.state_dict() if not name.endswith(constant)]
    assert sorted(names) == sorted(ours.state_dict())
    assert "backbone.layers.2.blocks.1.attn.qkv.weight" in names
    ours.load_state_dict(theirs.state_dict())
    expected, outputs = run(ours.backbone), run(theirs.backbone)
    for name in expected:
        torch.testing.assert_close(outputs[name], expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.detectron2
@pytest.mark.parametrize("expedited", [False, True])
def test_cost_of_mask2formers_swin_is_ours(mask2former_swin: ModuleType, expedited: bool) -> None:
    # A size of whole windows in all stages: ours does not project the padding of others.
    theirs = count_gflops(
        mask2former("ExpeditedBackbone", "D2SwinTransformer", expedited), 128, 256
    )
    ours = count_gflops(mask2former("ExpeditedSwinTransformer", "", expedited), 128, 256)
    assert theirs == pytest.approx(ours, rel=0.01)


@pytest.mark.detectron2
def test_third_party_backbone_carries_a_pyramid(detectron2: None) -> None:
    opts = ["MODEL.BACKBONE.NAME", "build_expedited_fpn_backbone"]
    opts += ["MODEL.FPN.IN_FEATURES", ["p0", "p1", "p2", "p3"]]
    model = build("SwinTransformer", *opts, expedited=True)
    assert model.size_divisibility == 32
    assert model.bottom_up.reduction == clustered(3, (2, 2))
    assert list(run(model, 64, 96)) == ["p2", "p3", "p4", "p5", "p6"]


@pytest.mark.detectron2
def test_vit_is_what_the_config_says(detectron2: None) -> None:
    model = build("ViT", *DETECTRON2_VIT)
    assert [block.window_size for block in model.blocks] == [3, 3, 0, 3, 0]
    assert model.blocks[0].attn.rel_pos_h.shape == (5, 8)
    assert model.blocks[2].attn.rel_pos_h.shape == (15, 8)
    assert model.pos_embed.shape == (1, 17, 16)


@pytest.mark.detectron2
def test_backbone_that_cannot_be_expedited_is_refused(detectron2: None) -> None:
    with pytest.raises(ValueError, match="ResNet holds no encoder that can be expedited"):
        build("build_resnet_backbone", expedited=True)

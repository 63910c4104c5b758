"""The plain Swin backbones: parity with transformers', official names, construction."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from settings_cases import clustered
from swin_cases import images, tiny
from swin_names import official_names
from torch import nn

from expedite_d2.d2 import BACKBONE_REGISTRY, build_backbone, get_cfg
from expedite_d2.d2.config import add_expedite_config
from expedite_d2.d2.modeling.backbone.swin import ExpeditedSwinTransformer


@pytest.mark.parametrize("window", [12, 7])
@pytest.mark.parametrize("size", [(384, 384), (256, 320), (250, 333)])
def test_swin_plain_equals_transformers(size: tuple[int, int], window: int) -> None:
    transformers = pytest.importorskip("transformers")
    settings = {"embed_dim": 16, "depths": [2, 2, 3, 1], "num_heads": [1, 2, 2, 4]}
    names = ["stage1", "stage2", "stage3", "stage4"]
    config = transformers.SwinConfig(
        **settings, window_size=window, out_features=names, image_size=384
    )
    theirs = transformers.SwinBackbone(config).eval()
    ours = tiny(**settings, window_size=window)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(mean=0.0, std=0.15, generator=generator)
    ours.load_state_dict(official_names(theirs.state_dict()))
    x = images(*size, batch=3)
    with torch.no_grad():
        expected, got = theirs(x).feature_maps, ours(x)
    assert list(got) == ["res2", "res3", "res4", "res5"]
    for a, b in zip(expected, got.values(), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("window", "pretrained"), [(8, [0, 0, 0, 0]), (12, [6, 6, 6, 3])])
@pytest.mark.parametrize("size", [(512, 512), (256, 320), (250, 333)])
def test_swin_v2_plain_equals_transformers(
    size: tuple[int, int], window: int, pretrained: list[int]
) -> None:
    transformers = pytest.importorskip("transformers")
    settings = {"embed_dim": 16, "depths": [2, 2, 3, 1], "num_heads": [1, 2, 2, 4]}
    windows = {"window_size": window, "pretrained_window_sizes": pretrained}
    config = transformers.Swinv2Config(
        **settings,
        **windows,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        image_size=512,  # its windows never outgrow this size's maps
    )
    theirs = transformers.Swinv2Backbone(config).eval()
    ours = tiny(**settings, **windows, version=2)
    for i in range(4):  # it gives the stages' outputs as they are
        setattr(ours, f"norm{i}", nn.Identity())
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "logit_scale" in name:
                parameter.uniform_(1.0, 5.0, generator=generator)
            else:
                parameter.normal_(mean=0.0, std=0.15, generator=generator)
    ours.load_state_dict(official_names(theirs.state_dict()))
    x = images(*size, batch=3)
    with torch.no_grad():
        expected, got = theirs(x).feature_maps, ours(x)
    for a, b in zip(expected, got.values(), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-4)


def test_swin_parameter_names_are_official() -> None:
    names = set(tiny().state_dict())
    for name in (
        "patch_embed.proj.weight",
        "patch_embed.norm.bias",
        "layers.2.blocks.5.norm1.weight",
        "layers.2.blocks.5.attn.relative_position_bias_table",
        "layers.2.blocks.5.attn.qkv.weight",
        "layers.2.blocks.5.attn.proj.bias",
        "layers.2.blocks.5.norm2.bias",
        "layers.2.blocks.5.mlp.fc1.weight",
        "layers.2.blocks.5.mlp.fc2.bias",
        "layers.0.downsample.norm.weight",
        "layers.0.downsample.reduction.weight",
        "norm0.weight",
        "norm3.bias",
    ):
        assert name in names
    assert "layers.3.downsample.reduction.weight" not in names
    assert "layers.0.downsample.reduction.bias" not in names


def test_swin_loads_checkpoint_with_position_index() -> None:
    model = tiny()
    state = model.state_dict()
    index = model.token_positions
    for stage, layer in enumerate(model.layers):
        for block in range(len(layer.blocks)):
            state[f"layers.{stage}.blocks.{block}.attn.relative_position_index"] = index
    model.load_state_dict(state, strict=True)


def test_swin_v2_parameter_names_are_official() -> None:
    """Each block's and merging's names and shapes, of a block with two heads and 64 channels."""
    own = {name: tuple(tensor.shape) for name, tensor in tiny(version=2).state_dict().items()}
    prefix = "layers.2.blocks.5."
    assert {n.removeprefix(prefix): s for n, s in own.items() if n.startswith(prefix)} == {
        "norm1.weight": (64,),
        "norm1.bias": (64,),
        "attn.logit_scale": (2, 1, 1),
        "attn.q_bias": (64,),
        "attn.v_bias": (64,),
        "attn.cpb_mlp.0.weight": (512, 2),
        "attn.cpb_mlp.0.bias": (512,),
        "attn.cpb_mlp.2.weight": (2, 512),
        "attn.qkv.weight": (192, 64),
        "attn.proj.weight": (64, 64),
        "attn.proj.bias": (64,),
        "norm2.weight": (64,),
        "norm2.bias": (64,),
        "mlp.fc1.weight": (256, 64),
        "mlp.fc1.bias": (256,),
        "mlp.fc2.weight": (64, 256),
        "mlp.fc2.bias": (64,),
    }
    assert {n: s for n, s in own.items() if n.startswith("layers.1.downsample.")} == {
        "layers.1.downsample.reduction.weight": (64, 128),
        "layers.1.downsample.norm.weight": (64,),
        "layers.1.downsample.norm.bias": (64,),
    }
    assert "layers.0.blocks.0.attn.q_bias" not in tiny(version=2, qkv_bias=False).state_dict()


def test_swin_v2_loads_checkpoint_of_another_window() -> None:
    model = tiny(version=2)
    state = model.state_dict()
    for stage, layer in enumerate(model.layers):
        for block in range(len(layer.blocks)):
            prefix = f"layers.{stage}.blocks.{block}.attn."
            state[prefix + "relative_position_index"] = torch.zeros(36, 36).long()
            state[prefix + "relative_coords_table"] = torch.zeros(1, 11, 11, 2)
    model.load_state_dict(state, strict=True)
    assert model.layers[0].blocks[0].attn.relative_coords_table.shape == (49, 2)


def test_swin_v2_begins_as_the_identity() -> None:
    model = ExpeditedSwinTransformer(
        version=2, embed_dim=16, depths=[2], num_heads=[2], window_size=4, out_features=["res2"]
    ).eval()
    x = images(40, 48)
    with torch.no_grad():
        expected = model.norm0(model._embed(x)).permute(0, 3, 1, 2)
        torch.testing.assert_close(model(x)["res2"], expected)


def test_swin_absolute_position_embedding_is_resized() -> None:
    model = tiny(ape=True, pretrain_img_size=32)
    assert model.absolute_pos_embed.shape == (1, 16, 8, 8)
    x = images(40, 64)
    position = F.interpolate(model.absolute_pos_embed, size=(10, 16), mode="bicubic")
    plain = tiny()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "absolute" not in k})
    expected = plain._embed(x) + position.permute(0, 2, 3, 1)
    torch.testing.assert_close(model._embed(x), expected)


def test_swin_output_shape_and_subset() -> None:
    model = tiny(out_features=["res5", "res3"])
    shapes = model.output_shape()
    assert {k: (v.channels, v.stride) for k, v in shapes.items()} == {
        "res3": (32, 8),
        "res5": (128, 32),
    }
    outputs = model(images(64, 96))
    assert {k: tuple(v.shape) for k, v in outputs.items()} == {
        "res3": (2, 32, 8, 12),
        "res5": (2, 128, 2, 3),
    }
    assert all(v.is_contiguous(memory_format=torch.channels_last) for v in outputs.values())
    assert model.size_divisibility == 32
    assert model.padding_constraints["size_divisibility"] == 32


def test_swin_stochastic_depth_drops_only_in_training() -> None:
    model = tiny(drop_path_rate=0.9)
    x = images(64, 64)
    with torch.no_grad():
        assert torch.equal(model(x)["res5"], model(x)["res5"])
        model.train()
        assert not torch.equal(model(x)["res5"], model(x)["res5"])
    assert model.layers[0].blocks[0].drop_path.p == 0
    assert model.layers[3].blocks[0].drop_path.p == pytest.approx(0.9)


def test_swin_refuses_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"out_features must be among .*, got \['res6'\]"):
        tiny(out_features=["res6"])
    with pytest.raises(ValueError, match="num_heads must have one entry per stage"):
        tiny(num_heads=[1, 2])
    with pytest.raises(ValueError, match=r"expects images \(B, 3, H, W\), got \(3, 32, 32\)"):
        tiny()(torch.zeros(3, 32, 32))
    with pytest.raises(ValueError, match="version must be 1 or 2, got 3"):
        tiny(version=3)
    with pytest.raises(ValueError, match="qk_scale must be None for version 2"):
        tiny(version=2, qk_scale=0.5)
    with pytest.raises(ValueError, match="pretrained_window_sizes must have one entry per stage"):
        tiny(version=2, pretrained_window_sizes=[8, 8])
    with pytest.raises(ValueError, match="pretrained_window_sizes are for version 2, got"):
        tiny(pretrained_window_sizes=[8, 8, 8, 4])


def test_swin_is_built_from_config() -> None:
    assert BACKBONE_REGISTRY.get("ExpeditedSwinTransformer") is ExpeditedSwinTransformer
    cfg = get_cfg()
    add_expedite_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "ExpeditedSwinTransformer"
    cfg.MODEL.SWIN.EMBED_DIM = 16
    cfg.MODEL.SWIN.DEPTHS = [1, 1, 3, 1]
    cfg.MODEL.SWIN.NUM_HEADS = [1, 2, 2, 4]
    cfg.MODEL.SWIN.OUT_FEATURES = ["res3", "res5"]
    assert build_backbone(cfg).reduction is None
    cfg.MODEL.EXPEDITE.ENABLED = True
    cfg.MODEL.EXPEDITE.ALPHA = 3
    cfg.MODEL.EXPEDITE.CLUSTERS = [0.5, 0.5]
    cfg.MODEL.EXPEDITE.TEMPERATURE = 0.25
    backbone = build_backbone(cfg)
    assert backbone.reduction == clustered(3, (0.5, 0.5), temperature=0.25)
    assert list(backbone.output_shape()) == ["res3", "res5"]
    assert backbone.cluster_window == (7, 7)


def test_swin_v2_is_built_from_config() -> None:
    cfg = get_cfg()
    add_expedite_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "ExpeditedSwinTransformer"
    cfg.MODEL.SWIN.EMBED_DIM = 16
    cfg.MODEL.SWIN.DEPTHS = [1, 1, 3, 1]
    cfg.MODEL.SWIN.NUM_HEADS = [1, 2, 2, 4]
    cfg.MODEL.SWIN.WINDOW_SIZE = 8
    cfg.MODEL.SWIN.VERSION = 2
    own_windows = build_backbone(cfg)
    cfg.MODEL.SWIN.PRETRAINED_WINDOW_SIZES = [6, 6, 6, 3]
    smaller_windows = build_backbone(cfg)
    for stage, pretrained in enumerate([6, 6, 6, 3]):
        # Coordinates of the corner, 7 tokens away: log2(1 + 8 * 7 / (window - 1)) / 3.
        for model, window in ((own_windows, 8), (smaller_windows, pretrained)):
            corner = model.layers[stage].blocks[0].attn.relative_coords_table[-1]
            expected = math.log2(1 + 56 / (window - 1)) / 3
            assert corner.tolist() == pytest.approx([expected, expected])
    del cfg.MODEL.SWIN["VERSION"], cfg.MODEL.SWIN["PRETRAINED_WINDOW_SIZES"]
    assert "layers.0.blocks.0.attn.relative_position_bias_table" in build_backbone(cfg).state_dict()

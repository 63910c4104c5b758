"""timm's Swin, and position tables of other windows and images, into ExpeditedSwinTransformer."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from timm import create_model
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor
from torch.nn import functional as F

import expedite_d2.d2.modeling  # noqa: F401 (registers the architectures)
from expedite_d2.d2 import build_model
from expedite_d2.d2.checkpoint import load_weights
from expedite_d2.d2.checkpoint.names import FORMATS
from expedite_d2.d2.config import load_config
from expedite_d2.d2.modeling.backbone import ExpeditedSwinTransformer

TINY = Path(__file__).parents[1] / "modeling/mask2former_tiny.yaml"
CLASSES = {1: SwinTransformer, 2: SwinTransformerV2}
V2 = ("MODEL.SWIN.VERSION", 2)


def build(*opts, seed=0):
    torch.manual_seed(seed)
    return build_model(load_config(TINY, opts)).eval()


def timm_swin(version, **changes):
    """timm's own model of the tiny config's sizes; maps of each stage are whole windows."""
    torch.manual_seed(1)
    settings = {"img_size": 128, "embed_dim": 24, "depths": (1, 1, 3, 1), "window_size": 4}
    model = CLASSES[version](num_heads=(2, 2, 4, 8), num_classes=7, **settings | changes).eval()
    for parameter in model.parameters():  # no weight may hide behind an initial zero or one
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("file", ["whole.pth", "wrapped.pth", "headless.safetensors"])
def test_timm_swin_gives_the_same_features(tmp_path, caplog, version, file):
    theirs, model = timm_swin(version), build("MODEL.SWIN.VERSION", version)
    state, path = theirs.state_dict(), tmp_path / file
    if file == "headless.safetensors":
        state = {name: v for name, v in state.items() if not name.startswith(("head.", "norm."))}
        save_file(state, path)
    else:
        torch.save({"state_dict": state} if file == "wrapped.pth" else state, path)
    with caplog.at_level(logging.INFO, logger="expedite_d2"):
        load_weights(model, path)
    assert "(timm's Swin weights)" in caplog.text and "a backbone alone" in caplog.text
    images = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        expected = theirs.forward_intermediates(images, intermediates_only=True)
        features = model.backbone(images)
        for i, feature in enumerate(expected):
            feature = getattr(model.backbone, f"norm{i}")(feature.permute(0, 2, 3, 1))
            ours = features[f"res{i + 2}"].permute(0, 2, 3, 1)
            torch.testing.assert_close(ours, feature, rtol=0, atol=2e-5)


PUBLIC = {
    "swin_tiny_patch4_window7_224": (96, [2, 2, 6, 2], [3, 6, 12, 24], 7, 1),
    "swin_small_patch4_window7_224": (96, [2, 2, 18, 2], [3, 6, 12, 24], 7, 1),
    "swin_base_patch4_window12_384": (128, [2, 2, 18, 2], [4, 8, 16, 32], 12, 1),
    "swin_large_patch4_window12_384": (192, [2, 2, 18, 2], [6, 12, 24, 48], 12, 1),
    "swinv2_tiny_window8_256": (96, [2, 2, 6, 2], [3, 6, 12, 24], 8, 2),
    "swinv2_base_window12to24_192to384": (128, [2, 2, 18, 2], [4, 8, 16, 32], 24, 2),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_name_and_shape_of_timm_has_its_place(name):
    width, depths, heads, window, version = PUBLIC[name]
    with torch.device("meta"):
        source = create_model(name, pretrained=False).state_dict()
        own = ExpeditedSwinTransformer(
            embed_dim=width, depths=depths, num_heads=heads, window_size=window, version=version
        ).state_dict()
    fmt = next(fmt for fmt in FORMATS if fmt.recognises(source))
    assert fmt.title == "timm's Swin" and fmt.backbone_only
    expected = {
        f"backbone.{n}": v.shape for n, v in own.items() if n.partition(".")[0][:-1] != "norm"
    }
    assert {n: v.shape for n, v in fmt.translate(source).items()} == expected


def test_official_swin_is_not_taken_for_timms():
    official = {
        "patch_embed.proj.weight", "layers.0.blocks.0.norm1.weight",
        "layers.0.downsample.norm.weight", "layers.1.downsample.norm.weight", "head.weight",
    }  # fmt: skip
    assert next(f for f in FORMATS if f.recognises(official)).title == "Swin classification"


# --- tables of other sizes -----------------------------------------------------------------------


def official_resize(table: Tensor, old: int, new: int) -> Tensor:
    """How Swin's authors bring a table of windows of one size to another."""
    heads = table.shape[1]
    maps = table.permute(1, 0).view(1, heads, 2 * old - 1, 2 * old - 1)
    maps = F.interpolate(maps, size=(2 * new - 1, 2 * new - 1), mode="bicubic")
    return maps.view(heads, -1).permute(1, 0)


@pytest.mark.parametrize(("old", "new"), [(4, 7), (7, 4), (4, 12), (7, 12), (12, 7)])
def test_a_start_from_another_window_interpolates_its_tables(tmp_path, caplog, old, new):
    theirs = timm_swin(1, window_size=old, img_size=32 * old)
    torch.save(theirs.state_dict(), tmp_path / "swin.pth")
    model = build("MODEL.SWIN.WINDOW_SIZE", new)
    load_weights(model, tmp_path / "swin.pth")
    assert f"MODEL.SWIN.WINDOW_SIZE {old}: 6 position tables were interpolated" in caplog.text
    table = theirs.layers[2].blocks[1].attn.relative_position_bias_table
    ours = model.backbone.layers[2].blocks[1].attn.relative_position_bias_table
    torch.testing.assert_close(ours, official_resize(table, old, new), rtol=0, atol=1e-6)
    middle = [(2 * (2 * side - 1) * (side - 1)) // 2 + side - 1 for side in (old, new)]
    torch.testing.assert_close(ours[middle[1]], table[middle[0]])  # the token itself
    assert not any("in other shapes" in r.message for r in caplog.records)


@pytest.mark.parametrize(
    ("opts", "theirs", "message"),
    [
        ((), ("MODEL.SWIN.WINDOW_SIZE", 7), "set MODEL.SWIN.WINDOW_SIZE to 7"),
        (("MODEL.SWIN.WINDOW_SIZE", 12), (), "set MODEL.SWIN.WINDOW_SIZE to 4"),
        (
            ("MODEL.SWIN.APE", True),
            ("MODEL.SWIN.APE", True, "MODEL.SWIN.PRETRAIN_IMG_SIZE", 96),
            "set MODEL.SWIN.PRETRAIN_IMG_SIZE to 96",
        ),
    ],
)
def test_a_whole_model_of_another_window_is_refused_at_evaluation(
    tmp_path, caplog, opts, theirs, message
):
    torch.save({"model": build(*theirs, seed=1).state_dict()}, tmp_path / "model.pth")
    model, before = build(*opts), build(*opts).state_dict()
    with pytest.raises(ValueError, match=f"to evaluate it, {message}; a training may begin"):
        load_weights(model, tmp_path / "model.pth")
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    load_weights(model, tmp_path / "model.pth", strict=False)
    assert "position tables were interpolated" in caplog.text


@pytest.mark.parametrize("side", [16, 24])
@pytest.mark.parametrize("source", ["classification", "transformers"])
def test_absolute_positions_in_a_row_become_a_map(tmp_path, side, source):
    model = build("MODEL.SWIN.APE", True)  # a map of 16x16
    state = build(seed=1).backbone.state_dict()
    state = {n: v for n, v in state.items() if not n.startswith("norm")}
    row = torch.randn(1, side * side, 24)
    if source == "classification":
        state["absolute_pos_embed"] = row
    else:
        pairs = [("layers.", "encoder.layers."), ("patch_embed.norm", "embeddings.norm")]
        pairs += [("patch_embed.proj", "embeddings.patch_embeddings.projection")]
        pairs += [("norm1", "layernorm_before"), ("norm2", "layernorm_after")]
        pairs += [("attn.proj", "attention.output.dense"), ("mlp.fc1", "intermediate.dense")]
        pairs += [("mlp.fc2", "output.dense"), ("attn.rel", "attention.self.rel")]
        renamed = {"swin.embeddings.position_embeddings": row}
        for name, value in state.items():
            for ours, theirs in pairs:
                name = name.replace(ours, theirs)
            parts = value.chunk(3) if "qkv" in name else [value]
            for part, tensor in zip(("query", "key", "value"), parts, strict=False):
                renamed[f"swin.{name.replace('attn.qkv', f'attention.self.{part}')}"] = tensor
        state = renamed
    torch.save(state, tmp_path / "swin.pth")
    load_weights(model, tmp_path / "swin.pth")
    expected = row.view(1, side, side, 24).permute(0, 3, 1, 2)
    if side != 16:
        expected = F.interpolate(expected, size=(16, 16), mode="bicubic")
    torch.testing.assert_close(model.backbone.absolute_pos_embed.data, expected)


# --- windows of the second version ---------------------------------------------------------------


def coordinates(window: int, pretrained: int) -> Tensor:
    """The table of official SwinV2: (1, 2M - 1, 2M - 1, 2)."""
    offsets = torch.arange(1 - window, window, dtype=torch.float32) * 8 / (pretrained - 1)
    scaled = offsets.sign() * (offsets.abs() + 1).log2() / 3
    return torch.stack(torch.meshgrid(scaled, scaled, indexing="ij"), -1)[None]


@pytest.mark.parametrize(
    ("theirs", "opts", "told"),
    [
        ([(4, 4)] * 4, (), None),
        ([(8, 8)] * 4, (), "[8, 8, 8, 8]"),
        ([(16, 16)] * 3 + [(8, 8)], ("MODEL.SWIN.WINDOW_SIZE", 16), "[16, 16, 16, 8]"),
        ([(24, 12)] * 3 + [(12, 6)], ("MODEL.SWIN.WINDOW_SIZE", 24), "[12, 12, 12, 6]"),
        (
            [(24, 12)] * 3 + [(12, 6)],
            ("MODEL.SWIN.WINDOW_SIZE", 24, "MODEL.SWIN.PRETRAINED_WINDOW_SIZES", [12, 12, 12, 6]),
            None,
        ),
        ([(math.nan, 4)] * 4, (), None),
    ],
)
def test_windows_of_swin_v2s_pretraining_are_told(tmp_path, caplog, theirs, opts, told):
    source, model = build(*V2, seed=1), build(*V2, *opts)
    state = {n: v for n, v in source.backbone.state_dict().items() if not n.startswith("norm")}
    for stage, (window, pretrained) in enumerate(theirs):
        table = coordinates(4 if math.isnan(window) else window, pretrained)
        table = table * math.nan if math.isnan(window) else table
        state[f"layers.{stage}.blocks.0.attn.relative_coords_table"] = table
    torch.save(state, tmp_path / "swin_v2.pth")
    load_weights(model, tmp_path / "swin_v2.pth")
    sentence = f"set MODEL.SWIN.PRETRAINED_WINDOW_SIZES to {told}"
    assert (sentence in caplog.text) == (told is not None)
    assert ("PRETRAINED_WINDOW_SIZES" in caplog.text) == (told is not None)

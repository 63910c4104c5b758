"""Public checkpoints into ExpeditedMask2Former, and files that are not what they should be."""

from __future__ import annotations

import logging
import pickle
import re
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from official_cases import official_names
from safetensors.torch import load_file, save_file
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
    SwinForImageClassification,
    Swinv2Config,
    Swinv2ForImageClassification,
)

import expedite_d2.d2.modeling  # noqa: F401 (registers the architectures)
from expedite_d2 import expedite, restore
from expedite_d2.d2 import build_model
from expedite_d2.d2.checkpoint import load_weights
from expedite_d2.d2.checkpoint.files import backbone_of
from expedite_d2.d2.checkpoint.names import from_mask2former, from_transformers
from expedite_d2.d2.checkpoint.official import to_mask2former
from expedite_d2.d2.config import load_config

ROOT = Path(__file__).parents[3]
TINY = ROOT / "tests/d2/modeling/mask2former_tiny.yaml"
SWIN_LARGE = "coco/panoptic/mask2former_swin_large.yaml"


def build(*opts, seed=0):
    torch.manual_seed(seed)
    return build_model(load_config(TINY, opts)).eval()


def as_mask2former(model):
    """A model's weights under Mask2Former's names, as far as its layers go, in NumPy arrays."""
    own = model.state_dict()
    extra = [
        f"sem_seg_head.predictor.input_proj.{i}.{p}" for i in range(3) for p in ("weight", "bias")
    ]
    state = OrderedDict()
    for name in [*official_names(), *extra]:
        parts = list(from_mask2former({name: torch.zeros(3)}))
        if parts and all(part in own for part in parts):
            state[name] = torch.cat([own[part] for part in parts]).numpy()
    return state


def as_swin(model):
    """The backbone as Swin's classification checkpoints hold it."""
    prefix = "backbone."
    state = {
        name.removeprefix(prefix): tensor
        for name, tensor in model.state_dict().items()
        if name.startswith(prefix) and not re.match(r"backbone\.norm\d", name)
    }
    state["norm.weight"], state["norm.bias"] = torch.ones(192), torch.zeros(192)
    state["head.weight"], state["head.bias"] = torch.ones(1000, 192), torch.zeros(1000)
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16).long()
    state["layers.2.blocks.1.attn_mask"] = torch.zeros(1, 16, 16)
    return state


def transformers_tiny():
    """transformers' complete model of the same sizes as the tiny config."""
    backbone = SwinConfig(
        embed_dim=24, depths=[1, 1, 3, 1], num_heads=[2, 2, 4, 8], window_size=4, image_size=64,
        drop_path_rate=0.0, out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, num_labels=5, feature_size=64, mask_feature_size=32,
        hidden_dim=48, encoder_layers=2, decoder_layers=5, num_attention_heads=4,
        dim_feedforward=56, num_queries=7,
    )  # fmt: skip
    torch.manual_seed(1)
    model = Mask2FormerForUniversalSegmentation(config).eval()
    for parameter in model.parameters():  # no weight may hide behind an initial zero or one
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def equal(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


# --- names --------------------------------------------------------------------------------------


def test_every_official_name_and_shape_has_its_place():
    cfg = load_config(SWIN_LARGE, ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        own = {name: tuple(t.shape) for name, t in build_model(cfg).state_dict().items()}
        state = {name: torch.empty(shape) for name, shape in official_names().items()}
    assert len(state) == 650
    assert sum("relative_position_index" in name for name in state) == 24
    translated = {name: tuple(t.shape) for name, t in from_mask2former(state).items()}
    assert translated == own


def test_first_releases_names_are_known():
    old = {
        "sem_seg_head.mask_features.weight": torch.zeros(1),
        "sem_seg_head.predictor.static_query.weight": torch.zeros(1),
    }
    assert set(from_mask2former(old)) == {
        "pixel_decoder.mask_projection.weight",
        "transformer_module.queries_features.weight",
    }


def test_unknown_names_are_left_as_they_are():
    assert set(from_mask2former({"backbone.stem.conv1.weight": torch.zeros(1)})) == {
        "backbone.stem.conv1.weight"
    }
    incomplete = {"model.pixel_level_module.encoder.encoder.layers.0.blocks.0.attention.self."
                  "query.weight": torch.zeros(2, 2)}  # fmt: skip
    assert from_transformers(incomplete) == {}


# --- the same model elsewhere -------------------------------------------------------------------


def test_transformers_directory_gives_the_same_logits(tmp_path, caplog):
    theirs = transformers_tiny()
    theirs.save_pretrained(tmp_path)
    model = build()
    with caplog.at_level(logging.INFO, logger="expedite_d2"):
        load_weights(model, tmp_path)
    total = len(model.state_dict())
    assert f"{total} of the model's {total} names matched" in caplog.text
    for size in [(64, 96), (160, 128), (100, 70)]:
        images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            expected = theirs(pixel_values=images)
            classes, masks = model.logits(images)
        torch.testing.assert_close(classes, expected.class_queries_logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(masks, expected.masks_queries_logits, rtol=0, atol=1e-4)


def test_expedited_transformers_model_gives_the_same_logits(tmp_path):
    theirs = transformers_tiny()
    theirs.save_pretrained(tmp_path)
    model = build()
    load_weights(model, tmp_path)
    for each in (model, theirs):
        expedite(each, alpha=3, clusters=(2, 2))
    for size in [(64, 96), (100, 70)]:
        images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            expected = theirs(pixel_values=images)
            classes, masks = model.logits(images)
            plain = restore(theirs)(pixel_values=images).class_queries_logits
        expedite(theirs, alpha=3, clusters=(2, 2))
        torch.testing.assert_close(classes, expected.class_queries_logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(masks, expected.masks_queries_logits, rtol=0, atol=1e-4)
        assert (classes - plain).abs().max() > 0.01


def test_transformers_shards_and_bin(tmp_path):
    theirs = transformers_tiny()
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert (tmp_path / "shards/model.safetensors.index.json").is_file()
    sharded, single = build(), build(seed=1)
    load_weights(sharded, tmp_path / "shards")
    theirs.save_pretrained(tmp_path / "whole")
    load_weights(single, tmp_path / "whole/model.safetensors")
    assert equal(sharded, single)


# --- kinds of file ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pkl", "pkl_tensors", "pth", "legacy_pth"])
def test_mask2former_files(tmp_path, kind):
    source, model = build(seed=1), build(seed=2)
    state = as_mask2former(source)
    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    path = tmp_path / "model_final.pkl"
    if kind == "pkl":
        path.write_bytes(
            pickle.dumps({"model": state, "__author__": "a", "matching_heuristics": True})
        )
    elif kind == "pkl_tensors":  # as Mask2Former's converter of Swin weights writes them
        path.write_bytes(pickle.dumps({"model": OrderedDict(tensors), "__author__": "third_party"}))
    else:
        zipped = kind == "pth"
        torch.save({"model": tensors}, path, _use_new_zipfile_serialization=zipped)
    load_weights(model, path)
    assert equal(model, source)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_own_files_in_half_precision(tmp_path, suffix):
    source, model = build(seed=1).half(), build(seed=2)
    path = tmp_path / f"model{suffix}"
    state = {name: tensor.contiguous() for name, tensor in source.state_dict().items()}
    if suffix == ".pth":
        torch.save({"model": state, "iteration": 7}, path)
    else:
        save_file(state, path)
    load_weights(model, str(path))
    assert equal(model, source.float())


@pytest.mark.parametrize("numpy", [False, True])
def test_swin_classification_weights_fill_the_backbone(tmp_path, caplog, numpy):
    source, model, before = build(seed=1), build(seed=2), build(seed=2)
    state = as_swin(source)
    path = tmp_path / "swin.pkl"
    if numpy:
        arrays = {name: np.asarray(tensor) for name, tensor in state.items()}
        path.write_bytes(pickle.dumps({"model": arrays, "matching_heuristics": True}))
    else:
        torch.save({"model": state}, path)
    load_weights(model, path)
    assert "a backbone alone" in caplog.text
    for name, tensor in model.state_dict().items():
        loaded = name.startswith("backbone.") and not re.match(r"backbone\.norm\d", name)
        assert torch.equal(tensor, (source if loaded else before).state_dict()[name]), name


@pytest.mark.parametrize(
    "prefix", ["module.", "encoder.", "backbone.", "model.backbone.", "module._orig_mod.backbone."]
)
def test_swin_classification_weights_below_a_prefix(tmp_path, prefix):
    source, model = build(seed=1), build(seed=2)
    state = {prefix + name: tensor for name, tensor in as_swin(source).items()}
    torch.save({"state_dict": state}, tmp_path / "swin.pth")
    load_weights(model, tmp_path / "swin.pth")
    for name, tensor in model.backbone.layers.state_dict().items():
        assert torch.equal(tensor, source.backbone.layers.state_dict()[name]), name


@pytest.fixture(scope="module")
def transformers_directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformers")
    transformers_tiny().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "model.module."])
@pytest.mark.parametrize("kind", ["official", "transformers", "ours", "our backbone"])
def test_every_format_below_a_prefix(tmp_path, transformers_directory, kind, prefix):
    source, model = build(seed=1), build(seed=2)
    state = {
        "official": lambda: to_mask2former(source.state_dict()),
        "transformers": lambda: load_file(transformers_directory / "model.safetensors"),
        "ours": source.state_dict,
        "our backbone": lambda: backbone_of(source.state_dict()),
    }[kind]()
    torch.save(state, tmp_path / "plain.pth")
    torch.save({prefix + n: tensor for n, tensor in state.items()}, tmp_path / "prefixed.pth")
    expected = build(seed=2)
    load_weights(expected, tmp_path / "plain.pth")
    load_weights(model, tmp_path / "prefixed.pth")
    assert equal(model, expected)
    first = "backbone.patch_embed.proj.weight"
    assert not torch.equal(model.state_dict()[first], build(seed=2).state_dict()[first])


V2 = ("MODEL.SWIN.VERSION", 2)


def test_swin_v2_classification_weights_fill_the_backbone(tmp_path, caplog):
    source, model = build(*V2, seed=1), build(*V2, seed=2)
    state = as_swin(source)
    # Trained in windows of another size: its constants are not the model's.
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(9, 9).long()
    state["layers.0.blocks.0.attn.relative_coords_table"] = torch.zeros(1, 5, 5, 2)
    torch.save({"model": state}, tmp_path / "swin_v2.pth")
    load_weights(model, tmp_path / "swin_v2.pth")
    assert "a backbone alone" in caplog.text
    for name, tensor in model.backbone.layers.state_dict().items():
        assert torch.equal(tensor, source.backbone.layers.state_dict()[name]), name
    with pytest.raises(ValueError, match="of another model: .* left over are .*q_bias"):
        load_weights(build(), tmp_path / "swin_v2.pth")


@pytest.mark.parametrize("version", [1, 2])
def test_transformers_swin_gives_the_same_features(tmp_path, caplog, version):
    config_class, model_class = {
        1: (SwinConfig, SwinForImageClassification),
        2: (Swinv2Config, Swinv2ForImageClassification),
    }[version]
    config = config_class(
        embed_dim=24, depths=[1, 1, 3, 1], num_heads=[2, 2, 4, 8], window_size=4, image_size=256
    )
    torch.manual_seed(1)
    theirs = model_class(config).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    model = build("MODEL.SWIN.VERSION", version)
    load_weights(model, tmp_path)
    assert "a backbone alone" in caplog.text
    model.backbone.norm3.load_state_dict(theirs.base_model.layernorm.state_dict())
    images = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        expected = theirs.base_model(images).last_hidden_state[0].T.view(1, 192, 8, 8)
        features = model.backbone(images)["res5"]
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-4)


def test_auxiliary_head_may_be_in_the_file_or_not(tmp_path):
    path = tmp_path / "model.pth"
    trained = build("MODEL.MASK_FORMER.SEM_AUX_WEIGHT", 1.0, seed=1)
    torch.save({"model": trained.state_dict()}, path)
    model = build()
    load_weights(model, path)
    assert torch.equal(model.class_predictor.weight, trained.class_predictor.weight)
    torch.save({"model": model.state_dict()}, path)
    load_weights(build("MODEL.MASK_FORMER.SEM_AUX_WEIGHT", 1.0), path)

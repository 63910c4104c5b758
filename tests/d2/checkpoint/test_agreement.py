"""Settings that no shape shows: epsilon of the norms, heads, normalisation of the images."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from timm import create_model
from torch import nn
from transformers import (
    DPTConfig,
    DPTForDepthEstimation,
    SwinConfig,
    SwinForImageClassification,
    Swinv2Config,
)

import expedite_d2.d2.modeling  # noqa: F401 (registers the architectures)
from expedite_d2.d2 import build_model
from expedite_d2.d2.checkpoint import load_weights
from expedite_d2.d2.checkpoint.segmenter import SEGMENTER_FORMATS
from expedite_d2.d2.config import load_config

ROOT = Path(__file__).parents[3]
MODELS = ROOT / "tests/d2/modeling"
EPS = "MODEL.VIT.NORM_EPS"


def build(family: str, *opts: Any) -> Any:
    torch.manual_seed(0)
    return build_model(load_config(MODELS / f"{family}_tiny.yaml", opts)).eval()


def epsilons(module: nn.Module) -> set[float]:
    return {norm.eps for norm in module.modules() if isinstance(norm, nn.LayerNorm)}


# --- the key -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("vit_tiny_patch16_224", 1e-6),
        ("deit_tiny_distilled_patch16_224", 1e-6),
        ("vit_tiny_r_s16_p8_384", 1e-6),
        ("beit_base_patch16_224", 1e-6),
        ("vit_base_patch16_clip_224", 1e-5),
    ],
)
def test_norms_have_the_epsilon_of_the_config(name: str, own: float) -> None:
    opts = ["MODEL.DEVICE", "meta", "MODEL.VIT.NAME", name, "MODEL.VIT.IMG_SIZE", 0,
            "MODEL.VIT.PATCH_SIZE", 0, "MODEL.VIT.EMBED_DIM", 0, "MODEL.VIT.DEPTH", 2,
            "MODEL.VIT.NUM_HEADS", 0]  # fmt: skip
    with torch.device("meta"):
        assert epsilons(create_model(name, depth=2)) == {own}
        assert epsilons(build("segmenter", *opts, EPS, 1e-6).backbone) == {own}
        assert epsilons(build("segmenter", *opts, EPS, 1e-5).backbone) == {1e-5}
        if own == 1e-6:
            assert epsilons(build("segmenter", *opts, EPS, 1e-12).backbone) == {1e-12}
        else:
            with pytest.raises(ValueError, match=f"NORM_EPS must be 1e-06 for {name}.*got 1e-12"):
                build("segmenter", *opts, EPS, 1e-12)


@pytest.mark.parametrize("value", [0.0, -1e-6, float("nan"), float("inf")])
def test_an_epsilon_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="MODEL.VIT.NORM_EPS must be a number above 0"):
        build("segmenter", EPS, value)


@pytest.mark.parametrize("data", ["ade20k", "cityscapes", "pascal_context"])
def test_configs_of_the_release_have_its_epsilon(data: str) -> None:
    for stem in ("segmenter_vit_large", "segmenter_vit_large_expedited"):
        assert load_config(f"{data}/semantic/{stem}.yaml").MODEL.VIT.NORM_EPS == 1e-5


@pytest.mark.parametrize(
    "config",
    ["semantic/segmenter_vit_mini", "depth/dpt_vit_mini", "panoptic/mask2former_swin_mini"],
)
def test_weights_that_ship_keep_theirs(config: str) -> None:
    assert load_config(f"scenes/{config}.yaml").MODEL.VIT.NORM_EPS == 1e-6


@pytest.mark.parametrize("version", [1, 2])
def test_swins_norms_have_the_epsilon_of_every_source(version: int) -> None:
    """Official Swin writes LayerNorm without an epsilon, so there is nothing to choose."""
    name, config = {
        1: ("swin_tiny_patch4_window7_224", SwinConfig()),
        2: ("swinv2_tiny_window8_256", Swinv2Config()),
    }[version]
    with torch.device("meta"):
        timm = epsilons(create_model(name))
    ours = epsilons(build("mask2former", "MODEL.SWIN.VERSION", version).backbone)
    assert ours == timm == {config.layer_norm_eps} == {1e-5}


# --- formats -------------------------------------------------------------------------------------


def segmenter_release(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n.replace("backbone.vit.", "encoder."): v for n, v in model.state_dict().items()}


def dpt_release(model: nn.Module) -> dict[str, torch.Tensor]:
    """Enough of the release's names to be known as such."""
    names = {n.replace("backbone.vit.", "pretrained.model."): v for n, v in
             model.state_dict().items() if n.startswith("backbone.")}  # fmt: skip
    return names | {"scratch.layer1_rn.weight": model.state_dict()["neck.convs.0.weight"]}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("epsilon", [1e-6, 1e-12, 1e-3])
def test_a_segmenter_release_wants_its_epsilon(
    tmp_path: Path, strict: bool, epsilon: float
) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": segmenter_release(build("segmenter"))}, path)
    model = build("segmenter", EPS, epsilon)
    model.decoder.cls_emb.data += 1
    before = {name: value.clone() for name, value in model.state_dict().items()}
    message = f"whose LayerNorms have the epsilon 1e-05: {EPS} must be that, got {epsilon}"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_weights(model, path, strict=strict)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    load_weights(build("segmenter"), path, strict=strict)


def test_a_dpt_release_wants_its_epsilon(tmp_path: Path) -> None:
    torch.save(dpt_release(build("dpt")), tmp_path / "dpt.pt")
    with pytest.raises(ValueError, match="epsilon 1e-06: MODEL.VIT.NORM_EPS must be that, got"):
        load_weights(build("dpt", EPS, 1e-5), tmp_path / "dpt.pt", strict=False)
    load_weights(build("dpt"), tmp_path / "dpt.pt", strict=False)


@pytest.mark.parametrize(("epsilon", "told"), [(1e-6, False), (1e-5, True)])
def test_mmsegmentations_usual_epsilon_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, epsilon: float, told: bool
) -> None:
    model = build("segmenter", EPS, epsilon)
    names = [("backbone.vit.", "backbone."), ("decoder.", "decode_head.")]
    parts = [(".blocks.", ".layers."), (".norm1.", ".ln1."), (".norm2.", ".ln2."),
             (".attn.qkv.", ".attn.attn.in_proj_"), (".attn.proj.", ".attn.attn.out_proj."),
             (".mlp.fc1.", ".ffn.layers.0.0."), (".mlp.fc2.", ".ffn.layers.1."),
             ("backbone.norm.", "backbone.ln1."),
             ("patch_embed.proj.", "patch_embed.projection.")]  # fmt: skip
    state = {}
    for name, value in model.state_dict().items():
        for ours, theirs in names + (parts if name.startswith("backbone.") else []):
            name = name.replace(ours, theirs)
        state[name] = value
    torch.save({"state_dict": state}, tmp_path / "mmseg.pth")
    load_weights(model, tmp_path / "mmseg.pth")
    assert ("epsilon 1e-06: MODEL.VIT.NORM_EPS must be that, got 1e-05" in caplog.text) == told
    assert SEGMENTER_FORMATS[1].recognises(state)


# --- transformers' config.json -------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [1e-12, 1e-5, 1e-6])
def test_a_transformers_vit_runs_with_the_epsilon_that_it_tells(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, epsilon: float
) -> None:
    config = DPTConfig(
        hidden_size=48, num_hidden_layers=4, num_attention_heads=3, intermediate_size=192,
        image_size=64, patch_size=16, backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 16, 24, 24], fusion_hidden_size=16, hidden_act="gelu",
        reassemble_factors=[4, 2, 1, 0.5], layer_norm_eps=epsilon,
    )  # fmt: skip
    torch.manual_seed(1)
    theirs = DPTForDepthEstimation(config).eval()
    for parameter in theirs.dpt.embeddings.parameters():
        parameter.data *= 0.01  # or the epsilon does not count
    theirs.save_pretrained(tmp_path)
    model = build("dpt", EPS, epsilon)
    load_weights(model, tmp_path)
    assert "epsilon" not in caplog.text
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        hidden = theirs.dpt(images, output_hidden_states=True).hidden_states
        ours = model.backbone.tokens(images)
    for expected, (prefix, grid) in zip(hidden[1:], ours, strict=True):
        whole = torch.cat([prefix, grid.flatten(1, 2)], 1)
        torch.testing.assert_close(whole, expected, rtol=0, atol=2e-6)
    other = 1e-5 if epsilon == 1e-6 else 1e-6
    model = build("dpt", EPS, other)
    load_weights(model, tmp_path)
    with torch.no_grad():
        wrong = model.backbone.tokens(images)[0][1].flatten(1, 2)
    assert (wrong - hidden[1][:, 1:]).abs().max() > 4e-6
    assert f"LayerNorms of epsilon {epsilon}, the model's backbone has {other}" in caplog.text


@pytest.mark.parametrize("epsilon", [1e-5, 1e-12])
def test_a_transformers_swin_tells_its_epsilon(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, epsilon: float
) -> None:
    config = SwinConfig(embed_dim=24, depths=[1, 1, 3, 1], num_heads=[2, 2, 4, 8], window_size=4,
                        layer_norm_eps=epsilon)  # fmt: skip
    SwinForImageClassification(config).save_pretrained(tmp_path)
    load_weights(build("mask2former"), tmp_path)
    assert ("of epsilon 1e-12, the model's backbone has 1e-05" in caplog.text) == (epsilon < 1e-6)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "null", "{}", '{"layer_norm_eps": "x"}', '{"layer_norm_eps": null}',
     '{"backbone_config": 3}', '{"backbone_config": {"layer_norm_eps": [1]}}', b"\xff\xfe\x00"],
)  # fmt: skip
def test_a_config_that_tells_nothing_is_no_obstacle(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str | bytes
) -> None:
    torch.save(build("segmenter").state_dict(), tmp_path / "pytorch_model.bin")
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "config.json").write_bytes(content)
    load_weights(build("segmenter"), tmp_path)
    assert not caplog.records


def test_a_nested_backbone_config_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(build("segmenter").state_dict(), tmp_path / "pytorch_model.bin")
    config = {"backbone_config": {"layer_norm_eps": 1e-4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    load_weights(build("segmenter"), tmp_path)
    assert "LayerNorms of epsilon 0.0001, the model's backbone has 1e-05" in caplog.text


# --- variant.yml of a Segmenter release ----------------------------------------------------------

VARIANT = """
algorithm: {batch_size: 8, optimizer: sgd}
net_kwargs:
  backbone: vit_tiny_patch16_384
  image_size: !!python/tuple [32, 32]
  n_heads: 2
  normalization: vit
  decoder: {name: mask_transformer, n_layers: 2}
  n_cls: 5
"""


def release(folder: Path, variant: str) -> Path:
    torch.save({"model": segmenter_release(build("segmenter"))}, folder / "checkpoint.pth")
    (folder / "variant.yml").write_text(variant)
    return folder


@pytest.mark.parametrize("name", ["", "checkpoint.pth"])
def test_a_release_is_given_as_folder_or_file(tmp_path: Path, name: str) -> None:
    model = build("segmenter")
    model.decoder.cls_emb.data += 1
    load_weights(model, release(tmp_path, VARIANT) / name)
    assert torch.equal(model.decoder.cls_emb, build("segmenter").decoder.cls_emb)


@pytest.mark.parametrize("name", ["", "checkpoint.pth"])
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("n_heads: 2", "n_heads: 3", "n_heads is 3: MODEL.VIT.NUM_HEADS must be that, got 2"),
        (
            "normalization: vit",
            "normalization: deit",
            "normalization is deit: MODEL.PIXEL_MEAN and PIXEL_STD must be [123.675, 116.28, "
            "103.53] and [58.395, 57.12, 57.375], got [127.5, 127.5, 127.5] and [127.5, 127.5, "
            "127.5]",
        ),
        ("net_kwargs:", "network:", 'describe a Segmenter: expected YAML with "net_kwargs"'),
        (VARIANT, "net_kwargs: 3", "net_kwargs must be keys and values, got 3"),
        (VARIANT, "- 1", 'does not describe a Segmenter: expected YAML with "net_kwargs"'),
        (VARIANT, "", 'does not describe a Segmenter: expected YAML with "net_kwargs"'),
        (VARIANT, "a: [", 'does not describe a Segmenter: expected YAML with "net_kwargs"'),
        (VARIANT, "a: !!python/object/apply:os.abort []", "expected YAML with"),
        (VARIANT, "net_kwargs: {a: !!timestamp x}", "expected YAML with"),
        (VARIANT, "net_kwargs: " + "[" * 5000, "expected YAML with"),
    ],
)
def test_a_variant_of_another_model_is_named(
    tmp_path: Path, name: str, old: str, new: str, message: str
) -> None:
    folder = release(tmp_path, VARIANT.replace(old, new))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_weights(build("segmenter"), folder / name)
    assert "variant.yml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_release_of_other_classes_says_which_setting(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set MODEL.SEM_SEG_HEAD.NUM_CLASSES to 5;"):
        load_weights(build("segmenter", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3),
                     release(tmp_path, VARIANT))  # fmt: skip


def test_a_folder_without_its_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "variant.yml").write_text(VARIANT)
    with pytest.raises(FileNotFoundError, match="or checkpoint.pth beside variant.yml"):
        load_weights(build("segmenter"), tmp_path)


def test_deit_weights_run_with_their_normalisation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = release(tmp_path, VARIANT.replace("vit\n", "deit\n"))
    model = build(
        "segmenter",
        *("MODEL.PIXEL_MEAN", [123.675, 116.280, 103.530]),
        *("MODEL.PIXEL_STD", [58.395, 57.120, 57.375]),
    )
    with caplog.at_level(logging.WARNING):
        load_weights(model, folder)
    assert not caplog.records

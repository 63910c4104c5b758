"""The plain ViT backbone: timm's outputs when plain, any size, tokens and stems for heads."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from settings_cases import clustered
from timm.layers import resample_abs_pos_embed
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import BeitConfig, BeitModel

from expedite_d2.d2 import BACKBONE_REGISTRY, build_backbone, get_cfg
from expedite_d2.d2.config import add_expedite_config
from expedite_d2.d2.modeling.backbone import ExpeditedViT
from expedite_d2.reducers import reconstruct, reduce
from expedite_d2.tools.calibrate import calibrate


def randomised(cls: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = cls(**settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = 1.0 if "relative_position" in name else 0.25 if parameter.dim() > 1 else 0.1
            noise = std * torch.randn(parameter.shape)
            parameter.add_(noise) if parameter.dim() < 2 else parameter.copy_(noise)
    return model.eval()


def vit(cls: Any = VisionTransformer, **changes: Any) -> Any:
    settings = {
        "img_size": 24, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2,
        "num_classes": 0, "global_pool": "",
    }  # fmt: skip
    if cls is not Beit:
        settings |= {"dynamic_img_size": True, "dynamic_img_pad": True}
    return randomised(cls, **{**settings, **changes})


def backbone(transformer: Any = None, **settings: Any) -> ExpeditedViT:
    return ExpeditedViT(vit=vit() if transformer is None else transformer, **settings).eval()


def images(height: int, width: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


# ---- plain -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(24, 24), (32, 20), (27, 41)])
@pytest.mark.parametrize(
    ("cls", "changes"),
    [
        (VisionTransformer, {}),
        (VisionTransformer, {"reg_tokens": 2, "no_embed_class": True, "pre_norm": True}),
        (VisionTransformer, {"class_token": False}),
        (VisionTransformerDistilled, {"global_pool": "token"}),
    ],
    ids=["class", "registers", "no prefix", "distilled"],
)
def test_vit_equals_timm_at_any_size(
    cls: Any, changes: dict[str, Any], size: tuple[int, int]
) -> None:
    transformer = vit(cls, **changes)
    model, x = backbone(copy.deepcopy(transformer), out_blocks=[1, "last"]), images(*size)
    with torch.no_grad():
        last, (middle,) = transformer.forward_intermediates(x, [1])
        outputs = model(x)
        assert list(outputs) == ["block1", "last"]
        assert torch.equal(outputs["block1"], middle)
        tokens = model.tokens(x)
        for value, (_, grid) in zip(outputs.values(), tokens, strict=True):
            assert torch.equal(grid.permute(0, 3, 1, 2), value)
        prefix, grid = tokens[-1]
        whole = torch.cat([prefix, grid.flatten(1, 2)], 1)
        assert torch.equal(whole, last) and prefix.shape[1] == transformer.num_prefix_tokens
    assert list(model.state_dict()) == [f"vit.{name}" for name in transformer.state_dict()]


@pytest.mark.parametrize("shared", [False, True])
def test_vit_equals_timm_beit(shared: bool) -> None:
    transformer = vit(Beit, use_rel_pos_bias=True, use_shared_rel_pos_bias=shared)
    model, x = backbone(copy.deepcopy(transformer), out_blocks=[1, "last"]), images(24, 24)
    with torch.no_grad():
        last, (middle,) = transformer.forward_intermediates(x, [1])
        assert torch.equal(model(x)["block1"], middle)
        prefix, grid = model.tokens(x)[1]
        assert torch.equal(torch.cat([prefix, grid.flatten(1, 2)], 1), last)
        assert model(images(30, 40))["last"].shape == (2, 16, 8, 10)


def test_vit_beit_equals_transformers_at_other_sizes() -> None:
    ours = backbone(vit(Beit, use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=1.0))
    config = BeitConfig(
        hidden_size=16, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        image_size=24, patch_size=4, use_relative_position_bias=True, use_mean_pooling=False,
        layer_scale_init_value=1.0, layer_norm_eps=1e-6,
    )  # fmt: skip
    theirs = BeitModel(config, add_pooling_layer=False).eval()
    state = {}
    for name, value in ours.vit.state_dict().items():
        for old, new in (
            ("blocks.", "layers."), ("gamma_", "lambda_"), ("norm1", "layernorm_before"),
            ("norm2", "layernorm_after"), ("attn.proj", "attention.o_proj"),
            ("attn.relative_position", "relative_position_bias.relative_position"),
            ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
            ("cls_token", "embeddings.cls_token"), ("attn.q_bias", "attention.q_proj.bias"),
            ("attn.v_bias", "attention.v_proj.bias"), ("attn.qkv", "attention.qkv"),
        ):  # fmt: skip
            name = name.replace(old, new)
        name = "layernorm" + name[4:] if name.startswith("norm.") else name
        if "qkv.weight" in name:
            for part, chunk in zip("qkv", value.chunk(3), strict=True):
                state[name.replace("qkv", f"{part}_proj")] = chunk
        else:
            state[name] = value
    theirs.load_state_dict(state)
    for size in ((24, 24), (32, 20)):
        x = images(*size)
        with torch.no_grad():
            prefix, grid = ours.tokens(x)[0]
            expected = theirs(x).last_hidden_state
        whole = torch.cat([prefix, grid.flatten(1, 2)], 1)
        torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)


def test_vit_resizes_position_bilinearly() -> None:
    model = backbone(pos_interpolation="bilinear")
    position = model._position((3, 9))
    assert torch.equal(position[:, :1], model.vit.pos_embed[:, :1])
    old = model.vit.pos_embed[:, 1:].unflatten(1, (6, 6))
    new = position[:, 1:].unflatten(1, (3, 9))
    # Halving the rows reads midway between two of them; the middle of columns stays in place.
    middle = old[:, :, 2:4].mean(2).unflatten(1, (3, 2)).mean(2)
    torch.testing.assert_close(new[:, :, 4], middle)
    bicubic = backbone()._position((3, 9))
    expected = resample_abs_pos_embed(model.vit.pos_embed, (3, 9), (6, 6))
    assert torch.equal(bicubic, expected)


def test_vit_hybrid_shows_its_stem() -> None:
    model = build("vit_base_r50_s16_384", IMG_SIZE=64, OUT_BLOCKS=[0, 1]).eval()
    shapes = model.output_shape()
    assert list(shapes) == ["stem0", "stem1", "block0", "block1"]
    with torch.no_grad():
        for size in ((64, 64), (70, 90)):
            x = images(*size, batch=1)
            outputs = model(x)
            for name, value in outputs.items():
                stride = shapes[name].stride
                assert value.shape[1:] == (shapes[name].channels, *(-(-s // stride) for s in size))
        x = images(64, 64, batch=1)
        _, (middle,) = model.vit.forward_intermediates(x, [1])
        assert torch.equal(model(x)["block1"], middle)
        torch.testing.assert_close(
            model(x)["stem1"], model.vit.patch_embed.backbone.stages[:2](
                model.vit.patch_embed.backbone.stem(x)
            )
        )  # fmt: skip


# ---- expedited --------------------------------------------------------------------------------


def test_vit_expedited_equals_hand_composition() -> None:
    reduction = clustered(1, (4, 3))
    model, x = backbone(out_blocks=[0, 2, "last"]), images(32, 40)
    blocks, outputs = model.vit.blocks, []
    with torch.no_grad():
        tokens, grid, _ = model._embed(x)
        tokens = blocks[0](tokens)
        outputs.append(tokens)
        low, clustering = reduce(tokens[:, 1:].unflatten(1, grid), reduction)
        tokens = torch.cat([tokens[:, :1], low.flatten(1, 2)], 1)
        for block in blocks[1:]:
            tokens = block(tokens)
            full = reconstruct(tokens[:, 1:].unflatten(1, (4, 3)), clustering).flatten(1, 2)
            outputs.append(torch.cat([tokens[:, :1], full], 1))
        plain = model.tokens(x)
        model.reduction = reduction
        assert model.reduction == reduction == model.vit.reduction
        expected = [outputs[0], outputs[2], model.vit.norm(outputs[3])]
        for (prefix, maps), theirs in zip(model.tokens(x), expected, strict=True):
            torch.testing.assert_close(torch.cat([prefix, maps.flatten(1, 2)], 1), theirs)
        model.reduction = None
        for ours, theirs in zip(model.tokens(x), plain, strict=True):
            assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
        assert model.reduction is None


@pytest.mark.parametrize("size", [(24, 24), (32, 20)])
def test_vit_expedited_beit_reads_its_bias_at_clusters(size: tuple[int, int]) -> None:
    transformer = vit(Beit, use_rel_pos_bias=True, use_shared_rel_pos_bias=True)
    model, x = backbone(transformer, out_blocks=[3]), images(*size)
    with torch.no_grad():
        plain = model(x)["block3"]
        error = []
        for side in (0.3, 0.9):
            model.reduction = clustered(1, (side, side))
            error.append((model(x)["block3"] - plain).square().mean() / plain.square().mean())
    assert error[1] < 0.5 * error[0]


def test_vit_keeps_clusters_for_heads_that_reconstruct() -> None:
    x, reduction = images(32, 40), clustered(1, (4, 3), mode="replace")
    model = backbone(reduction=reduction)
    with torch.no_grad():
        expected = model(x)["last"]
        assert model(x, as_tokens=True).clustering is None
        model.keep_clusters = True
        features = model(x, as_tokens=True)
        _, low = features.tokens["last"]
        assert low.shape == (2, 4, 3, 16) and model(x)["last"].shape == (2, 16, 4, 3)
        # "replace" is an average, which a normalisation commutes with no more than roughly.
        full = reconstruct(low, features.clustering)
        assert full.shape == (2, 8, 10, 16)
        assert (full - expected.permute(0, 2, 3, 1)).abs().mean() < 0.2
        model.keep_clusters = False
        assert torch.equal(model(x)["last"], expected)


def test_vit_reconstructs_only_what_is_read() -> None:
    from expedite_d2.ops.observe import ObservedOperator

    operator = torch.ops.expedite_d2.token_reconstruct.default
    for outputs, count in ((["last"], 1), ([0, 1, 3], 2), ([0, 2], 1), ([0], 0)):
        model = backbone(out_blocks=outputs, reduction=clustered(1, (4, 3)))
        with torch.no_grad(), ObservedOperator(operator, lambda args, out: None) as observed:
            model(images(32, 40))
        assert len(observed.kept) == count


def test_vit_copies_pickles_and_calibrates() -> None:
    x = images(32, 40, batch=1)
    model = backbone(out_blocks=[1, "last"], reduction=clustered(1, (4, 3)))
    with torch.no_grad():
        expected = model(x)["last"]
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x)["last"], expected)
        temperature = calibrate(nn.Sequential(model), [x]).cluster.temperature
        assert model.reduction == clustered(1, (4, 3), temperature=temperature)
        torch.testing.assert_close(model(x)["last"], expected, rtol=1e-4, atol=1e-5)


def test_vit_replicas_of_beit_have_their_own_table() -> None:
    attention = backbone(vit(Beit, use_rel_pos_bias=True)).vit.blocks[0].attn
    replica = attention._replicate_for_data_parallel()
    assert replica._get_rel_pos_bias.owner is replica
    assert attention._get_rel_pos_bias.owner is attention


def test_vit_trains_with_and_without_checkpointing() -> None:
    gradients = []
    for use in (False, True):
        transformer = vit(Beit, use_rel_pos_bias=True)
        model = backbone(transformer, out_blocks=[2], use_checkpoint=use).train()
        model.reduction = clustered(1, (4, 3))
        model(images(32, 40))["block2"].square().sum().backward()
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        # Neither the last block nor the norm is needed: nobody may wait for their gradients.
        assert trained == set(found) and not any("blocks.3" in name for name in found)
        gradients.append(found)
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_vit_compiles_without_breaks() -> None:
    torch.compiler.reset()
    x = images(32, 40)
    for transformer in (vit(), vit(Beit, use_rel_pos_bias=True)):
        model = backbone(transformer, out_blocks=[2, "last"], reduction=clustered(1, (4, 3)))
        with torch.no_grad():
            compiled = torch.compile(model, fullgraph=True, backend="eager")(x)
            for name, value in model(x).items():
                torch.testing.assert_close(compiled[name], value)


# ---- configuration and errors -----------------------------------------------------------------


def config(name: str, **keys: Any) -> Any:
    cfg = get_cfg()
    add_expedite_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "ExpeditedViT"
    small = {"NAME": name, "EMBED_DIM": 32, "DEPTH": 2, "NUM_HEADS": 2}
    for key, value in {**small, **keys}.items():
        cfg.MODEL.VIT[key] = value
    return cfg


def build(name: str, **keys: Any) -> Any:
    return build_backbone(config(name, **keys))


def test_vit_is_built_from_config() -> None:
    assert BACKBONE_REGISTRY.get("ExpeditedViT") is ExpeditedViT
    cfg = config("vit_large_patch16_384", OUT_BLOCKS=[1, "last"], POS_INTERPOLATION="bilinear")
    cfg.MODEL.EXPEDITE.ENABLED = True
    cfg.MODEL.EXPEDITE.ALPHA = 1
    cfg.MODEL.EXPEDITE.CLUSTERS = [0.5, 0.5]
    model = build_backbone(cfg)
    assert model.reduction == clustered(1, (0.5, 0.5)) and model.pos_interpolation == "bilinear"
    assert {k: (v.channels, v.stride) for k, v in model.output_shape().items()} == {
        "block1": (32, 16),
        "last": (32, 16),
    }
    assert model.size_divisibility == 16
    assert model.padding_constraints == {"size_divisibility": 16, "square_size": 0}
    assert model(images(70, 40))["last"].shape == (2, 32, 5, 3)


@pytest.mark.parametrize(
    ("name", "prefixes"),
    [
        ("deit_base_distilled_patch16_384", 2),
        ("vit_small_patch14_reg4_dinov2", 5),
        ("beit_base_patch16_384", 1),
        ("vit_huge_patch14_224", 1),
    ],
)
def test_vit_families_are_built_from_their_names(name: str, prefixes: int) -> None:
    model = build(name, IMG_SIZE=56 if "patch14" in name else 64)
    ((prefix, grid),) = model.tokens(images(60, 100, batch=1))
    side = model.size_divisibility
    assert prefix.shape == (1, prefixes, 32)
    assert grid.shape == (1, -(-60 // side), -(-100 // side), 32)


def test_vit_is_built_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = build("vit_base_r50_s16_384")
        outputs = model(torch.empty(1, 3, 96, 64))
    assert {name: tuple(value.shape[2:]) for name, value in outputs.items()} == {
        "stem0": (24, 16),
        "stem1": (12, 8),
        "last": (6, 4),
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"out_blocks": []}, r"out_blocks must be 'last' or numbers of blocks, 0 to 3, got \[\]"),
        ({"out_blocks": [4]}, r"out_blocks must be .*, got \[4\]"),
        ({"out_blocks": ["res5"]}, r"out_blocks must be .*, got \['res5'\]"),
        ({"pos_interpolation": "area"}, "pos_interpolation must be one of bicubic, bilinear, got"),
        ({"reduction": clustered(4, (3, 3))}, "alpha must be less than the 4 blocks of VisionT"),
        ({"vit": nn.Linear(2, 2)}, "needs timm's VisionTransformer or Beit, got Linear"),
    ],
)
def test_vit_refuses_bad_arguments(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpeditedViT(**{"vit": vit(), **settings})


@pytest.mark.parametrize("name", ["resnet50", "vit_gigantic_patch1", "vit_relpos_base_patch16_224"])
def test_vit_refuses_other_names(name: str) -> None:
    with pytest.raises(ValueError, match=f"MODEL.VIT.NAME must be .*, got '{name}'"):
        build(name)


def test_vit_refuses_bad_images() -> None:
    with pytest.raises(ValueError, match=r"expects images \(B, 3, H, W\), got \(3, 32, 32\)"):
        backbone()(torch.zeros(3, 32, 32))

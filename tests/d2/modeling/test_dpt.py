"""ExpeditedDPT: parity with transformers, inputs of any shape, the hourglass, and training."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import DPTConfig, DPTForDepthEstimation

import expedite_d2.d2.modeling  # noqa: F401 (registers the architectures)
from expedite_d2.d2 import build_model
from expedite_d2.d2.checkpoint.dpt import from_transformers
from expedite_d2.d2.comparison.cost import count_gflops
from expedite_d2.d2.config import load_config
from expedite_d2.d2.modeling.meta_arch.dpt import ExpeditedDPT

TINY = Path(__file__).parent / "dpt_tiny.yaml"
HYBRID = [
    "MODEL.VIT.NAME", "vit_base_r50_s16_384",
    "MODEL.VIT.OUT_BLOCKS", "[2, 3]",
    "MODEL.DPT.NECK_CHANNELS", "[256, 512, 24, 24]",
    "MODEL.DPT.REASSEMBLE_FACTORS", "[1, 1, 1, 0.5]",
]  # fmt: skip
EXPEDITED = [
    "MODEL.EXPEDITE.ENABLED", "True",
    "MODEL.EXPEDITE.ALPHA", "1",
    "MODEL.EXPEDITE.CLUSTERS", "[2, 2]",
]  # fmt: skip


def build(*opts: str, seed: int = 0) -> ExpeditedDPT:
    torch.manual_seed(seed)
    return build_model(load_config(TINY, opts)).eval()


def transformers_dpt(hybrid: bool) -> DPTForDepthEstimation:
    torch.manual_seed(1)
    neck = {"neck_hidden_sizes": [8, 16, 24, 24], "reassemble_factors": [4, 2, 1, 0.5]}
    if hybrid:
        neck = {
            "neck_hidden_sizes": [256, 512, 24, 24],
            "reassemble_factors": [1, 1, 1, 0.5],
            "backbone_featmap_shape": [1, 1024, 4, 4],
        }
    model = DPTForDepthEstimation(
        DPTConfig(
            is_hybrid=hybrid,
            hidden_size=48,
            num_hidden_layers=4,
            num_attention_heads=3,
            intermediate_size=192,
            image_size=64,
            backbone_out_indices=[0, 1, 2, 3],
            fusion_hidden_size=16,
            **neck,
        )
    ).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            module.reset_parameters()  # transformers' own are so small that nothing comes through
    for name, parameter in model.named_parameters():
        # Zeros at the start, and a last layer whose output would be hidden by its ReLU.
        if name.endswith(("cls_token", "position_embeddings")):
            nn.init.normal_(parameter, std=0.5)
        elif name == "head.head.4.bias":
            nn.init.ones_(parameter)
    return model


@pytest.mark.parametrize(
    ("hybrid", "side"), [(False, 64), (False, 96), (True, 64)], ids=["vit", "resized", "hybrid"]
)
def test_equals_transformers_at_square_sizes(hybrid: bool, side: int) -> None:
    theirs = transformers_dpt(hybrid)
    ours = build(*(HYBRID if hybrid else []))
    ours.load_state_dict(from_transformers(theirs.state_dict()), strict=True)
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        expected = theirs(images).predicted_depth
        logits = ours.logits(images)
    assert expected.std() > 1e-3
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def inputs(rows: int, columns: int, **fields) -> dict:
    image = torch.randint(0, 256, (3, rows, columns), dtype=torch.uint8)
    return {"image": image, **fields}


@pytest.mark.parametrize("opts", [[], EXPEDITED, HYBRID, [*HYBRID, *EXPEDITED]])
def test_images_of_any_shape(opts: list[str]) -> None:
    model = build(*opts)
    batch = [inputs(70, 130), inputs(64, 64, height=50, width=91), inputs(33, 140)]
    with torch.no_grad():
        outputs = model(batch)
    assert [tuple(out["depth"].shape) for out in outputs] == [(70, 130), (50, 91), (33, 140)]
    for out in outputs:
        assert out["depth"].dtype == torch.float32
        assert out["depth"].isfinite().all() and (out["depth"] > 0).all()


def test_depth_of_the_release_is_inverse() -> None:
    model = build("MODEL.DPT.SCALE", "0.000305", "MODEL.DPT.SHIFT", "0.1378")
    logits = torch.tensor([0.0, 1000.0])
    torch.testing.assert_close(model.depth(logits), torch.tensor([7.2568940, 1 / 0.4428]))
    model = build("MODEL.DPT.INVERSE", "False", "MODEL.DPT.SHIFT", "0.5")
    torch.testing.assert_close(model.depth(logits), torch.tensor([0.5, 100.5]))
    model = build("MODEL.DPT.SHIFT", "0.0")
    assert model.depth(torch.zeros(1)).isfinite()


def test_expedited_shares_the_weights_and_differs_a_little() -> None:
    plain, expedited = build(), build(*EXPEDITED, seed=1)
    state = expedited.state_dict()
    assert list(state) == list(plain.state_dict())
    plain.load_state_dict(state, assign=True)
    images = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        difference = (plain.logits(images) - expedited.logits(images)).abs().max()
    assert 0 < difference < 0.5
    expedited.backbone.reduction = None
    with torch.no_grad():
        assert torch.equal(plain.logits(images), expedited.logits(images))


def test_expediting_saves_multiply_adds_of_the_backbone_alone() -> None:
    plain, expedited = (count_gflops(build(*opts), 64, 128) for opts in ([], EXPEDITED))
    assert expedited["backbone"] < 0.8 * plain["backbone"]
    heads = [cost["model"] - cost["backbone"] for cost in (plain, expedited)]
    assert heads[0] == pytest.approx(heads[1], rel=1e-6)


def test_hooks_on_the_backbone_see_the_pass() -> None:
    model = build(*EXPEDITED)
    seen = []
    handle = model.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    with torch.no_grad():
        model([inputs(64, 64)])
    handle.remove()
    assert seen == [(1, 3, 64, 64)]


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_stand_alone(copier) -> None:
    model = build(*EXPEDITED)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model.logits(images)
        copied = copier(model)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(copied.logits(images), expected)


def test_half_precision_stays_close() -> None:
    model = build(*EXPEDITED, "TEST.DTYPE", "bfloat16")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        half = model.logits(images)
        model.eval_dtype = torch.float32
        full = model.logits(images)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, atol=0.05, rtol=0.05)


def test_every_parameter_that_learns_gets_a_gradient() -> None:
    model = build("MODEL.DPT.GRADIENT_WEIGHT", "0.5").train()
    depth = torch.rand(64, 96) * 20 + 1
    depth[:20] = 0
    losses = model([inputs(64, 96, depth=depth), inputs(64, 64, depth=depth[:, :64])])
    assert set(losses) == {"loss_silog", "loss_gradient"}
    sum(losses.values()).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_it_learns_one_image() -> None:
    model = build().train()
    sample = inputs(64, 64, depth=torch.linspace(2, 40, 64)[:, None].expand(64, 64).contiguous())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    history = []
    for _ in range(60):
        loss = model([sample])["loss_silog"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.5 * history[0]


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.VIT.OUT_BLOCKS", "[1, 2, 3]"], "fuses four features.*got block1, block2, block3"),
        (["MODEL.DPT.NECK_CHANNELS", "[8, 16]"], "must be a list of 4 values"),
        ([*HYBRID, "MODEL.DPT.NECK_CHANNELS", "[8, 512, 24, 24]"], "expected 256 at 0"),
        (["MODEL.BACKBONE.NAME", "ExpeditedSwinTransformer"], "needs MODEL.BACKBONE.NAME"),
    ],
)
def test_wrong_settings_are_named(opts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(*opts)

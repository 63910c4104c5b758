"""ExpeditedSegmenter: decoders, placements, sliding window and loss, on a few thousand weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import expedite_d2.d2.modeling  # noqa: F401 (registers the architectures)
from expedite_d2.d2 import build_model
from expedite_d2.d2.config import load_config
from expedite_d2.d2.modeling.meta_arch.segmenter_decoders import MaskDecoder
from expedite_d2.reducers import reconstruct, reduce

TINY = Path(__file__).parent / "segmenter_tiny.yaml"
CONFIGS = Path(__file__).parents[3] / "configs"
CLASSES = 5
EXPEDITED = ("MODEL.EXPEDITE.ENABLED", True)
PAPER = (*EXPEDITED, "MODEL.SEGMENTER.PLACEMENT", "paper")


def build(*opts):
    torch.manual_seed(0)
    model = build_model(load_config(TINY, opts))
    with torch.no_grad():  # the small initial values make every token the same
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def image(height=32, width=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (height, width), generator=generator)
    labels[:2] = 255
    pixels = torch.randint(0, 256, (3, height, width), generator=generator).to(torch.uint8)
    return {"image": pixels, "sem_seg": labels}


# --- evaluation -------------------------------------------------------------------------------


@pytest.mark.parametrize("opts", [(), EXPEDITED, PAPER], ids=["plain", "features", "paper"])
@pytest.mark.parametrize("decoder", ["mask", "linear"])
def test_probabilities_have_the_asked_size(opts, decoder):
    model = build(*opts, "MODEL.SEGMENTER.DECODER", decoder).eval()
    inputs = [image(30, 41) | {"height": 60, "width": 50}, image(32, 32, seed=1)]
    with torch.no_grad():
        first, second = (result["sem_seg"] for result in model(inputs))
    assert first.shape == (CLASSES, 60, 50) and second.shape == (CLASSES, 32, 32)
    torch.testing.assert_close(first.sum(0), torch.ones(60, 50))


def test_logits_are_those_of_the_patches_resized():
    model = build().eval()
    images = torch.randn(2, 3, 30, 38)
    with torch.no_grad():
        logits = model.logits(images)
        padded = F.pad(images, (0, 2, 0, 2))
        tokens = model.backbone(padded)["last"].permute(0, 2, 3, 1)
        maps = model.decoder(tokens).permute(0, 3, 1, 2)
    assert maps.shape == (2, CLASSES, 8, 10)
    expected = F.interpolate(maps, size=(32, 40), mode="bilinear", align_corners=False)
    torch.testing.assert_close(logits, expected[..., :30, :38])


def test_sliding_window_averages_logits():
    model = build("TEST.SLIDING_WINDOW.ENABLED", True).eval()
    plain = build().eval()
    images = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        logits = model.logits(images)
        left, right = plain.logits(images[..., :32]), plain.logits(images[..., 16:])
    torch.testing.assert_close(logits[..., :16], left[..., :16])
    torch.testing.assert_close(logits[..., 16:32], (left[..., 16:] + right[..., :16]) / 2)
    torch.testing.assert_close(logits[..., 32:], right[..., 16:])


def test_sliding_window_is_for_evaluation_alone():
    model = build("TEST.SLIDING_WINDOW.ENABLED", True).train()
    plain = build().train()
    images = torch.randn(1, 3, 32, 48)
    torch.testing.assert_close(model.logits(images), plain.logits(images))


def test_features_placement_decodes_what_the_backbone_gives():
    model, plain = build(*EXPEDITED).eval(), build().eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        tokens = model.backbone(images)["last"].permute(0, 2, 3, 1)
        maps = model.decoder(tokens).permute(0, 3, 1, 2)
        expected = F.interpolate(maps, size=(32, 32), mode="bilinear", align_corners=False)
        torch.testing.assert_close(model.logits(images), expected)
        assert not torch.allclose(model.logits(images), plain.logits(images), atol=1e-3)


@pytest.mark.parametrize("reconstruction", ["replace", "residual"])
def test_paper_placement_decodes_clusters_and_replaces_logits(reconstruction):
    model = build(*PAPER, "MODEL.EXPEDITE.RECONSTRUCTION", reconstruction).eval()
    plain = build().eval()
    vit = plain.backbone.vit
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = model.logits(images)
        x = plain.backbone._embed(images)[0]
        x = vit.blocks[0](x)
        low, clustering = reduce(x[:, 1:].unflatten(1, (8, 8)), model.backbone.reduction)
        x = torch.cat([x[:, :1], low.flatten(1, 2)], dim=1)
        for block in vit.blocks[1:]:
            x = block(x)
        maps = plain.decoder(vit.norm(x)[:, 1:].unflatten(1, (4, 4)))
        clustering = clustering._replace(tokens=None, centres=None)
        maps = reconstruct(maps, clustering).permute(0, 3, 1, 2)
    expected = F.interpolate(maps, size=(32, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(logits, expected)


def test_without_a_reduction_the_placement_makes_no_difference():
    images = torch.randn(1, 3, 32, 40)
    with torch.no_grad():
        logits = [
            build("MODEL.SEGMENTER.PLACEMENT", placement).eval().logits(images)
            for placement in ("features", "paper")
        ]
    assert torch.equal(*logits)


@pytest.mark.parametrize("placement", ["features", "paper"])
def test_an_image_below_the_cluster_grid_runs_unreduced(placement):
    model = build(*EXPEDITED, "MODEL.SEGMENTER.PLACEMENT", placement).eval()
    images = torch.randn(1, 3, 16, 16)
    with torch.no_grad(), pytest.warns(UserWarning, match="runs unreduced"):
        logits = model.logits(images)
    with torch.no_grad():
        torch.testing.assert_close(logits, build().eval().logits(images))


@pytest.mark.parametrize("opts", [(), PAPER], ids=["plain", "paper"])
def test_autocast_at_evaluation_stays_close(opts):
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        full = build(*opts).eval().logits(images)
        half = build(*opts, "TEST.DTYPE", "bfloat16").eval().logits(images)
    assert half.dtype == torch.float32
    assert (half - full).abs().mean() < 0.05 * full.std()


# --- decoder ----------------------------------------------------------------------------------


def test_mask_decoder_by_hand():
    """Without blocks and norms: cosines of projected tokens and class embeddings."""
    decoder = MaskDecoder(2, 3, 2, depth=0, num_heads=1, mlp_ratio=4.0, dropout=0, drop_path_rate=0)
    decoder.decoder_norm = decoder.mask_norm = nn.Identity()
    with torch.no_grad():
        decoder.proj_dec.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0]]))
        decoder.cls_emb.copy_(torch.tensor([[[1.0, 0], [3, 4]]]))
        decoder.proj_patch.copy_(torch.tensor([[2.0, 0], [0, 2]]))
        decoder.proj_classes.copy_(torch.tensor([[0.0, 1], [1, 0]]))  # swaps the two
        logits = decoder(torch.tensor([[[[5.0, 0, 9], [0, 7, 9], [1, 1, 9]]]]))
    r = 0.5**0.5
    expected = torch.tensor([[0, 0.8], [1, 0.6], [r, 1.4 * r]])
    torch.testing.assert_close(logits, expected.view(1, 1, 3, 2))


# --- training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["mask", "linear"])
def test_training_reaches_every_parameter(decoder):
    model = build("MODEL.SEGMENTER.DECODER", decoder).train()
    losses = model([image(32, 32), image(24, 40, seed=1)])
    assert set(losses) == {"loss_sem_seg"} and losses["loss_sem_seg"].isfinite()
    losses["loss_sem_seg"].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_loss_is_the_cross_entropy_of_the_labelled_pixels():
    model = build().train()
    inputs = image(32, 32)
    pixels = (inputs["image"] - model.pixel_mean) / model.pixel_std
    logits = model.logits(pixels[None])[0].permute(1, 2, 0)
    counted = inputs["sem_seg"] != 255
    expected = F.cross_entropy(logits[counted], inputs["sem_seg"][counted])
    torch.testing.assert_close(model([inputs])["loss_sem_seg"], expected)


def test_training_learns_one_image():
    model = build_model(load_config(TINY)).train()
    inputs = image(32, 32)
    inputs["sem_seg"][2:, :16], inputs["sem_seg"][2:, 16:] = 1, 3
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    totals = []
    for _ in range(30):
        loss = model([inputs])["loss_sem_seg"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(loss.item())
    assert totals[-1] < 0.3 * totals[0]


def test_missing_labels_are_named():
    with pytest.raises(ValueError, match="needs inputs with 'sem_seg'"):
        build().train()([{"image": image()["image"]}])


# --- configs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("opts", "named"),
    [
        (("MODEL.SEGMENTER.DECODER", "maks"), "MODEL.SEGMENTER.DECODER"),
        (("MODEL.SEGMENTER.PLACEMENT", "middle"), "MODEL.SEGMENTER.PLACEMENT"),
        (("MODEL.SEGMENTER.NUM_HEADS", 5), "MODEL.SEGMENTER.NUM_HEADS"),
        (("MODEL.VIT.OUT_BLOCKS", "[1, 'last']"), "MODEL.VIT.OUT_BLOCKS"),
        (("MODEL.BACKBONE.NAME", "ExpeditedSwinTransformer"), "nothing but the last block"),
    ],
)
def test_bad_settings_are_named(opts, named):
    with pytest.raises(ValueError, match=named):
        build(*opts)


VIT_LARGE = sorted(
    p.relative_to(CONFIGS).as_posix() for p in CONFIGS.glob("*/*/segmenter_vit_large*.yaml")
)


def test_vit_large_configs_come_with_two_settings():
    stems = [f"segmenter_vit_large{setting}.yaml" for setting in ("", "_expedited", "_half")]
    datasets = ["ade20k", "cityscapes", "pascal_context"]
    assert VIT_LARGE == [f"{dataset}/semantic/{stem}" for dataset in datasets for stem in stems]


@pytest.mark.parametrize("config", VIT_LARGE)
def test_vit_large_configs_build(config):
    cfg = load_config(CONFIGS / config, ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        model = build_model(cfg)
    assert (model.backbone.reduction is None) == config.endswith("_large.yaml")
    # The paper's decoder runs on clusters.
    assert model.backbone.keep_clusters == config.endswith("_expedited.yaml")
    assert model.sliding_window.crop == (cfg.MODEL.VIT.IMG_SIZE,) * 2
    assert 317e6 < sum(p.numel() for p in model.parameters()) < 335e6

"""A checkpoint as the start of a training: what fits is loaded, what does not is told."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import expedite_d2.d2.modeling  # noqa: F401 (registers the architectures)
from expedite_d2.d2 import build_model
from expedite_d2.d2.checkpoint import load_weights
from expedite_d2.d2.config import load_config

MODELS = Path(__file__).parents[1] / "modeling"
HTC = ("MODEL.META_ARCHITECTURE", "ExpeditedHTC", "MODEL.SEM_SEG_HEAD.COMMON_STRIDE", 8)
PANOPTIC = (
    "MODEL.META_ARCHITECTURE",
    "ExpeditedPanopticFPN",
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE",
    4,
)
LINEAR = ("MODEL.SEGMENTER.DECODER", "linear")
AUX = ("MODEL.MASK_FORMER.SEM_AUX_WEIGHT", 1.0)
BEIT = ("MODEL.VIT.NAME", "beit_base_patch16_224")


def build(family: str, *opts: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return build_model(load_config(MODELS / f"{family}_tiny.yaml", opts)).eval()


def save(model: Any, path: Path) -> dict[str, torch.Tensor]:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save({"model": state}, path)
    return state


def unchanged(model: Any, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


CASES = [
    ("mask2former", (), "SEM_SEG_HEAD.NUM_CLASSES", 3, 5, "class_predictor.weight"),
    ("mask2former", AUX, "SEM_SEG_HEAD.NUM_CLASSES", 9, 5, "sem_aux.weight"),
    (
        "mask2former",
        (),
        "MASK_FORMER.NUM_OBJECT_QUERIES",
        4,
        7,
        "transformer_module.queries_embedder.weight",
    ),
    ("segmenter", (), "SEM_SEG_HEAD.NUM_CLASSES", 3, 5, "decoder.cls_emb"),
    ("segmenter", LINEAR, "SEM_SEG_HEAD.NUM_CLASSES", 8, 5, "decoder.head.weight"),
    ("detector", HTC, "ROI_HEADS.NUM_CLASSES", 7, 3, "roi_heads.box_heads.0.cls_score.weight"),
    ("detector", HTC, "SEM_SEG_HEAD.NUM_CLASSES", 7, 5, "semantic_branch.predictor.weight"),
    ("detector", PANOPTIC, "ROI_HEADS.NUM_CLASSES", 1, 3, "roi_heads.box_heads.0.cls_score.bias"),
    ("detector", PANOPTIC, "SEM_SEG_HEAD.NUM_CLASSES", 2, 5, "sem_seg_head.predictor.weight"),
]


@pytest.mark.parametrize(("family", "opts", "key", "value", "theirs", "random"), CASES)
def test_another_number_of_classes_or_queries(
    family: str,
    opts: tuple[Any, ...],
    key: str,
    value: int,
    theirs: int,
    random: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "model.pth"
    source = save(build(family, *opts, seed=1), path)
    model = build(family, *opts, f"MODEL.{key}", value)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_weights(model, path)
    sentence = f"to evaluate it, set MODEL.{key} to {theirs}; a training may begin from what fits"
    assert sentence in str(caught.value)
    assert unchanged(model, before)

    with caplog.at_level(logging.INFO, logger="expedite_d2"):
        load_weights(model, path, strict=False)
    different = [name for name in before if before[name].shape != source[name].shape]
    assert random in different
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, (before if name in different else source)[name]), name
    told = f"lacks, or has in other shapes, {len(different)} names of the model"
    assert [r.levelname for r in caplog.records if told in r.getMessage()] == ["WARNING"]
    assert all(name in caplog.text for name in different)


@pytest.mark.parametrize(
    ("family", "opts", "trained", "size", "mode"),
    [
        ("segmenter", (), 32, 64, "bilinear"),
        ("segmenter", (), 64, 32, "bilinear"),
        ("segmenter", ("MODEL.VIT.NAME", "deit_tiny_distilled_patch16_224"), 32, 48, "bicubic"),
        ("segmenter", BEIT, 32, 48, "bilinear"),
        ("dpt", (), 64, 96, "bilinear"),
        ("dpt", (), 64, 128, "bicubic"),
    ],
)
def test_another_image_size_gives_the_features_of_that_image(
    family: str,
    opts: tuple[Any, ...],
    trained: int,
    size: int,
    mode: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "model.pth"
    opts = (*opts, "MODEL.VIT.POS_INTERPOLATION", mode, "MODEL.VIT.IMG_SIZE")
    source = build(family, *opts, trained, seed=1)
    for parameter in source.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    save(source, path)
    model = build(family, *opts, size)
    with pytest.raises(ValueError, match=f"to evaluate it, set MODEL.VIT.IMG_SIZE to {trained};"):
        load_weights(model, path)
    load_weights(model, path, strict=False)
    assert f"was trained with MODEL.VIT.IMG_SIZE {trained}: " in caplog.text
    assert "names of the model" not in caplog.text  # all of them fit
    images = torch.randn(1, 3, size, size)
    with torch.no_grad():
        expected, features = source.backbone(images), model.backbone(images)
    for name, feature in features.items():
        torch.testing.assert_close(feature, expected[name], rtol=1e-4, atol=1e-5)


def test_several_differences_are_told_together(tmp_path: Path) -> None:
    save(build("segmenter"), tmp_path / "model.pth")
    opts = ("MODEL.VIT.IMG_SIZE", 64, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 9)
    with pytest.raises(ValueError) as caught:
        load_weights(build("segmenter", *opts), tmp_path / "model.pth")
    assert "set MODEL.VIT.IMG_SIZE to 32 and MODEL.SEM_SEG_HEAD.NUM_CLASSES to 5" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("family", "theirs", "opts"),
    [
        ("segmenter", (), LINEAR),
        ("segmenter", LINEAR, ()),
        ("segmenter", (), ("MODEL.SEGMENTER.DEPTH", 3)),
        ("segmenter", (), ("MODEL.VIT.DEPTH", 6)),
        ("mask2former", (), ("MODEL.MASK_FORMER.DEC_LAYERS", 3)),
        ("mask2former", (), ("MODEL.MASK_FORMER.HIDDEN_DIM", 24)),
        ("detector", HTC, PANOPTIC),
        ("dpt", (), ("MODEL.DPT.FUSION_CHANNELS", 32)),
    ],
)
def test_another_head_keeps_its_random_weights(
    family: str,
    theirs: tuple[Any, ...],
    opts: tuple[Any, ...],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "model.pth"
    source = save(build(family, *theirs, seed=1), path)
    model = build(family, *opts)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="another model.*; a training may begin from what fits"):
        load_weights(model, path)
    assert unchanged(model, before)
    load_weights(model, path, strict=False)
    for name, tensor in model.state_dict().items():
        fits = name in source and source[name].shape == tensor.shape
        assert torch.equal(tensor, (source if fits else before)[name]), name
    assert "names of the model" in caplog.text or "names that the model lacks" in caplog.text


@pytest.mark.parametrize(
    ("source", "theirs", "family", "opts"),
    [
        ("segmenter", (), "mask2former", ()),
        ("mask2former", (), "segmenter", ()),
        ("dpt", (), "mask2former", ()),
        ("segmenter", (), "segmenter", ("MODEL.VIT.EMBED_DIM", 48)),
        ("mask2former", (), "mask2former", ("MODEL.SWIN.VERSION", 2, "MODEL.SWIN.EMBED_DIM", 16)),
        ("mask2former", (), "detector", HTC),
        ("segmenter", ("MODEL.VIT.DEPTH", 2), "segmenter", ("MODEL.VIT.DEPTH", 7)),
    ],
)
def test_another_backbone_is_an_error_even_then(
    source: str,
    theirs: tuple[Any, ...],
    family: str,
    opts: tuple[Any, ...],
    tmp_path: Path,
) -> None:
    save(build(source, *theirs, seed=1), tmp_path / "model.pth")
    model = build(family, *opts)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for strict in (True, False):
        with pytest.raises(ValueError, match="another model") as caught:
            load_weights(model, tmp_path / "model.pth", strict=strict)
        assert "a training may begin" not in str(caught.value)
        assert unchanged(model, before)


def test_a_backbone_of_another_model_begins_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A depth model's ViT under a Segmenter: the task is another, the backbone the same."""
    sizes = ("MODEL.VIT.IMG_SIZE", 64, "MODEL.VIT.PATCH_SIZE", 16, "MODEL.VIT.EMBED_DIM", 48,
             "MODEL.VIT.NUM_HEADS", 3)  # fmt: skip
    source = save(build("dpt", seed=1), tmp_path / "dpt.pth")
    model = build("segmenter", *sizes)
    load_weights(model, tmp_path / "dpt.pth", strict=False)
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, source[f"backbone.{name}"])
    assert "names that the model lacks: neck." in caplog.text


@pytest.mark.parametrize("strict", [True, False])
def test_the_same_model_says_nothing(
    strict: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = save(build("mask2former", seed=1), tmp_path / "model.pth")
    model = build("mask2former")
    load_weights(model, tmp_path / "model.pth", strict=strict)
    assert unchanged(model, source) and not caplog.records


@pytest.mark.parametrize(
    "shape", [(1,), (1, 65), (1, 66, 24), (1, 1, 24), (1, 65, 23), (2, 17, 24), (1, 0, 24), ()]
)
def test_positions_of_no_grid_are_no_positions(shape: tuple[int, ...], tmp_path: Path) -> None:
    state = build("segmenter", seed=1).state_dict()
    state["backbone.vit.pos_embed"] = torch.ones(shape)
    torch.save(state, tmp_path / "model.pth")
    model = build("segmenter", "MODEL.VIT.IMG_SIZE", 64)
    with pytest.raises(ValueError, match="1 of them differ in shape: backbone.vit.pos_embed"):
        load_weights(model, tmp_path / "model.pth")
    before = model.backbone.vit.pos_embed.detach().clone()
    load_weights(model, tmp_path / "model.pth", strict=False)
    assert torch.equal(model.backbone.vit.pos_embed, before)

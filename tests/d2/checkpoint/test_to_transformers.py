"""A Mask2Former as a directory for transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

from expedite_d2 import Cluster, Reduction, expedite
from expedite_d2.__main__ import main
from expedite_d2.d2 import MetadataCatalog, build_model
from expedite_d2.d2.checkpoint import load_weights
from expedite_d2.d2.checkpoint.convert import convert
from expedite_d2.d2.checkpoint.matching import is_training_only
from expedite_d2.d2.checkpoint.to_transformers import to_transformers
from expedite_d2.d2.config import load_config
from expedite_d2.d2.config.loading import find_weights

TINY = str(Path(__file__).parents[1] / "modeling/mask2former_tiny.yaml")


def build(*opts: Any, seed: int = 0) -> Any:
    """The tiny model, in which no weight hides behind an initial zero or one."""
    torch.manual_seed(seed)
    model = build_model(load_config(TINY, opts)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    return model


def assert_same_logits(ours: Any, theirs: Any, size: tuple[int, int]) -> None:
    images = torch.randn(2, 3, *size)
    with torch.inference_mode():
        expected = theirs(pixel_values=images)
        classes, masks = ours.logits(images)
    torch.testing.assert_close(classes, expected.class_queries_logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(masks, expected.masks_queries_logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "opts",
    [
        [],
        ["MODEL.SWIN.QKV_BIAS", False, "MODEL.SWIN.MLP_RATIO", 3.0, "MODEL.SWIN.WINDOW_SIZE", 5],
        ["MODEL.MASK_FORMER.SEM_AUX_WEIGHT", 1.0, "MODEL.MASK_FORMER.DEEP_SUPERVISION", False],
        ["MODEL.MASK_FORMER.HIDDEN_DIM", 64, "MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ", True],
    ],
)
def test_logits_are_the_same(opts: list[Any]) -> None:
    model = build(*opts)
    theirs = to_transformers(load_config(TINY, opts), model)
    assert not theirs.training
    for size in [(64, 96), (100, 70)]:
        assert_same_logits(model, theirs, size)
    for each in (model, theirs):
        expedite(each, Reduction((Cluster(3, (2, 2)),)))
    assert_same_logits(model, theirs, (100, 70))


@pytest.mark.parametrize("official", [False, True])
def test_command_writes_a_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], official: bool
) -> None:
    source, folder = tmp_path / "model.pth", tmp_path / "folder"
    torch.save({"model": build().state_dict()}, tmp_path / "whole.pth")
    convert(tmp_path / "whole.pth", source, official=official)
    main(["convert", "--transformers", TINY, str(source), str(folder)])
    assert f"wrote {folder}" in capsys.readouterr().out
    model, again = build(seed=1), build(seed=2)
    load_weights(model, source)
    assert_same_logits(model, Mask2FormerForUniversalSegmentation.from_pretrained(folder), (64, 96))
    load_weights(again, folder)
    for name, tensor in model.state_dict().items():
        if not is_training_only(name):
            assert torch.equal(tensor, again.state_dict()[name]), name


def test_images_are_prepared_as_ours(tmp_path: Path) -> None:
    torch.save({"model": build().state_dict()}, tmp_path / "whole.pth")
    main(["convert", "--transformers", TINY, str(tmp_path / "whole.pth"), str(tmp_path / "folder")])
    processor = AutoImageProcessor.from_pretrained(tmp_path / "folder")
    cfg = load_config(TINY)
    assert processor.size["shortest_edge"] == cfg.INPUT.MIN_SIZE_TEST
    assert processor.size["longest_edge"] == cfg.INPUT.MAX_SIZE_TEST
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    theirs = processor(image, do_resize=False, return_tensors="pt").pixel_values
    torch.testing.assert_close(theirs, build().preprocess([image]).tensor)


def test_classes_have_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    opts = ["DATASETS.TRAIN", "('five_classes',)"]
    model, cfg = build(*opts), load_config(TINY, opts)
    assert to_transformers(cfg, model).config.id2label[3] == "LABEL_3"
    MetadataCatalog.get("five_classes").stuff_classes = list("abcde")
    try:
        config = to_transformers(cfg, model).config
    finally:
        MetadataCatalog.remove("five_classes")
    assert config.id2label[3] == "d" and config.label2id["e"] == 4 and config.num_labels == 5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.SWIN.VERSION", 2),
        ("MODEL.SWIN.APE", True),
        ("MODEL.SWIN.PATCH_NORM", False),
        ("INPUT.FORMAT", "BGR"),
    ],
)
def test_what_transformers_has_not_is_refused(key: str, value: Any) -> None:
    opts = [key, value]
    with pytest.raises(ValueError, match=f"{key} must be .* for transformers' Mask2Former"):
        to_transformers(load_config(TINY, opts), build(*opts))


def test_other_models_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = "scenes/semantic/segmenter_vit_mini.yaml"
    weights = str(find_weights("expedite_d2://segmenter_vit_mini.pth"))
    with pytest.raises(SystemExit) as ended:
        main(["convert", "--transformers", config, weights, str(tmp_path / "folder")])
    assert ended.value.code == 2
    assert "got ExpeditedSegmenter on ExpeditedViT" in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()


def test_weights_of_another_config_are_refused() -> None:
    cfg = load_config(TINY, ["MODEL.MASK_FORMER.DEC_LAYERS", 4])
    with pytest.raises(ValueError, match="do not fit .*unexpected_keys.*decoder.layers.3"):
        to_transformers(cfg, build())


def test_a_file_is_no_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "model.pth"
    source.write_text("")
    with pytest.raises(SystemExit):
        main(["convert", "--transformers", TINY, str(source), str(source)])
    assert "model.pth must be a directory, or not exist yet" in capsys.readouterr().err

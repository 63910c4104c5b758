"""Exported weights: whole, the backbone alone, and models that share one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from official_cases import official_names

import expedite_d2.d2.modeling  # noqa: F401 (registers the architectures)
from expedite_d2.d2 import build_model
from expedite_d2.d2.checkpoint import load_weights
from expedite_d2.d2.checkpoint.convert import convert
from expedite_d2.d2.checkpoint.matching import is_training_only
from expedite_d2.d2.checkpoint.official import to_mask2former
from expedite_d2.d2.config import load_config

TINY = Path(__file__).parents[1] / "modeling/mask2former_tiny.yaml"


def build(*opts, seed=0):
    torch.manual_seed(seed)
    return build_model(load_config(TINY, opts)).eval()


def test_exported_backbone_fills_the_backbone_alone(tmp_path, caplog):
    source, model, before = build(seed=1), build(seed=2), build(seed=2)
    whole, part = tmp_path / "whole.pth", tmp_path / "part.pth"
    torch.save({"model": source.state_dict()}, whole)
    convert(whole, part, backbone=True)
    load_weights(model, part)
    assert "a backbone alone" in caplog.text
    for name, tensor in model.state_dict().items():
        if name.startswith("backbone."):
            assert torch.equal(tensor, source.state_dict()[name].half().float()), name
        else:
            assert torch.equal(tensor, before.state_dict()[name]), name


def index_by_hand(window):
    """Official Swin's constant: the row of the bias table for each pair of positions."""
    side = 2 * window - 1
    cells = [(row, column) for row in range(window) for column in range(window)]
    rows = [
        [(r - s + window - 1) * side + (c - d + window - 1) for s, d in cells] for r, c in cells
    ]
    return torch.tensor(rows)


@pytest.mark.parametrize("backbone", [False, True])
def test_every_swin_block_is_exported_with_its_position_index(tmp_path, backbone):
    source = build(seed=1)
    torch.save({"model": source.state_dict()}, tmp_path / "whole.pth")
    convert(tmp_path / "whole.pth", tmp_path / "part.pth", backbone=backbone)
    state = torch.load(tmp_path / "part.pth", weights_only=True)["model"]
    tables = [name for name in state if name.endswith("relative_position_bias_table")]
    assert len(tables) == 6
    indices = [state[name.replace("bias_table", "index")] for name in tables]
    assert all(torch.equal(index, index_by_hand(4)) for index in indices)
    assert len({index.data_ptr() for index in indices}) == 1  # written once
    # Exported again, they are written again; and a part's base may lack them or have them.
    convert(tmp_path / "part.pth", tmp_path / "again.pth", backbone=backbone)
    again = torch.load(tmp_path / "again.pth", weights_only=True)["model"]
    assert again.keys() == state.keys()


def test_version_2_and_other_models_have_no_position_index(tmp_path):
    state = {"backbone.vit.blocks.0.attn.relative_position_bias_table": torch.zeros(12, 2)}
    state["backbone.layers.0.blocks.0.attn.cpb_mlp.0.weight"] = torch.zeros(2, 2)
    torch.save({"model": state}, tmp_path / "whole.pth")
    convert(tmp_path / "whole.pth", tmp_path / "part.pth")
    assert torch.load(tmp_path / "part.pth", weights_only=True)["model"].keys() == state.keys()


def test_official_names_and_shapes_are_complete():
    cfg = load_config("coco/panoptic/mask2former_swin_large.yaml", ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        own = build_model(cfg).state_dict()
    del own["criterion.empty_weight"]  # as in a file of export
    official = {name: tuple(tensor.shape) for name, tensor in to_mask2former(own).items()}
    assert official == official_names()


@pytest.mark.parametrize(
    "opts",
    [
        [],
        ["MODEL.SWIN.WINDOW_SIZE", "7"],
        ["MODEL.SWIN.APE", "True"],
        ["MODEL.MASK_FORMER.SEM_AUX_WEIGHT", "1.0"],
        ["MODEL.MASK_FORMER.DEC_LAYERS", "3", "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", "1"],
    ],
)
def test_official_export_comes_back_as_it_was(tmp_path, opts):
    source, model = build(*opts, seed=1), build(*opts, seed=2)
    torch.save({"model": source.state_dict()}, tmp_path / "whole.pth")
    convert(tmp_path / "whole.pth", tmp_path / "official.pth", official=True)
    official = torch.load(tmp_path / "official.pth", weights_only=True)["model"]
    assert not any(name.startswith(("transformer_module.", "sem_aux")) for name in official)
    assert torch.equal(official["criterion.empty_weight"], source.criterion.empty_weight)
    # The official head renames what does not say that it has its second version's names.
    assert official._metadata["sem_seg_head"] == {"version": 2}
    load_weights(model, tmp_path / "official.pth")
    for name, tensor in model.state_dict().items():
        if not is_training_only(name):
            assert torch.equal(tensor, source.state_dict()[name].half().float()), name


def test_class_weights_of_the_official_loss_come_from_its_configs(tmp_path):
    source = build(seed=1)
    torch.save({"model": source.state_dict()}, tmp_path / "whole.pth")
    convert(tmp_path / "whole.pth", tmp_path / "small.pth")
    convert(tmp_path / "small.pth", tmp_path / "official.pth", official=True)
    official = torch.load(tmp_path / "official.pth", weights_only=True)["model"]
    assert official["criterion.empty_weight"].tolist() == pytest.approx([1, 1, 1, 1, 1, 0.1])


def test_official_names_are_for_whole_mask2formers_alone(tmp_path):
    torch.save({"backbone.vit.norm.weight": torch.zeros(2)}, tmp_path / "segmenter.pth")
    with pytest.raises(ValueError, match="segmenter.pth has no official counterpart: its names"):
        convert(tmp_path / "segmenter.pth", tmp_path / "out.pth", official=True)
    with pytest.raises(ValueError, match="written for a whole model"):
        convert(tmp_path / "segmenter.pth", tmp_path / "out.pth", backbone=True, official=True)
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.detectron2
def test_exported_backbone_is_loaded_strictly_by_the_official_one(tmp_path, mask2former_swin):
    source = build(seed=1)
    torch.save({"model": source.state_dict()}, tmp_path / "whole.pth")
    convert(tmp_path / "whole.pth", tmp_path / "backbone.pth", backbone=True)
    state = torch.load(tmp_path / "backbone.pth", weights_only=True)["model"]
    official = mask2former_swin.D2SwinTransformer(load_config(TINY), None)
    official.load_state_dict(
        {name.removeprefix("backbone."): tensor for name, tensor in state.items()}, strict=True
    )
    official.eval()
    images = torch.randn(1, 3, 64, 96)
    half = build(seed=2)
    load_weights(half, tmp_path / "backbone.pth")
    with torch.no_grad():
        expected, features = official(images), half.backbone(images)
    for name, feature in features.items():
        torch.testing.assert_close(feature, expected[name], rtol=0, atol=1e-4)


def test_export_of_a_backbone_needs_one(tmp_path):
    torch.save({"head.weight": torch.zeros(2)}, tmp_path / "head.pth")
    with pytest.raises(ValueError, match="has no backbone"):
        convert(tmp_path / "head.pth", tmp_path / "part.pth", backbone=True)
    assert not (tmp_path / "part.pth").exists()


def exported_on_a_base(tmp_path):
    """A model's weights, of which the backbone is in the file of another model."""
    base, source = build(seed=1), build(seed=2)
    source.backbone.load_state_dict(base.backbone.state_dict())
    for name, model in (("base", base), ("source", source)):
        torch.save({"model": model.state_dict()}, tmp_path / f"{name}_whole.pth")
    convert(tmp_path / "base_whole.pth", tmp_path / "base.pth")
    convert(tmp_path / "source_whole.pth", tmp_path / "whole.pth")
    convert(tmp_path / "source_whole.pth", tmp_path / "heads.pth", base=tmp_path / "base.pth")
    return tmp_path / "heads.pth"


def test_shared_backbone_is_read_from_its_base(tmp_path):
    heads = exported_on_a_base(tmp_path)
    assert heads.stat().st_size < (tmp_path / "whole.pth").stat().st_size
    whole, part = build(seed=3), build(seed=4)
    load_weights(whole, tmp_path / "whole.pth")
    load_weights(part, heads)
    for name, tensor in part.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name


@pytest.mark.parametrize(
    "base, error, message",
    [
        ("missing.pth", FileNotFoundError, "its backbone in .*missing.pth, which is not found"),
        ("../base.pth", ValueError, "base must be the name of a file beside it"),
        (7, ValueError, "base must be the name of a file beside it, got 7"),
        ("heads.pth", ValueError, "checkpoint of another model.*missing are backbone"),
    ],
)
def test_bad_base_is_refused(tmp_path, base, error, message):
    heads = exported_on_a_base(tmp_path)
    content = torch.load(heads, weights_only=True)
    torch.save(content | {"base": base}, heads)
    with pytest.raises(error, match=message):
        load_weights(build(), heads)


def test_export_on_a_base_wants_its_backbone(tmp_path):
    heads = exported_on_a_base(tmp_path)
    whole, base = tmp_path / "whole.pth", tmp_path / "base.pth"
    torch.save({"model": build(seed=5).state_dict()}, tmp_path / "other.pth")
    convert(whole, tmp_path / "backbone.pth", backbone=True)
    written = heads.read_bytes()
    for source, message in [
        (tmp_path / "other.pth", "another backbone than"),
        (tmp_path / "backbone.pth", "nothing but the backbone"),
    ]:
        with pytest.raises(ValueError, match=message):
            convert(source, heads, base=base)
    with pytest.raises(ValueError, match="must lie beside"):
        convert(whole, tmp_path / "folder" / "heads.pth", base=base)
    with pytest.raises(ValueError, match="its own base"):
        convert(whole, base, base=base)
    assert heads.read_bytes() == written

"""Exported weights: whole, the backbone alone, and models that share one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import expedite_d2.models  # noqa: F401 (registers the architectures)
from expedite_d2.checkpoint import load_weights
from expedite_d2.checkpoint.export import export
from expedite_d2.config import load_config
from expedite_d2.d2 import build_model

TINY = Path(__file__).parents[1] / "models/mask2former_tiny.yaml"


def build(seed=0):
    torch.manual_seed(seed)
    return build_model(load_config(TINY)).eval()


def test_exported_backbone_fills_the_backbone_alone(tmp_path, caplog):
    source, model, before = build(seed=1), build(seed=2), build(seed=2)
    whole, part = tmp_path / "whole.pth", tmp_path / "part.pth"
    torch.save({"model": source.state_dict()}, whole)
    export(whole, part, backbone=True)
    load_weights(model, part)
    assert "a backbone alone" in caplog.text
    for name, tensor in model.state_dict().items():
        if name.startswith("backbone."):
            assert torch.equal(tensor, source.state_dict()[name].half().float()), name
        else:
            assert torch.equal(tensor, before.state_dict()[name]), name


def test_export_of_a_backbone_needs_one(tmp_path):
    torch.save({"head.weight": torch.zeros(2)}, tmp_path / "head.pth")
    with pytest.raises(ValueError, match="has no backbone"):
        export(tmp_path / "head.pth", tmp_path / "part.pth", backbone=True)
    assert not (tmp_path / "part.pth").exists()


def exported_on_a_base(tmp_path):
    """A model's weights, of which the backbone is in the file of another model."""
    base, source = build(seed=1), build(seed=2)
    source.backbone.load_state_dict(base.backbone.state_dict())
    for name, model in (("base", base), ("source", source)):
        torch.save({"model": model.state_dict()}, tmp_path / f"{name}_whole.pth")
    export(tmp_path / "base_whole.pth", tmp_path / "base.pth")
    export(tmp_path / "source_whole.pth", tmp_path / "whole.pth")
    export(tmp_path / "source_whole.pth", tmp_path / "heads.pth", base=tmp_path / "base.pth")
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
    export(whole, tmp_path / "backbone.pth", backbone=True)
    written = heads.read_bytes()
    for source, message in [
        (tmp_path / "other.pth", "another backbone than"),
        (tmp_path / "backbone.pth", "nothing but the backbone"),
    ]:
        with pytest.raises(ValueError, match=message):
            export(source, heads, base=base)
    with pytest.raises(ValueError, match="must lie beside"):
        export(whole, tmp_path / "folder" / "heads.pth", base=base)
    with pytest.raises(ValueError, match="its own base"):
        export(whole, base, base=base)
    assert heads.read_bytes() == written

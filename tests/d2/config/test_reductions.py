"""The settings of `MODEL.EXPEDITE` as a `Reduction`: clustering, merging, or a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from expedite_d2.__main__ import main
from expedite_d2.d2 import build_model
from expedite_d2.d2.checkpoint import load_weights
from expedite_d2.d2.config import load_config
from expedite_d2.reducers import Cluster, Correction, Merge, Reduction
from expedite_d2.reducers.correction import fingerprint
from expedite_d2.tools import describe

MODELS = Path(__file__).parents[1] / "modeling"
CONFIGS = Path(__file__).parents[3] / "configs"
# Sizes at which the half configs were made.
HALF = {
    "ade20k/semantic/segmenter_vit_large": (640, 640),
    "cityscapes/semantic/segmenter_vit_large": (768, 768),
    "coco/panoptic/mask2former_swin_large": (1024, 1024),
    "kitti/depth/dpt_vit_hybrid": (352, 1216),
    "nyuv2/depth/dpt_vit_hybrid": (480, 640),
    "pascal_context/semantic/segmenter_vit_large": (480, 480),
    "scenes/depth/dpt_vit_mini": (384, 384),
    "scenes/instance/htc_swin_mini": (384, 384),
    "scenes/panoptic/mask2former_swin_mini": (384, 384),
    "scenes/panoptic/panoptic_fpn_swin_mini": (384, 384),
    "scenes/semantic/segmenter_vit_mini": (384, 384),
}
MERGE = ["MODEL.EXPEDITE.ENABLED", True, "MODEL.EXPEDITE.METHOD", "merge"]
MERGE += ["MODEL.EXPEDITE.MERGE_AT", [1, 2], "MODEL.EXPEDITE.KEEP", 0.8]


def tiny(name: str, opts: list[Any]) -> Any:
    return build_model(load_config(MODELS / f"{name}_tiny.yaml", opts)).eval()


def test_merging_by_config() -> None:
    model = tiny("segmenter", [*MERGE, "MODEL.EXPEDITE.ROUNDS", 1])
    assert model.backbone.reduction == Reduction((Merge(1, 0.8, 1), Merge(2, 0.8, 1)))
    with torch.inference_mode():
        (out,) = model([{"image": torch.rand(3, 64, 80) * 255, "height": 64, "width": 80}])
    assert out["sem_seg"].shape[1:] == (64, 80) and out["sem_seg"].isfinite().all()


@pytest.mark.parametrize(
    ("name", "opts", "message"),
    [
        ("segmenter", [*MERGE, "MODEL.EXPEDITE.MERGE_AT", []], "MERGE_AT must list the blocks"),
        ("segmenter", [*MERGE, "MODEL.EXPEDITE.KEEP", 0.3], "keep must be at least 0.5"),
        (
            "segmenter",
            [*MERGE, "MODEL.EXPEDITE.METHOD", "drop"],
            "METHOD must be one of 'cluster', 'merge', got",
        ),
        ("mask2former", MERGE, "this encoder takes a Cluster alone, got Merge"),
    ],
)
def test_merging_that_cannot_be_is_refused(name: str, opts: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(name, opts)


def test_settings_file_decides_alone(tmp_path: Path) -> None:
    folder = tmp_path / "configs"
    folder.mkdir()
    settings = Reduction((Cluster(2, (3, 3), topk=2),))
    settings.save(folder / "settings.yaml")
    (folder / "named.yaml").write_text(
        f"_BASE_: {MODELS / 'segmenter_tiny.yaml'}\n"
        "MODEL: {EXPEDITE: {ENABLED: True, ALPHA: 0, SETTINGS: settings.yaml}}\n"
    )
    below = folder / "below"
    below.mkdir()
    (below / "inherits.yaml").write_text("_BASE_: ../named.yaml\n")
    for config in (folder / "named.yaml", below / "inherits.yaml"):
        assert build_model(load_config(config)).backbone.reduction == settings
    with pytest.raises(FileNotFoundError, match="none.yaml"):
        build_model(load_config(folder / "named.yaml", ["MODEL.EXPEDITE.SETTINGS", "none.yaml"]))


@pytest.mark.parametrize("name", ["segmenter", "mask2former"])
def test_detail_maps_come_with_the_settings_and_are_checked_with_the_weights(
    name: str, tmp_path: Path
) -> None:
    opts = ["MODEL.EXPEDITE.ENABLED", True, "MODEL.EXPEDITE.ALPHA", 2]
    opts += ["MODEL.EXPEDITE.CLUSTERS", [2, 2] if name == "mask2former" else [3, 3]]
    opts += ["MODEL.MASK_FORMER.TEST.PANOPTIC_ON", False]
    opts += ["MODEL.MASK_FORMER.TEST.INSTANCE_ON", False]
    torch.manual_seed(0)
    model = tiny(name, opts)
    backbone = model.backbone
    (number,) = backbone.read_outs()
    width = 96 if name == "mask2former" else backbone.vit.embed_dim
    maps = {number: (0.1 * torch.randn(1, width, width), torch.randn(width))}
    plain = backbone.reduction
    found = replace(plain, correction=Correction(maps, fingerprint(backbone)))
    image = 255 * torch.rand(3, 64, 80)
    inputs = [{"image": image, "height": 64, "width": 80}]
    with torch.inference_mode():
        without = model(inputs)[0]["sem_seg"]
        backbone.reduction = found
        assert not torch.equal(model(inputs)[0]["sem_seg"], without)
    found.save(tmp_path / "settings.yaml")
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    again = tiny(name, [*opts, "MODEL.EXPEDITE.SETTINGS", str(tmp_path / "settings.yaml")])
    load_weights(again, str(tmp_path / "weights.pth"))
    with torch.inference_mode():
        for ours, theirs in zip(model(inputs), again(inputs), strict=True):
            assert torch.equal(ours["sem_seg"], theirs["sem_seg"])
        with torch.autocast("cpu", torch.bfloat16):
            assert again(inputs)[0]["sem_seg"].isfinite().all()
    words = ["--config-file", str(MODELS / f"{name}_tiny.yaml"), "--size", "64", "64", *opts]
    main(["cost", *map(str, [*words, "MODEL.EXPEDITE.SETTINGS", tmp_path / "settings.yaml"])])
    torch.save({"model": tiny(name, opts).state_dict()}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="fitted to other weights .*: calibrate again"):
        load_weights(again, str(tmp_path / "other.pth"))


@pytest.mark.slow
@pytest.mark.parametrize("name", HALF)
def test_half_configs_leave_half_of_the_blocks_multiply_adds(name: str) -> None:
    cfg = load_config(CONFIGS / f"{name}_half.yaml", ["MODEL.DEVICE", "meta"])
    assert 0.49 < describe(build_model(cfg), HALF[name]).share_of_blocks < 0.515
    plain = load_config(CONFIGS / f"{name}.yaml", ["MODEL.DEVICE", "meta"])
    plain.MODEL.EXPEDITE = cfg.MODEL.EXPEDITE
    assert plain == cfg


def test_every_half_config_is_counted() -> None:
    found = {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*_half.yaml")}
    assert found == {f"{name}_half.yaml" for name in HALF}

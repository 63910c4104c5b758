"""Data sets and mappers of depth: layouts, DPT's sizes, and depth that stays with its image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from expedite_d2.d2 import CfgNode, DatasetCatalog, MetadataCatalog
from expedite_d2.d2.config import add_expedite_config
from expedite_d2.d2.data import depth as depth_module
from expedite_d2.d2.data.depth import (
    DepthTestMapper,
    DepthTrainMapper,
    crop_origin,
    network_size,
    read_depth,
)
from expedite_d2.d2.data.kitti import load_kitti, register_kitti
from expedite_d2.d2.data.nyuv2 import load_nyuv2, register_nyuv2

KITTI_DRIVE = "2011_09_26/2011_09_26_drive_0002_sync/image_02/data"
KITTI_DEPTH = "2011_09_26_drive_0002_sync/proj_depth/groundtruth/image_02"


@pytest.fixture
def depth_cfg(cfg: CfgNode) -> CfgNode:
    add_expedite_config(cfg)
    cfg.INPUT.DATASET_MAPPER_NAME = "depth"
    cfg.MODEL.DPT.TEST_SIZE = [352, 1216]
    return cfg


def write_image(path: Path, size: tuple[int, int]) -> None:
    """Red counts rows, green counts columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, columns = np.indices(size)
    pixels = np.stack([rows % 256, columns % 256, np.zeros(size, int)], -1).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def write_depth(path: Path, size: tuple[int, int]) -> None:
    """Units of 256 times (row mod 256), so that metres are rows in KITTI's scale."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = np.indices(size)[0] % 256
    Image.fromarray((rows * 256).astype(np.uint16)).save(path)


@pytest.fixture
def kitti(tmp_path: Path) -> Path:
    """KITTI's test list with an image of each of the benchmark's splits and one without truth."""
    root = tmp_path / "kitti"
    for number in (1, 2, 3):
        write_image(root / "raw" / KITTI_DRIVE / f"{number:010d}.png", (375, 1242))
    write_depth(root / "data_depth_annotated/train" / KITTI_DEPTH / "0000000001.png", (375, 1242))
    write_depth(root / "data_depth_annotated/val" / KITTI_DEPTH / "0000000002.png", (375, 1242))
    lines = [
        f"{KITTI_DRIVE}/0000000001.png {KITTI_DEPTH}/0000000001.png 721.5377",
        f"{KITTI_DRIVE}/0000000002.png {KITTI_DEPTH}/0000000002.png 721.5377",
        f"{KITTI_DRIVE}/0000000003.png None 721.5377",
        "",
    ]
    (root / "eigen_test_files_with_gt.txt").write_text("\n".join(lines))
    return root


def load(root: Path) -> list[dict]:
    return load_kitti(
        "kitti_eigen_test",
        root / "eigen_test_files_with_gt.txt",
        root / "raw",
        root / "data_depth_annotated",
    )


def test_kitti_keeps_the_images_that_have_a_depth_map(kitti: Path) -> None:
    first, second = load(kitti)
    assert first["image_id"] == f"{KITTI_DRIVE}/0000000001.png"
    assert Path(first["file_name"]).is_file() and "train" in first["depth_file_name"]
    assert Path(second["depth_file_name"]).is_file() and "val" in second["depth_file_name"]
    assert first["benchmark_crop"] == (352, 1216)


@pytest.mark.parametrize(
    "missing",
    ["eigen_test_files_with_gt.txt", "raw", "data_depth_annotated", "a depth map"],
)
def test_missing_kitti_is_named(kitti: Path, missing: str) -> None:
    path = kitti / missing
    if missing == "a depth map":
        path = kitti / "data_depth_annotated/train" / KITTI_DEPTH / "0000000001.png"
        path.unlink()
    else:
        path.rename(kitti / "elsewhere")
    with pytest.raises(FileNotFoundError, match="DETECTRON2_DATASETS") as caught:
        load(kitti)
    assert str(path) in str(caught.value) and "'kitti_eigen_test'" in str(caught.value)


def test_a_broken_list_is_named(kitti: Path) -> None:
    (kitti / "eigen_test_files_with_gt.txt").write_text("only_an_image.png\n")
    with pytest.raises(ValueError, match="line 1 of .*eigen_test_files_with_gt.txt must name"):
        load(kitti)


def test_nyuv2(tmp_path: Path) -> None:
    folder = tmp_path / "sync"
    write_image(folder / "kitchen_0028b/rgb_00045.jpg", (480, 640))
    write_depth(folder / "kitchen_0028b/sync_depth_00045.png", (480, 640))
    line = "/kitchen_0028b/rgb_00045.jpg /kitchen_0028b/sync_depth_00045.png 518.8579\n"
    (tmp_path / "list.txt").write_text(line)
    (entry,) = load_nyuv2("nyuv2_train", tmp_path / "list.txt", folder)
    assert Path(entry["file_name"]).is_file() and entry["depth_scale"] == 1 / 1000
    depth = read_depth(entry["depth_file_name"], entry["depth_scale"])
    assert depth.dtype == np.float32 and depth[100, 0] == pytest.approx(25.6)
    Path(entry["depth_file_name"]).unlink()
    with pytest.raises(FileNotFoundError, match="sync_depth_00045.png.*DETECTRON2_DATASETS"):
        load_nyuv2("nyuv2_train", tmp_path / "list.txt", folder)


def test_names_and_metadata(tmp_path: Path) -> None:
    names = [f"{data}_{split}" for data in ("kitti_eigen", "nyuv2") for split in ("train", "test")]
    taken = [name for name in names if name in DatasetCatalog.list()]
    register_kitti(tmp_path)
    register_nyuv2(tmp_path)
    try:
        for name in names:
            metadata = MetadataCatalog.get(name)
            assert metadata.evaluator_type == "depth"
            kitti = name.startswith("kitti")
            assert metadata.depth_max == (80 if kitti else 10)
            assert metadata.depth_scale == (1 / 256 if kitti else 1 / 1000)
            assert metadata.depth_crop == ("garg" if kitti else "nyu")
            with pytest.raises(FileNotFoundError, match="DETECTRON2_DATASETS"):
                DatasetCatalog.get(name)
    finally:
        for name in set(names) - set(taken):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


@pytest.mark.parametrize(
    ("size", "target", "expected"),
    [
        # The release's own cases.
        ((352, 1216), (352, 1216), (352, 1216)),
        ((480, 640), (480, 640), (480, 640)),
        ((384, 384), (384, 384), (384, 384)),
        # Of 384/480 = 0.8 and 384/640 = 0.6 the first is nearer to 1: 384 x 512.
        ((480, 640), (384, 384), (384, 512)),
        # Of 2 and 1.5 the second: 288 x 384.
        ((192, 256), (384, 384), (288, 384)),
        ((375, 1242), (352, 1216), (352, 1216)),
        ((10, 2000), (384, 384), (32, 384)),
    ],
)
def test_network_size(size, target, expected) -> None:
    assert network_size(*size, target) == expected


def test_test_mapper_takes_the_benchmark_crop(depth_cfg: CfgNode, kitti: Path) -> None:
    sample = DepthTestMapper(depth_cfg)(load(kitti)[0])
    assert sample["crop"] == (23, 13, 352, 1216)
    assert (sample["height"], sample["width"]) == (352, 1216)
    assert sample["image"].shape == (3, 352, 1216) and sample["image"].dtype == torch.uint8
    # Red counts rows and green columns of the whole image.
    assert sample["image"][:2, 0, 0].tolist() == [23, 13]


def test_test_mapper_resizes_and_keeps_the_original_size(
    depth_cfg: CfgNode, tmp_path: Path
) -> None:
    write_image(tmp_path / "a.png", (100, 150))
    depth_cfg.MODEL.DPT.TEST_SIZE = [64, 96]
    sample = DepthTestMapper(depth_cfg)({"file_name": str(tmp_path / "a.png")})
    assert sample["image"].shape == (3, 64, 96)
    assert (sample["height"], sample["width"]) == (100, 150) and "crop" not in sample


def test_crop_of_a_small_image_is_refused() -> None:
    with pytest.raises(ValueError, match="a.png must be at least 352x1216.*got 300x1242"):
        crop_origin((300, 1242), (352, 1216), "a.png")


def test_train_mapper_keeps_depth_with_its_image(depth_cfg: CfgNode, kitti: Path) -> None:
    depth_cfg.INPUT.CROP.ENABLED, depth_cfg.INPUT.CROP.TYPE = True, "absolute"
    depth_cfg.INPUT.CROP.SIZE = [200, 200]
    mapper, entry = DepthTrainMapper(depth_cfg), load(kitti)[0]
    flipped = set()
    for seed in range(8):
        sample = mapper(entry, np.random.default_rng(seed))
        assert sample["image"].shape == (3, 200, 200) and sample["depth"].dtype == torch.float32
        assert torch.equal(sample["image"][0].float(), sample["depth"])
        step = int(sample["image"][1, 0, 100]) - int(sample["image"][1, 0, 99])
        flipped.add(step in (-1, 255))
    assert flipped == {True, False}
    same = [mapper(entry, np.random.default_rng(5)) for _ in range(2)]
    assert torch.equal(same[0]["image"], same[1]["image"])


def test_training_has_the_scale_of_the_test(depth_cfg: CfgNode, tmp_path: Path) -> None:
    depth_cfg.MODEL.DPT.TEST_SIZE = [96, 128]
    depth_cfg.INPUT.CROP.ENABLED, depth_cfg.INPUT.RANDOM_FLIP = False, "none"
    metres = np.where(np.arange(512) < 200, 2, 6) * np.ones((384, 1), int)
    metres[:, 400:] = 0  # not measured
    Image.fromarray((metres * 256).astype(np.uint16)).save(tmp_path / "depth.png")
    Image.fromarray((metres * 40).astype(np.uint8)).convert("RGB").save(tmp_path / "image.png")
    entry = {
        "file_name": str(tmp_path / "image.png"),
        "depth_file_name": str(tmp_path / "depth.png"),
        "depth_scale": 1 / 256,
    }
    sample = DepthTrainMapper(depth_cfg)(entry, np.random.default_rng(0))
    assert sample["image"].shape == DepthTestMapper(depth_cfg)(entry)["image"].shape
    assert sample["depth"].shape == (96, 128)
    assert sample["depth"].unique().tolist() == [0, 2, 6]
    # Bicubic resizing alters the colours of two pixels beside each of the two edges.
    agree = (sample["image"][0].float() / 40 - sample["depth"]).abs() < 0.5
    assert agree.float().mean() > 1 - 8 / 128


def test_train_mapper_changes_colours_alone(depth_cfg: CfgNode, kitti: Path) -> None:
    depth_cfg.INPUT.CROP.ENABLED, depth_cfg.INPUT.RANDOM_FLIP = False, "none"
    entry = load(kitti)[0]
    plain = DepthTrainMapper(depth_cfg)(entry, np.random.default_rng(1))
    assert plain["image"].shape == (3, 352, 1216)
    depth_cfg.INPUT.COLOR_AUG_SSD = True
    mapper = DepthTrainMapper(depth_cfg)
    samples = [mapper(entry, np.random.default_rng(seed)) for seed in range(3)]
    assert any(not torch.equal(sample["image"], plain["image"]) for sample in samples)
    assert all(torch.equal(sample["depth"], plain["depth"]) for sample in samples)


def test_train_mapper_names_what_is_wrong(depth_cfg: CfgNode, kitti: Path, tmp_path: Path) -> None:
    mapper, entry = DepthTrainMapper(depth_cfg), load(kitti)[0]
    with pytest.raises(ValueError, match="'depth_file_name' in the data set; 'coco' has none"):
        mapper.usable("coco", [{"file_name": "a.jpg"}])
    assert mapper.usable("kitti_eigen_test", [entry]) == [entry]
    write_depth(tmp_path / "small.png", (4, 5))
    with pytest.raises(ValueError, match=r"image's size \(375, 1242\), got \(4, 5\)"):
        mapper({**entry, "depth_file_name": str(tmp_path / "small.png")}, np.random.default_rng())


def test_scenes_with_depth(
    scenes_cache: Path, monkeypatch: pytest.MonkeyPatch, depth_cfg: CfgNode
) -> None:
    from expedite_d2.d2.data.scenes import depth as scenes_depth
    from expedite_d2.d2.data.scenes.dataset import load_scenes

    metadata = MetadataCatalog.get("scenes_val").as_dict()
    scenes = load_scenes("val", scenes_cache, metadata)
    monkeypatch.setattr(scenes_depth.DatasetCatalog, "get", lambda name: scenes)
    entries = scenes_depth.load_scenes_depth("val")
    assert len(entries) == 3 and "annotations" not in entries[0]
    depth_cfg.INPUT.RANDOM_FLIP = "none"
    depth_cfg.INPUT.CROP.ENABLED = False
    depth_cfg.MODEL.DPT.TEST_SIZE = [384, 384]
    sample = DepthTrainMapper(depth_cfg)(entries[0], np.random.default_rng(0))
    assert sample["depth"].shape == (384, 384)
    assert 1 < sample["depth"].max() <= 100 and sample["depth"].min() >= 0
    assert depth_module.DEPTH_MAPPER_NAME == depth_cfg.INPUT.DATASET_MAPPER_NAME

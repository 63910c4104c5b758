"""Mappers: sizes as Detectron2 computes them, and masks that stay with their image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from expedite_d2.d2 import CfgNode, DatasetCatalog, MetadataCatalog
from expedite_d2.d2.data import TestMapper, TrainMapper
from expedite_d2.d2.data.mappers import read_image, shortest_edge_size
from expedite_d2.d2.data.scenes.dataset import load_scenes


@pytest.fixture
def scene(scenes_cache: Path) -> dict[str, Any]:
    metadata = MetadataCatalog.get("scenes_train").as_dict()
    return load_scenes("train", scenes_cache, metadata)[0]


@pytest.mark.parametrize(
    ("source", "shortest", "longest", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1067)),
        ((640, 480), 800, 1333, (1067, 800)),
        ((427, 640), 800, 1333, (800, 1199)),
        ((300, 1000), 800, 1333, (400, 1333)),
        ((375, 500), 1024, 2560, (1024, 1365)),
        ((384, 384), 384, 640, (384, 384)),
    ],
)
def test_shortest_edge_size(source, shortest, longest, expected) -> None:
    assert shortest_edge_size(*source, shortest, longest) == expected


def test_test_mapper_resizes_and_keeps_the_original_size(cfg: CfgNode, coco: Path) -> None:
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 80, 110
    entry = DatasetCatalog.get("coco_2017_val_panoptic")[0]
    sample = TestMapper(cfg)(entry)
    assert sample["image"].shape == (3, 73, 110) and sample["image"].dtype == torch.uint8
    assert (sample["height"], sample["width"]) == (40, 60)
    assert sample["segments_info"] == entry["segments_info"] and "image" not in entry


def _panoptic_cfg(cfg: CfgNode) -> CfgNode:
    cfg.INPUT.DATASET_MAPPER_NAME = "coco_panoptic_lsj"
    cfg.INPUT.IMAGE_SIZE = 384
    return cfg


def test_train_mapper_without_jitter_is_the_annotation(cfg: CfgNode, scene: dict[str, Any]) -> None:
    _panoptic_cfg(cfg)
    cfg.INPUT.MIN_SCALE = cfg.INPUT.MAX_SCALE = 1.0
    cfg.INPUT.RANDOM_FLIP = "none"
    sample = TrainMapper(cfg)(scene, np.random.default_rng(0))
    assert np.array_equal(sample["image"].permute(1, 2, 0), read_image(scene["file_name"]))
    labels = np.asarray(Image.open(scene["sem_seg_file_name"]))
    assert np.array_equal(sample["sem_seg"], labels) and sample["sem_seg"].dtype == torch.int64
    instances = sample["instances"]
    areas = [segment["area"] for segment in scene["segments_info"]]
    assert instances.gt_masks.dtype == torch.bool
    assert instances.gt_masks.sum((1, 2)).tolist() == areas
    assert instances.gt_classes.tolist() == [s["category_id"] for s in scene["segments_info"]]


@pytest.mark.parametrize("scales", [(0.3, 0.6), (1.2, 2.4)])
def test_train_mapper_keeps_masks_with_their_image(
    cfg: CfgNode, scene: dict[str, Any], scales: tuple[float, float]
) -> None:
    _panoptic_cfg(cfg)
    cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE = scales
    cfg.INPUT.IMAGE_SIZE = 192
    mapper = TrainMapper(cfg)
    for seed in range(6):
        sample = mapper(scene, np.random.default_rng(seed))
        masks, classes = sample["instances"].gt_masks, sample["instances"].gt_classes
        assert sample["image"].shape == (3, 192, 192)
        assert masks.shape[1:] == sample["sem_seg"].shape == (192, 192)
        assert masks.any(2).any(1).all() and (masks.sum(0) <= 1).all()
        painted = torch.full((192, 192), 255)
        for mask, number in zip(masks, classes, strict=True):
            painted[mask] = number
        assert torch.equal(painted, sample["sem_seg"])
        padding = (sample["image"] == 128).all(0)
        assert (sample["sem_seg"][padding] == 255).float().mean() > 0.99 or not padding.any()


def test_train_mapper_resizes_image_and_labels_alike(cfg: CfgNode, tmp_path: Path) -> None:
    """The picture shows the labels themselves, so that each pixel can be compared."""
    labels = np.zeros((96, 128), np.uint8)
    labels[20:70, 30:90] = 1
    Image.fromarray(labels).save(tmp_path / "labels.png")
    Image.fromarray(np.repeat(labels[..., None] * 200, 3, 2)).save(tmp_path / "image.png")
    entry = {
        "file_name": str(tmp_path / "image.png"),
        "sem_seg_file_name": str(tmp_path / "labels.png"),
    }
    cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_semantic"
    cfg.INPUT.MIN_SIZE_TRAIN = (72, 120, 200)
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE = True, "absolute"
    cfg.INPUT.CROP.SIZE = [100, 100]
    cfg.INPUT.SIZE_DIVISIBILITY = 112
    mapper = TrainMapper(cfg)
    for seed in range(12):
        sample = mapper(entry, np.random.default_rng(seed))
        assert sample["image"].shape == (3, 112, 112)
        seen = sample["sem_seg"] != 255
        assert seen[:, 100:].sum() == 0 and seen[100:].sum() == 0
        wrong = ((sample["image"][0] > 100).long() != sample["sem_seg"])[seen]
        # Nearest and bilinear sampling may differ along the edge alone.
        assert wrong.float().mean() < 0.02
        for mask, number in zip(
            sample["instances"].gt_masks, sample["instances"].gt_classes, strict=True
        ):
            assert torch.equal(mask, sample["sem_seg"] == number)


@pytest.mark.parametrize(
    ("kind", "size", "expected"),
    [
        ("absolute", [30, 500], (30, 60)),
        ("relative", [0.5, 0.5], (20, 30)),
        ("relative_range", [0.9, 0.9], None),
        ("absolute_range", [20, 30], None),
    ],
)
def test_crop_types(cfg: CfgNode, coco: Path, kind: str, size: list, expected) -> None:
    cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_panoptic"
    cfg.INPUT.MIN_SIZE_TRAIN = (40,)
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = True, kind, size
    entry = DatasetCatalog.get("coco_2017_val_panoptic")[0]
    sample = TrainMapper(cfg)(entry, np.random.default_rng(0))
    height, width = sample["image"].shape[1:]
    if expected:
        assert (height, width) == expected
    elif kind == "relative_range":
        assert 36 <= height <= 40 and 54 <= width <= 60
    else:
        assert 20 <= height <= 30 and 20 <= width <= 30


def test_single_category_area_is_avoided(cfg: CfgNode, tmp_path: Path) -> None:
    labels = np.zeros((100, 100), np.uint8)
    labels[:, 80:] = 1
    Image.fromarray(labels).save(tmp_path / "labels.png")
    Image.fromarray(np.zeros((100, 100, 3), np.uint8)).save(tmp_path / "image.png")
    entry = {
        "file_name": str(tmp_path / "image.png"),
        "sem_seg_file_name": str(tmp_path / "labels.png"),
    }
    cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_semantic"
    cfg.INPUT.MIN_SIZE_TRAIN = (100,)
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE = True, "absolute"
    cfg.INPUT.CROP.SIZE = [40, 40]

    def mixed() -> int:
        samples = [TrainMapper(cfg)(entry, np.random.default_rng(n)) for n in range(20)]
        return sum(len(sample["instances"]) == 2 for sample in samples)

    before = mixed()
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 0.9
    assert mixed() > before


def test_instance_mapper_leaves_out_crowds(cfg: CfgNode, coco: Path) -> None:
    cfg.INPUT.DATASET_MAPPER_NAME = "coco_instance_lsj"
    cfg.INPUT.IMAGE_SIZE = 60
    cfg.INPUT.MIN_SCALE = cfg.INPUT.MAX_SCALE = 1.0
    cfg.INPUT.RANDOM_FLIP = "none"
    entry = DatasetCatalog.get("coco_2017_val")[0]
    sample = TrainMapper(cfg)(entry, np.random.default_rng(0))
    assert sample["image"].shape == (3, 60, 60)
    assert sample["instances"].gt_classes.tolist() == [0]
    assert sample["instances"].gt_masks.sum() == 300
    assert sample["instances"].gt_masks[0, 5:20, 10:30].all()
    assert "sem_seg" not in sample


def test_panoptic_mapper_leaves_out_crowds_but_labels_them(cfg: CfgNode, coco: Path) -> None:
    _panoptic_cfg(cfg)
    cfg.INPUT.IMAGE_SIZE = 60
    cfg.INPUT.MIN_SCALE = cfg.INPUT.MAX_SCALE = 1.0
    cfg.INPUT.RANDOM_FLIP = "none"
    entry = DatasetCatalog.get("coco_2017_val_panoptic")[0]
    sample = TrainMapper(cfg)(entry, np.random.default_rng(0))
    assert sample["instances"].gt_masks.sum((1, 2)).tolist() == [30 * 60 - 450, 300]
    assert (sample["sem_seg"][5:20, 40:50] == 0).all()
    assert (sample["sem_seg"][30:] == 255).all()


def test_colour_jitter_changes_the_image_alone(cfg: CfgNode, scene: dict[str, Any]) -> None:
    _panoptic_cfg(cfg)
    cfg.INPUT.MIN_SCALE = cfg.INPUT.MAX_SCALE = 1.0
    cfg.INPUT.RANDOM_FLIP = "none"
    plain = TrainMapper(cfg)(scene, np.random.default_rng(1))
    cfg.INPUT.COLOR_AUG_SSD = True
    mapper = TrainMapper(cfg)
    samples = [mapper(scene, np.random.default_rng(seed)) for seed in range(4)]
    assert any(not torch.equal(sample["image"], plain["image"]) for sample in samples)
    assert all(torch.equal(sample["sem_seg"], plain["sem_seg"]) for sample in samples)


def test_an_unknown_mapper_is_named(cfg: CfgNode) -> None:
    cfg.INPUT.DATASET_MAPPER_NAME = "no_such"
    with pytest.raises(ValueError, match="DATASET_MAPPER_NAME must be one of"):
        TrainMapper(cfg)

"""Samples in which nothing counts: they are mapped, and kept or left out as the config says."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from expedite_d2.d2 import CfgNode
from expedite_d2.d2.data import DepthTrainMapper, TrainMapper, build_train_loader

Entry = dict[str, Any]
SIZE = (30, 40)


def make_entry(folder: Path, number: int, objects: str) -> Entry:
    """An image with every annotation: of one object, of a crowd alone, or of nothing."""
    labels = np.full(SIZE, 255, np.uint8)
    ids = np.zeros((*SIZE, 3), np.uint8)
    record = {"id": 7, "category_id": 1, "iscrowd": int(objects == "crowd")}
    records = [] if objects == "none" else [record]
    if records:
        ids[5:20, 5:30, 0] = 7
    if objects == "one":
        labels[5:20, 5:30] = 1
    paths = {"image": ids, "panoptic": ids, "labels": labels, "depth": labels * np.uint16(0)}
    for name, pixels in paths.items():
        Image.fromarray(pixels).save(folder / f"{name}{number}.png")
    corners = [[5, 5, 30, 5, 30, 20, 5, 20]]
    return {
        "file_name": str(folder / f"image{number}.png"),
        "image_id": number,
        "pan_seg_file_name": str(folder / f"panoptic{number}.png"),
        "segments_info": records,
        "sem_seg_file_name": str(folder / f"labels{number}.png"),
        "annotations": [one | {"segmentation": corners} for one in records],
        "depth_file_name": str(folder / f"depth{number}.png"),
        "depth_scale": 1 / 256,
    }


@pytest.fixture
def mixed(tmp_path: Path, register: Callable[..., None], cfg: CfgNode) -> list[Entry]:
    """A data set of six images: one object, a crowd, nothing, and the same again."""
    kinds = ["one", "crowd", "none"] * 2
    entries = [make_entry(tmp_path, number, kind) for number, kind in enumerate(kinds)]
    register("mixed", lambda: entries)
    cfg.DATASETS.TRAIN = ("mixed",)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.SOLVER.IMS_PER_BATCH = (30,), 6
    return entries


TASKS = ["panoptic", "instance", "semantic"]


@pytest.mark.parametrize(
    "name", [f"mask_former_{t}" for t in TASKS] + ["coco_panoptic_lsj", "coco_instance_lsj"]
)
@pytest.mark.parametrize("objects", ["crowd", "none"])
def test_a_sample_without_targets_is_mapped(
    cfg: CfgNode, tmp_path: Path, name: str, objects: str
) -> None:
    cfg.INPUT.DATASET_MAPPER_NAME, cfg.INPUT.MIN_SIZE_TRAIN = name, (30,)
    cfg.INPUT.IMAGE_SIZE = 48
    sample = TrainMapper(cfg)(make_entry(tmp_path, 0, objects), np.random.default_rng(0))
    instances = sample["instances"]
    assert instances.gt_masks.shape == (0, *sample["image"].shape[1:])
    assert instances.gt_masks.dtype == torch.bool and instances.gt_classes.dtype == torch.int64
    assert len(instances.gt_classes) == len(instances) == 0
    if "sem_seg" in sample:
        crowd = objects == "crowd" and "panoptic" in name
        assert (sample["sem_seg"] != 255).any() == crowd


@pytest.mark.parametrize("task", TASKS)
def test_a_crop_beside_all_objects_is_mapped(cfg: CfgNode, tmp_path: Path, task: str) -> None:
    cfg.INPUT.DATASET_MAPPER_NAME, cfg.INPUT.MIN_SIZE_TRAIN = f"mask_former_{task}", (30,)
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = True, "absolute", [4, 4]
    entry, mapper = make_entry(tmp_path, 0, "one"), TrainMapper(cfg)
    counts = {len(mapper(entry, np.random.default_rng(n))["instances"]) for n in range(30)}
    assert counts == {0, 1}


def test_depth_without_a_measure_is_mapped(cfg: CfgNode, tmp_path: Path) -> None:
    cfg.INPUT.DATASET_MAPPER_NAME = "depth"
    sample = DepthTrainMapper(cfg)(make_entry(tmp_path, 0, "none"), np.random.default_rng(0))
    assert (sample["depth"] == 0).all() and sample["depth"].shape == sample["image"].shape[1:]


@pytest.mark.parametrize(
    ("name", "filtering", "kept"),
    [
        ("mask_former_instance", True, {0, 3}),
        ("coco_instance_lsj", True, {0, 3}),
        ("mask_former_panoptic", True, {0, 3}),
        ("coco_panoptic_lsj", True, {0, 3}),
        ("mask_former_semantic", True, set(range(6))),
        ("depth", True, set(range(6))),
        ("mask_former_instance", False, set(range(6))),
        ("coco_instance_lsj", False, set(range(6))),
        ("mask_former_panoptic", False, set(range(6))),
        ("mask_former_semantic", False, set(range(6))),
        ("depth", False, set(range(6))),
    ],
)
def test_filter_empty_annotations_is_obeyed(
    cfg: CfgNode, mixed: list[Entry], name: str, filtering: bool, kept: set[int], caplog
) -> None:
    cfg.INPUT.DATASET_MAPPER_NAME, cfg.INPUT.IMAGE_SIZE = name, 48
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = filtering
    with caplog.at_level(logging.INFO, logger="expedite_d2.d2.data.mappers"):
        (batch,) = islice(build_train_loader(cfg), 1)
    assert {sample["image_id"] for sample in batch} == kept
    told = "mixed: 4 of 6 images are left out" in caplog.text
    assert told == (len(kept) < 6)


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_a_data_set_of_nothing_but_empty_images_is_refused(
    cfg: CfgNode, mixed: list[Entry], task: str
) -> None:
    del mixed[3], mixed[0]
    cfg.INPUT.DATASET_MAPPER_NAME = f"mask_former_{task}"
    with pytest.raises(ValueError, match="'mixed' has no annotated.*FILTER_EMPTY_ANNOTATIONS"):
        build_train_loader(cfg)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("mask_former_panoptic", "pan_seg_file_name"),
        ("mask_former_panoptic", "segments_info"),
        ("mask_former_instance", "annotations"),
        ("mask_former_semantic", "sem_seg_file_name"),
        ("depth", "depth_file_name"),
        ("depth", "depth_scale"),
    ],
)
def test_every_entry_must_have_annotations(
    cfg: CfgNode, mixed: list[Entry], name: str, field: str
) -> None:
    cfg.INPUT.DATASET_MAPPER_NAME = name
    del mixed[4][field]
    match = f"needs '{field}' in the data set; 1 of the 6 images of 'mixed' have none, .*image4.png"
    with pytest.raises(ValueError, match=match):
        build_train_loader(cfg)
    for entry in mixed:
        entry.pop(field, None)
    with pytest.raises(ValueError, match=f"needs '{field}' in the data set; 'mixed' has none"):
        build_train_loader(cfg)

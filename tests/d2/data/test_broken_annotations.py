"""Annotations that are not what their format says: one sentence that names the file."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from expedite_d2.d2 import CfgNode, DatasetCatalog
from expedite_d2.d2.data import TrainMapper
from expedite_d2.d2.data.kitti import load_kitti
from expedite_d2.d2.data.nyuv2 import load_nyuv2

Change = Callable[[dict[str, Any]], None]


def change_json(path: Path, change: Change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def without(field: str, where: str = "annotations") -> Change:
    def change(content: dict[str, Any]) -> None:
        for entry in content[where]:
            del entry[field]

    return change


def segments_without(field: str) -> Change:
    def change(content: dict[str, Any]) -> None:
        for entry in content["annotations"]:
            for segment in entry["segments_info"]:
                del segment[field]

    return change


def no_list(content: dict[str, Any]) -> None:
    content["annotations"] = {"a": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("image_id"), r"annotations\[0\]: lacks 'image_id'"),
        (without("segments_info"), r"annotations\[0\] \(image_id 1\): it lacks 'segments_info'"),
        (without("id", "images"), r"images\[0\]: lacks 'id'"),
        (segments_without("id"), r"annotations\[0\] .*: segments_info\[0\]: lacks 'id'"),
        (segments_without("category_id"), r"segments_info\[0\] \(id 70000\): lacks 'category_id'"),
        (no_list, "'annotations' must be a list, got {'a': 1}"),
    ],
)
def test_panoptic_json(ade20k: Path, change: Change, message: str) -> None:
    change_json(ade20k / "ADEChallengeData2016/ade20k_panoptic_val.json", change)
    match = f"'ade20k_panoptic_val': .*panoptic_val.json is not a COCO file: .*{message}"
    with pytest.raises(ValueError, match=match):
        DatasetCatalog.get("ade20k_panoptic_val")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("segmentation"), r"annotations\[0\] \(id 1\): lacks 'segmentation'"),
        (without("height", "images"), r"images\[0\] \(id 1\): lacks 'height'"),
        (lambda content: content.pop("images"), "it lacks 'images'"),
    ],
)
def test_instance_json(ade20k: Path, change: Change, message: str) -> None:
    change_json(ade20k / "ADEChallengeData2016/ade20k_instance_val.json", change)
    match = f"instance_val.json is not a COCO file: {message}"
    with pytest.raises(ValueError, match=match):
        DatasetCatalog.get("ade20k_instance_val")


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[1, 2]], r"must be polygons or run lengths, got \[\[1, 2\]\]"),
        ([], r"must be polygons or run lengths, got \[\]"),
        (None, "must be polygons or run lengths, got None"),
        ({"size": [5, 5], "counts": [1, 24]}, "must have its image's size 40x60, got 5x5"),
    ],
)
def test_segmentations(cfg: CfgNode, ade20k: Path, segmentation: Any, message: str) -> None:
    cfg.INPUT.DATASET_MAPPER_NAME = "coco_instance_lsj"
    entry = DatasetCatalog.get("ade20k_instance_val")[0]
    entry["annotations"][0]["segmentation"] = segmentation
    with pytest.raises(ValueError, match=f"annotations of .*000000000001.jpg: .*{message}"):
        TrainMapper(cfg)(entry, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("task", "field", "pixels", "message"),
    [
        ("semantic", "sem_seg_file_name", np.zeros((40, 60, 3), np.uint8), r"\(40, 60, 3\)"),
        ("semantic", "sem_seg_file_name", np.zeros((20, 30), np.uint8), r"\(20, 30\)"),
        ("semantic", "sem_seg_file_name", np.zeros((80, 90), np.uint8), r"\(80, 90\)"),
        ("panoptic", "pan_seg_file_name", np.zeros((40, 60), np.uint8), r"\(40, 60\)"),
        ("panoptic", "pan_seg_file_name", np.zeros((20, 30, 3), np.uint8), r"\(20, 30, 3\)"),
    ],
)
def test_label_maps(
    cfg: CfgNode, ade20k: Path, task: str, field: str, pixels: np.ndarray, message: str
) -> None:
    cfg.INPUT.DATASET_MAPPER_NAME = f"mask_former_{task}"
    entry = DatasetCatalog.get("ade20k_panoptic_val")[0]
    Image.fromarray(pixels).save(entry[field])
    match = f"{Path(entry[field]).name} must hold .* of 40x60 pixels.*got uint8 values of shape "
    with pytest.raises(ValueError, match=match + message):
        TrainMapper(cfg)(entry, np.random.default_rng(0))


def test_instance_maps_of_cityscapes(datasets: Path) -> None:
    root = datasets / "cityscapes"
    image = root / "leftImg8bit/val/ulm/ulm_0_1_leftImg8bit.png"
    labels = root / "gtFine/val/ulm/ulm_0_1_gtFine_instanceIds.png"
    for path, pixels in (
        (image, np.zeros((40, 60, 3), np.uint8)),
        (labels, np.zeros((20, 30), np.uint16)),
    ):
        path.parent.mkdir(parents=True)
        Image.fromarray(pixels).save(path)
    with pytest.raises(ValueError, match=r"instanceIds.png must hold .*40x60.*\(20, 30\)"):
        DatasetCatalog.get("cityscapes_fine_instance_seg_val")
    labels.write_text("no image")
    with pytest.raises(ValueError, match="instanceIds.png cannot be read"):
        DatasetCatalog.get("cityscapes_fine_instance_seg_val")


def test_list_of_pascal_context(datasets: Path) -> None:
    voc = datasets / "VOCdevkit/VOC2010"
    for folder in ("JPEGImages", "SegmentationClassContext", "ImageSets/SegmentationContext"):
        (voc / folder).mkdir(parents=True)
    listing = voc / "ImageSets/SegmentationContext/val.txt"
    listing.write_bytes(b"\xff\x89PNG\n")
    with pytest.raises(ValueError, match="'pascal_context_val': .*val.txt is not a text file"):
        DatasetCatalog.get("pascal_context_val")
    listing.write_text("2008_000001\n")
    with pytest.raises(FileNotFoundError, match="2008_000001.jpg not found; set DETECTRON2_DATA"):
        DatasetCatalog.get("pascal_context_val")


def bad(*segmentations: Any) -> Change:
    """Adds annotations of the first image's object with other segmentations."""

    def change(content: dict[str, Any]) -> None:
        first = content["annotations"][0]
        content["annotations"] += [{**first, "segmentation": one} for one in segmentations]

    return change


def test_what_is_no_mask_is_left_out_of_training_and_told_once(
    ade20k: Path, cfg: CfgNode, caplog: pytest.LogCaptureFixture
) -> None:
    path = ade20k / "ADEChallengeData2016/ade20k_instance_val.json"
    expected = DatasetCatalog.get("ade20k_instance_val")
    far, nan = [[1e9, 1, 2, 3, 4, 5]], [[float("nan"), 1, 2, 3, 4, 5]]
    wrong = ([], None, [[1, 2, 3, 4]], far, nan, [[1, 2, 3, 4, 5, 6, 7]], {"size": [40, 60]})
    change_json(path, bad(*wrong))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert DatasetCatalog.get("ade20k_instance_val") == expected
    (told,) = [record.getMessage() for record in caplog.records]
    assert "'ade20k_instance_val': 7 of the 9 annotations of " in told and str(path) in told
    assert told.endswith(
        "the first, image 1: a segmentation must be polygons or run lengths, got "
        "[] (no polygon of three or more points)"
    )
    cfg.INPUT.DATASET_MAPPER_NAME = "coco_instance_lsj"
    sample = TrainMapper(cfg)(expected[0], np.random.default_rng(0))
    assert len(sample["instances"]) <= 1


def test_annotations_of_images_that_are_not_listed_are_told(
    ade20k: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = ade20k / "ADEChallengeData2016/ade20k_instance_val.json"
    change_json(path, lambda content: content["annotations"][1].update(image_id=44))
    with caplog.at_level(logging.WARNING):
        first, _ = DatasetCatalog.get("ade20k_instance_val")
    assert len(first["annotations"]) == 1
    assert "1 of the 2 annotations of " in caplog.text and "image 44 is not listed" in caplog.text


@pytest.mark.parametrize("box", [None, [], [1, 2, 3], [1, 2, -3, 4], [0, 0, 1, float("nan")], "a"])
def test_boxes_that_are_none_come_from_the_mask(ade20k: Path, box: Any) -> None:
    path = ade20k / "ADEChallengeData2016/ade20k_instance_val.json"
    change_json(path, lambda content: [a.update(bbox=box) for a in content["annotations"]])
    polygon, crowd = DatasetCatalog.get("ade20k_instance_val")[0]["annotations"]
    assert polygon["bbox"] == [10, 5, 20, 15]
    assert crowd["bbox"] == [0, 0, 1, 40]


@pytest.mark.parametrize("name", ["pascal_context_val", "kitti_eigen_test", "nyuv2_test"])
def test_lists_with_a_byte_order_mark(datasets: Path, name: str) -> None:
    if name == "pascal_context_val":
        voc = datasets / "VOCdevkit/VOC2010"
        listing, line = voc / "ImageSets/SegmentationContext/val.txt", "a\r\n"
        files = [voc / "JPEGImages/a.jpg", voc / "SegmentationClassContext/a.png"]
        load = partial(DatasetCatalog.get, name)
    elif name == "kitti_eigen_test":
        listing, line = datasets / "list.txt", "a.jpg a.png 7\r\n"
        files = [datasets / "raw/a.jpg", datasets / "depth/val/a.png"]
        load = partial(load_kitti, name, listing, datasets / "raw", datasets / "depth")
    else:
        listing, line = datasets / "list.txt", "a.jpg a.png 7\r\n"
        files = [datasets / "nyu/a.jpg", datasets / "nyu/a.png"]
        load = partial(load_nyuv2, name, listing, datasets / "nyu")
    for path in (*files, listing):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    listing.write_text(line, encoding="utf-8-sig")
    (entry,) = load()
    assert entry["file_name"] == str(files[0])

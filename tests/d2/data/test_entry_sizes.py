"""The size that a data set gives an image, and that of the upright picture."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from expedite_d2.d2 import CfgNode
from expedite_d2.d2.config import add_expedite_config
from expedite_d2.d2.data import DepthTestMapper, DepthTrainMapper, TestMapper, TrainMapper

Entry = dict[str, Any]
#: What is stored; a quarter turn makes it 40x30.
STORED = (30, 40)
TASKS = ["panoptic", "instance-polygon", "instance-rle", "semantic", "depth"]


def mapped(cfg: CfgNode, task: str, training: bool, entry: Entry) -> Entry:
    add_expedite_config(cfg)
    if task == "depth":
        cfg.INPUT.DATASET_MAPPER_NAME = "depth"
        if training:
            return DepthTrainMapper(cfg)(entry, np.random.default_rng(0))
        return DepthTestMapper(cfg)(entry)
    cfg.INPUT.DATASET_MAPPER_NAME = f"mask_former_{task.split('-')[0]}"
    cfg.INPUT.MIN_SIZE_TRAIN = (40,)
    if training:
        return TrainMapper(cfg)(entry, np.random.default_rng(0))
    return TestMapper(cfg)(entry)


def make_entry(folder: Path, task: str, orientation: int, size: tuple[int, int]) -> Entry:
    """An image with an orientation tag, its annotations upright, and `size` in its entry."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.zeros((*STORED, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "image.jpg", exif=exif)
    upright = STORED[::-1] if orientation > 4 else STORED
    labels = np.zeros(upright, np.uint8)
    labels[2:20, 3:25] = 1
    entry: Entry = {"file_name": str(folder / "image.jpg"), "image_id": 1}
    entry |= dict(zip(("height", "width"), size, strict=True))
    segment = {"id": 1, "category_id": 0, "iscrowd": 0}
    if task == "panoptic":
        Image.fromarray(np.dstack([labels, 0 * labels, 0 * labels])).save(folder / "labels.png")
        entry |= {"pan_seg_file_name": str(folder / "labels.png"), "segments_info": [segment]}
    elif task == "semantic":
        Image.fromarray(labels).save(folder / "labels.png")
        entry["sem_seg_file_name"] = str(folder / "labels.png")
    elif task == "depth":
        Image.fromarray(labels.astype(np.uint16) * 256).save(folder / "labels.png")
        entry |= {"depth_file_name": str(folder / "labels.png"), "depth_scale": 1 / 256}
    else:
        mask: Any = coco_mask.encode(np.asfortranarray(labels))
        if task == "instance-polygon":
            mask = [[3, 2, 25, 2, 25, 20, 3, 20]]
        entry["annotations"] = [segment | {"segmentation": mask}]
    return entry


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_an_entry_has_the_upright_pictures_size(
    cfg: CfgNode, tmp_path: Path, task: str, training: bool, orientation: int
) -> None:
    upright = STORED[::-1] if orientation > 4 else STORED
    entry = make_entry(tmp_path, task, orientation, upright)
    sample = mapped(cfg, task, training, entry)
    assert (sample["height"], sample["width"]) == upright
    height, width = sample["image"].shape[1:]
    assert (height > width) == (upright[0] > upright[1])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("orientation", "size", "turned"),
    [
        (6, (30, 40), True),
        (8, (30, 40), True),
        (5, (30, 40), True),
        (1, (40, 30), False),
        (3, (40, 30), False),
        (6, (41, 30), False),
        (1, (30, 41), False),
        (1, (0, 0), False),
        (1, (None, 40), False),
    ],
)
def test_an_entry_of_another_size_is_named(
    cfg: CfgNode, tmp_path: Path, task: str, training: bool, orientation: int, size, turned: bool
) -> None:
    entry = make_entry(tmp_path, task, orientation, size)
    upright = STORED[::-1] if orientation > 4 else STORED
    both = f"{size[0]}x{size[1]} (height x width), got {upright[0]}x{upright[1]}"
    with pytest.raises(
        ValueError, match=f"image .*image.jpg must have .*{re.escape(both)}"
    ) as caught:
        mapped(cfg, task, training, entry)
    assert ("orientation tag turns it by 90 degrees" in str(caught.value)) == turned


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("known", [(), ("height",), ("width",)])
def test_an_entry_need_not_have_a_size(
    cfg: CfgNode, tmp_path: Path, task: str, known: tuple[str, ...]
) -> None:
    entry = make_entry(tmp_path, task, 1, STORED)
    for side in {"height", "width"} - set(known):
        del entry[side]
    for training in (True, False):
        assert mapped(cfg, task, training, entry)["image"].shape[0] == 3


@pytest.mark.parametrize("task", ["panoptic", "semantic", "depth", "instance-rle"])
def test_annotations_of_the_stored_picture_are_named(
    cfg: CfgNode, tmp_path: Path, task: str
) -> None:
    """The picture is turned, its annotations are not, and the entry has no size."""
    entry = make_entry(tmp_path, task, 1, STORED)
    del entry["height"], entry["width"]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", STORED[::-1]).save(entry["file_name"], exif=exif)
    with pytest.raises(ValueError, match=r"40(x|, )30.*30(x|, )40"):
        mapped(cfg, task, True, entry)


@pytest.mark.parametrize("kind", ["png", "tif", "webp", "jpg"])
def test_a_narrow_picture_keeps_a_pixel(cfg: CfgNode, tmp_path: Path, kind: str) -> None:
    Image.new("RGB", (1, 2000)).save(tmp_path / f"x.{kind}")
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 128
    sample = TestMapper(cfg)({"file_name": str(tmp_path / f"x.{kind}"), "height": 2000, "width": 1})
    assert sample["image"].shape == (3, 128, 1)

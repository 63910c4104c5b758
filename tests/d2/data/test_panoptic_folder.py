"""Folders with panoptic annotations that are registered wherever they lie."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from expedite_d2.d2 import DatasetCatalog, MetadataCatalog
from expedite_d2.d2.data.panoptic_folder import register_panoptic_folders

SIZE = (24, 32)


def write(folder: Path, split: str, categories: tuple[int, int]) -> None:
    """One image: its upper half is of one category, its lower half of another."""
    for kind in ("images", "panoptic"):
        (folder / kind / split).mkdir(parents=True)
    Image.new("RGB", SIZE[::-1]).save(folder / "images" / split / "7.jpg")
    ids = np.zeros((*SIZE, 3), np.uint8)
    ids[:12, :, 0], ids[12:, :, 0] = 1, 2
    Image.fromarray(ids).save(folder / "panoptic" / split / "7.png")
    segments = [
        {"id": number + 1, "category_id": category, "iscrowd": 0, "area": 384, "bbox": [0, 0, 1, 1]}
        for number, category in enumerate(categories)
    ]
    content: dict[str, Any] = {
        "images": [{"id": 7, "file_name": "7.jpg", "height": SIZE[0], "width": SIZE[1]}],
        "annotations": [{"image_id": 7, "file_name": "7.png", "segments_info": segments}],
        "categories": [],
    }
    (folder / f"panoptic_{split}.json").write_text(json.dumps(content))


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_a_folder_is_a_data_set_of_each_split(tmp_path: Path) -> None:
    write(tmp_path / "photos", "val", (1, 184))  # COCO's person, and tree
    write(tmp_path / "photos", "few", (1, 184))
    register_panoptic_folders(tmp_path)
    assert {"photos_val_panoptic", "photos_few_panoptic"} <= set(DatasetCatalog.list())
    (entry,) = DatasetCatalog.get("photos_val_panoptic")
    metadata = MetadataCatalog.get("photos_val_panoptic")
    named = [metadata.stuff_classes[s["category_id"]] for s in entry["segments_info"]]
    assert named[0] == "person" and named[1].startswith("tree")
    assert [segment["isthing"] for segment in entry["segments_info"]] == [True, False]
    assert len(metadata.stuff_classes) == 133 and metadata.get("json_file") is None
    assert metadata.evaluator_type == "coco_panoptic_seg"


def test_categories_of_its_own(tmp_path: Path) -> None:
    write(tmp_path / "rooms", "val", (5, 9))
    own = [{"id": 5, "name": "cat", "isthing": 1}, {"id": 9, "name": "floor", "isthing": 0}]
    (tmp_path / "rooms" / "categories.json").write_text(json.dumps(own))
    register_panoptic_folders(tmp_path)
    assert MetadataCatalog.get("rooms_val_panoptic").stuff_classes == ["cat", "floor"]
    (entry,) = DatasetCatalog.get("rooms_val_panoptic")
    assert [segment["category_id"] for segment in entry["segments_info"]] == [0, 1]


def test_what_is_not_such_a_folder_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "coco" / "images").mkdir(parents=True)
    (tmp_path / "coco" / "panoptic_val.json").write_text("{}")
    write(tmp_path / "broken", "val", (1, 184))
    (tmp_path / "broken" / "categories.json").write_text('[{"id": 1}]')
    before = set(DatasetCatalog.list())
    with caplog.at_level(logging.WARNING):
        register_panoptic_folders(tmp_path)
    assert set(DatasetCatalog.list()) == before
    assert "categories.json must be a list of categories" in caplog.text
    register_panoptic_folders(tmp_path / "nowhere")


def test_a_broken_annotation_file_is_told_when_it_is_read(tmp_path: Path) -> None:
    write(tmp_path / "photos", "val", (1, 5000))
    register_panoptic_folders(tmp_path)
    with pytest.raises(ValueError, match="5000"):
        DatasetCatalog.get("photos_val_panoptic")

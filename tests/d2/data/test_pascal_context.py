"""Pascal Context in MMSegmentation's layout, made up in a temporary folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from expedite_d2.d2 import DatasetCatalog, MetadataCatalog
from expedite_d2.d2.data.categories import PASCAL_CONTEXT


@pytest.fixture
def voc(datasets: Path) -> Path:
    """Three images, two of them in the validation split."""
    voc = datasets / "VOCdevkit/VOC2010"
    for folder in ("JPEGImages", "SegmentationClassContext", "ImageSets/SegmentationContext"):
        (voc / folder).mkdir(parents=True)
    for stem in ("2008_000002", "2008_000003", "2010_000001"):
        Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(voc / f"JPEGImages/{stem}.jpg")
        labels = Image.fromarray(np.zeros((4, 5), np.uint8))
        labels.save(voc / f"SegmentationClassContext/{stem}.png")
    listing = voc / "ImageSets/SegmentationContext/val.txt"
    listing.write_text("2010_000001\n2008_000002\n")
    return voc


def test_the_split_follows_its_list(voc: Path) -> None:
    entries = DatasetCatalog.get("pascal_context_val")
    assert [entry["image_id"] for entry in entries] == ["2010_000001", "2008_000002"]
    assert all(Path(entry["sem_seg_file_name"]).is_file() for entry in entries)
    metadata = MetadataCatalog.get("pascal_context_val")
    assert metadata.evaluator_type == "sem_seg" and metadata.ignore_label == 255
    assert len(metadata.stuff_classes) == len(PASCAL_CONTEXT) == 60
    assert (metadata.stuff_classes[0], metadata.stuff_classes[59]) == ("background", "wood")


@pytest.mark.parametrize(
    ("split", "missing"),
    [
        ("train", "ImageSets/SegmentationContext/train.txt"),
        ("val", "JPEGImages/2008_000002.jpg"),
        ("val", "SegmentationClassContext/2010_000001.png"),
    ],
)
def test_missing_files_are_named(voc: Path, split: str, missing: str) -> None:
    (voc / missing).unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match="DETECTRON2_DATASETS") as caught:
        DatasetCatalog.get(f"pascal_context_{split}")
    assert str(voc / missing) in str(caught.value)

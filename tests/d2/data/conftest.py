"""Tiny data sets in the real layouts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from expedite_d2.d2 import CfgNode, DatasetCatalog, MetadataCatalog, get_cfg
from expedite_d2.d2.config import add_expedite_config
from expedite_d2.d2.data.ade20k import register_ade20k
from expedite_d2.d2.data.cityscapes import register_cityscapes
from expedite_d2.d2.data.coco import register_coco
from expedite_d2.d2.data.pascal_context import register_pascal_context
from expedite_d2.d2.data.scenes import writer

SIZE = (40, 60)
PREFIXES = ("coco_2017_", "ade20k_", "cityscapes_fine_", "pascal_context_")


@pytest.fixture
def cfg() -> CfgNode:
    cfg = get_cfg()
    add_expedite_config(cfg)
    cfg.INPUT.FORMAT = "RGB"
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SEED = 3
    return cfg


@pytest.fixture(scope="session")
def scenes_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with six training and three validation scenes."""
    root = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        for split, count in (("train", 6), ("val", 3)):
            patch.setitem(writer.SPLITS, split, writer.Split(writer.SPLITS[split].seed, count))
            writer.ensure_split(split, root)
    return root


@pytest.fixture
def register() -> Iterator[Callable[[str, Callable[[], list[dict[str, Any]]]], None]]:
    """Registers a data set for one test."""
    names = []

    def call(name: str, load: Callable[[], list[dict[str, Any]]]) -> None:
        DatasetCatalog.register(name, load)
        names.append(name)

    yield call
    for name in names:
        DatasetCatalog.remove(name)


def _image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(path.name)).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def _png(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def _segments(thing: int, stuff: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """A segment PNG and its records: stuff above, void below, a thing, a crowd of things."""
    ids = np.zeros(SIZE, np.uint32)
    ids[:30], ids[5:20, 10:30], ids[5:20, 40:50] = 70000, 300, 7
    png = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    records = [
        {"id": number, "category_id": category, "iscrowd": crowd, "bbox": box, "area": area}
        for number, category, crowd, box, area in (
            (70000, stuff, 0, [0, 0, 60, 30], 30 * 60 - 450),
            (300, thing, 0, [10, 5, 20, 15], 300),
            (7, thing, 1, [40, 5, 10, 15], 150),
        )
    ]
    return png, records


def write_coco_files(
    folder: Path, names: dict[str, str], thing: int, stuff: int, images: int = 2
) -> None:
    """Writes images and labels (folders), panoptic and instances (JSON files) of `names`."""
    records, panoptic, instances = [], [], []
    for number in range(1, images + 1):
        stem = f"{number:012d}"
        _image(folder / names["images"] / f"{stem}.jpg")
        png, segments = _segments(thing, stuff)
        _png(folder / names["labels"] / f"{stem}.png", png)
        records.append(
            {"id": number, "file_name": f"{stem}.jpg", "height": SIZE[0], "width": SIZE[1]}
        )
        panoptic.append({"image_id": number, "file_name": f"{stem}.png", "segments_info": segments})
    # The last image has no objects.
    for number in range(1, images):
        corners = [[10, 5, 30, 5, 30, 20, 10, 20]]
        crowd = {"size": list(SIZE), "counts": [0, 40, 2360]}
        for segmentation, iscrowd in ((corners, 0), (crowd, 1)):
            instances.append(
                {
                    "id": len(instances) + 1,
                    "image_id": number,
                    "category_id": thing,
                    "iscrowd": iscrowd,
                    "bbox": [10, 5, 20, 15],
                    "area": 300,
                    "segmentation": segmentation,
                }
            )
    for name, entries in (("panoptic", panoptic), ("instances", instances)):
        path = folder / names[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"images": records, "annotations": entries}))


COCO_NAMES = {
    "images": "val2017",
    "labels": "panoptic_val2017",
    "panoptic": "annotations/panoptic_val2017.json",
    "instances": "annotations/instances_val2017.json",
}
ADE_NAMES = {
    "images": "images/validation",
    "labels": "ade20k_panoptic_val",
    "panoptic": "ade20k_panoptic_val.json",
    "instances": "ade20k_instance_val.json",
}


@pytest.fixture
def datasets(tmp_path: Path) -> Iterator[Path]:
    """A folder for DETECTRON2_DATASETS that the public data sets are registered in."""
    names = [n for n in DatasetCatalog.list() if n.startswith(PREFIXES)]
    kept = {name: (DatasetCatalog[name], MetadataCatalog.get(name)) for name in names}
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_coco(tmp_path)
    register_ade20k(tmp_path)
    register_cityscapes(tmp_path)
    register_pascal_context(tmp_path)
    yield tmp_path
    for name in [n for n in DatasetCatalog.list() if n.startswith(PREFIXES)]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    for name, (load, metadata) in kept.items():
        DatasetCatalog.register(name, load)
        MetadataCatalog[name] = metadata


@pytest.fixture
def coco(datasets: Path) -> Path:
    """COCO's validation split with two images; category 1 is a person, 119 a flower (stuff)."""
    write_coco_files(datasets / "coco", COCO_NAMES, thing=1, stuff=119)
    labels = np.full(SIZE, 255, np.uint8)
    for number in (1, 2):
        _png(datasets / f"coco/panoptic_semseg_val2017/{number:012d}.png", labels)
    return datasets


@pytest.fixture
def ade20k(datasets: Path) -> Path:
    """ADE20K's validation split with two images; category 7 is a bed, 2 the sky (stuff)."""
    folder = datasets / "ADEChallengeData2016"
    write_coco_files(folder, ADE_NAMES, thing=7, stuff=2)
    labels = np.full(SIZE, 255, np.uint8)
    labels[:30], labels[5:20, 10:30] = 2, 7
    for number in (1, 2):
        _png(folder / f"annotations_detectron2/validation/{number:012d}.png", labels)
    return datasets

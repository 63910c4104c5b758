"""COCO and ADE20K in their usual layouts, made up in a temporary folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from expedite_d2.d2 import DatasetCatalog, MetadataCatalog
from expedite_d2.d2.data.categories import ADE20K, COCO_PANOPTIC, class_colours
from expedite_d2.d2.data.coco import register_coco
from expedite_d2.d2.data.coco_format import XYWH_ABS
from expedite_d2.d2.data.dataset_files import datasets_root


def test_categories() -> None:
    assert len(COCO_PANOPTIC) == 133 and sum(c.isthing for c in COCO_PANOPTIC) == 80
    assert all(c.isthing for c in COCO_PANOPTIC[:80])
    assert [c.id for c in COCO_PANOPTIC] == sorted({c.id for c in COCO_PANOPTIC})
    assert {c.id: c.name for c in COCO_PANOPTIC}[200] == "rug-merged"
    assert len(ADE20K) == 150 and sum(c.isthing for c in ADE20K) == 100
    assert [c.id for c in ADE20K] == list(range(150))
    assert ADE20K[7].name == "bed" and ADE20K[7].isthing
    assert not ADE20K[2].isthing and ADE20K[6].name == "road, route"


def test_class_colours_differ() -> None:
    colours = class_colours(150)
    assert len({tuple(colour) for colour in colours}) == 150
    assert all(0 <= part <= 255 for colour in colours for part in colour)


def test_coco_panoptic(coco: Path) -> None:
    entries = DatasetCatalog.get("coco_2017_val_panoptic")
    metadata = MetadataCatalog.get("coco_2017_val_panoptic")
    assert [entry["image_id"] for entry in entries] == [1, 2]
    stuff, thing, crowd = entries[0]["segments_info"]
    assert (stuff["isthing"], stuff["id"], stuff["iscrowd"]) == (False, 70000, 0)
    assert metadata.stuff_classes[stuff["category_id"]] == "flower"
    assert (thing["isthing"], thing["category_id"]) == (True, 0)
    assert crowd["iscrowd"] == 1
    assert Path(entries[0]["file_name"]) == coco / "coco/val2017/000000000001.jpg"
    assert Path(entries[0]["pan_seg_file_name"]).is_file()
    assert "sem_seg_file_name" not in entries[0]
    assert len(metadata.thing_classes) == 80 and len(metadata.stuff_classes) == 133
    assert metadata.evaluator_type == "coco_panoptic_seg"
    assert (metadata.ignore_label, metadata.label_divisor) == (255, 1000)


def test_coco_panoptic_with_sem_seg(coco: Path) -> None:
    for entry in DatasetCatalog.get("coco_2017_val_panoptic_with_sem_seg"):
        assert Path(entry["sem_seg_file_name"]).is_file()
    metadata = MetadataCatalog.get("coco_2017_val_panoptic_with_sem_seg")
    assert Path(metadata.sem_seg_root) == coco / "coco/panoptic_semseg_val2017"


def test_coco_instances(coco: Path) -> None:
    first, second = DatasetCatalog.get("coco_2017_val")
    assert (first["height"], first["width"]) == (40, 60)
    assert [a["iscrowd"] for a in first["annotations"]] == [0, 1]
    assert first["annotations"][0]["category_id"] == 0
    assert first["annotations"][0]["bbox_mode"] == XYWH_ABS
    assert second["annotations"] == []
    assert MetadataCatalog.get("coco_2017_val").evaluator_type == "coco"


def test_ade20k(ade20k: Path) -> None:
    semantic = DatasetCatalog.get("ade20k_sem_seg_val")
    assert len(semantic) == 2 and Path(semantic[1]["sem_seg_file_name"]).is_file()
    assert MetadataCatalog.get("ade20k_sem_seg_val").evaluator_type == "sem_seg"
    assert len(MetadataCatalog.get("ade20k_sem_seg_val").stuff_classes) == 150
    panoptic = DatasetCatalog.get("ade20k_panoptic_val")
    assert [s["category_id"] for s in panoptic[0]["segments_info"]] == [2, 7, 7]
    assert MetadataCatalog.get("ade20k_panoptic_val").evaluator_type == "ade20k_panoptic_seg"
    instances = DatasetCatalog.get("ade20k_instance_val")
    names = MetadataCatalog.get("ade20k_instance_val").thing_classes
    assert len(names) == 100 and names[instances[0]["annotations"][0]["category_id"]] == "bed"


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("coco_2017_val", "coco/annotations/instances_val2017.json"),
        ("coco_2017_val", "coco/val2017"),
        ("coco_2017_val_panoptic", "coco/annotations/panoptic_val2017.json"),
        ("coco_2017_val_panoptic", "coco/panoptic_val2017"),
        ("coco_2017_val_panoptic_with_sem_seg", "coco/panoptic_semseg_val2017"),
        ("coco_2017_train", "coco/annotations/instances_train2017.json"),
    ],
)
def test_missing_files_are_named(coco: Path, name: str, missing: str) -> None:
    path = coco / missing
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match="DETECTRON2_DATASETS") as caught:
        DatasetCatalog.get(name)
    assert str(path) in str(caught.value) and repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_ade20k_labels_are_named(ade20k: Path) -> None:
    folder = ade20k / "ADEChallengeData2016/annotations_detectron2/validation"
    (folder / "000000000002.png").unlink()
    with pytest.raises(FileNotFoundError, match="000000000002.png"):
        DatasetCatalog.get("ade20k_sem_seg_val")
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="annotations_detectron2"):
        DatasetCatalog.get("ade20k_sem_seg_val")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not a JSON file"), ("[]", "no 'annotations'"), ('{"images": []}', "no 'ann")],
)
def test_a_broken_annotation_file_is_named(coco: Path, content: str, message: str) -> None:
    path = coco / "coco/annotations/panoptic_val2017.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        DatasetCatalog.get("coco_2017_val_panoptic")
    assert str(path) in str(caught.value)


def test_an_unknown_category_is_named(coco: Path) -> None:
    path = coco / "coco/annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["category_id"] = 12
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="got 12"):
        DatasetCatalog.get("coco_2017_val")


def test_registering_again_keeps_what_is_there(datasets: Path, tmp_path: Path) -> None:
    load = DatasetCatalog["coco_2017_val"]
    root = MetadataCatalog.get("coco_2017_val").image_root
    register_coco(tmp_path / "elsewhere")
    assert DatasetCatalog["coco_2017_val"] is load
    assert MetadataCatalog.get("coco_2017_val").image_root == root


def test_datasets_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", "~/sets")
    assert datasets_root() == Path.home() / "sets"
    monkeypatch.delenv("DETECTRON2_DATASETS")
    assert datasets_root() == Path("datasets")

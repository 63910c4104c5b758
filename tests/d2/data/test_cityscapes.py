"""Cityscapes in its usual layout, made up in a temporary folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from expedite_d2.d2 import CfgNode, DatasetCatalog, Instances, MetadataCatalog
from expedite_d2.d2.data import TrainMapper
from expedite_d2.d2.data.categories import CITYSCAPES
from expedite_d2.d2.data.cityscapes import instance_masks
from expedite_d2.d2.evaluation import (
    InstanceEvaluator,
    PanopticEvaluator,
    SemanticEvaluator,
    build_evaluators,
)

SIZE = (40, 60)
STEMS = ("aachen_000000_000019", "bochum_000001_000020")
ROAD, CAR, TRAILER, VOID = 7, 26, 30, 255


def write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def cityscapes(datasets: Path) -> Path:
    """Two images: road above, void below, two cars, a group of cars and a trailer."""
    root = datasets / "cityscapes"
    instances = np.zeros(SIZE, np.uint16)
    instances[:30] = ROAD
    instances[5:20, 10:20], instances[5:20, 20:30] = 1000 * CAR, 1000 * CAR + 1
    instances[5:20, 40:50], instances[25:29, 2:8] = CAR, 1000 * TRAILER
    labels = np.full(SIZE, VOID, np.uint8)
    labels[:30], labels[5:20, 10:30], labels[5:20, 40:50] = 0, 13, 13
    labels[25:29, 2:8] = VOID
    counted = np.where(labels == VOID, 0, instances)
    colours = np.stack([counted % 256, counted // 256, 0 * counted], -1).astype(np.uint8)
    infos = [
        {"id": number, "category_id": category, "area": int(area), "iscrowd": crowd, "bbox": []}
        for number, category, crowd in (
            (ROAD, ROAD, 0),
            (1000 * CAR, CAR, 0),
            (1000 * CAR + 1, CAR, 0),
            (CAR, CAR, 1),
        )
        if (area := (instances == number).sum())
    ]
    images, annotations = [], []
    for stem in STEMS:
        city = stem.split("_")[0]
        gt = root / "gtFine/val" / city
        write(root / f"leftImg8bit/val/{city}/{stem}_leftImg8bit.png", np.zeros((*SIZE, 3), "u1"))
        write(gt / f"{stem}_gtFine_instanceIds.png", instances)
        write(gt / f"{stem}_gtFine_labelTrainIds.png", labels)
        file_name = f"{stem}_gtFine_panoptic.png"
        write(root / "gtFine/cityscapes_panoptic_val" / file_name, colours)
        image = f"{stem}_gtFine_leftImg8bit.png"  # what createPanopticImgs calls it
        images.append({"id": stem, "file_name": image, "height": SIZE[0], "width": SIZE[1]})
        annotations.append({"image_id": stem, "file_name": file_name, "segments_info": infos})
    categories = [{"id": c.id, "name": c.name, "isthing": int(c.isthing)} for c in CITYSCAPES]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "gtFine/cityscapes_panoptic_val.json").write_text(json.dumps(content))
    return datasets


def test_categories() -> None:
    assert len(CITYSCAPES) == 19 and [c.isthing for c in CITYSCAPES] == [False] * 11 + [True] * 8
    assert {c.id: c.name for c in CITYSCAPES}[31] == "train"


def test_semantic(cityscapes: Path) -> None:
    entries = DatasetCatalog.get("cityscapes_fine_sem_seg_val")
    assert [Path(entry["file_name"]).parent.name for entry in entries] == ["aachen", "bochum"]
    assert all(Path(entry["sem_seg_file_name"]).is_file() for entry in entries)
    metadata = MetadataCatalog.get("cityscapes_fine_sem_seg_val")
    assert len(metadata.stuff_classes) == 19 and metadata.stuff_classes[13] == "car"


def test_panoptic(cityscapes: Path) -> None:
    entries = DatasetCatalog.get("cityscapes_fine_panoptic_val")
    for entry, stem in zip(entries, STEMS, strict=True):
        assert entry["image_id"] == stem
        for field in ("file_name", "sem_seg_file_name", "pan_seg_file_name"):
            assert Path(entry[field]).is_file()
    infos = entries[0]["segments_info"]
    assert [(s["category_id"], s["isthing"], s["iscrowd"]) for s in infos] == [
        (0, False, 0),
        (13, True, 0),
        (13, True, 0),
        (13, True, 1),
    ]


def test_instances(cityscapes: Path) -> None:
    first, second = DatasetCatalog.get("cityscapes_fine_instance_seg_val")
    assert (first["height"], first["width"]) == SIZE
    assert (first["image_id"], second["image_id"]) == STEMS
    names = MetadataCatalog.get("cityscapes_fine_instance_seg_val").thing_classes
    assert len(names) == 8 and {names[a["category_id"]] for a in first["annotations"]} == {"car"}
    group, car, other = first["annotations"]  # the trailer does not count
    assert [a["iscrowd"] for a in (group, car, other)] == [1, 0, 0]
    assert car["bbox"] == [10, 5, 10, 15]
    expected = np.zeros(SIZE, bool)
    expected[5:20, 10:20] = True
    assert (coco_mask.decode(car["segmentation"]) == expected).all()


def test_training_samples(cityscapes: Path, cfg: CfgNode) -> None:
    cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_instance"
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (40,), "none"
    name = "cityscapes_fine_instance_seg_val"
    mapper = TrainMapper(cfg)
    entries = mapper.usable(name, DatasetCatalog.get(name))
    sample = mapper(entries[0], np.random.default_rng(0))
    assert sample["instances"].gt_classes.tolist() == [2, 2]
    assert sample["instances"].gt_masks.flatten(1).sum(1).tolist() == [150, 150]


@pytest.mark.parametrize(
    "missing",
    [
        "gtFine/val/bochum/bochum_000001_000020_gtFine_instanceIds.png",
        "leftImg8bit/val",
        "gtFine/val",
    ],
)
def test_missing_files_are_named(cityscapes: Path, missing: str) -> None:
    path = cityscapes / "cityscapes" / missing
    path.rename(path.with_name("elsewhere"))
    with pytest.raises(FileNotFoundError, match="DETECTRON2_DATASETS") as caught:
        DatasetCatalog.get("cityscapes_fine_instance_seg_val")
    assert str(path) in str(caught.value)


def test_masks_of_a_map_are_those_of_its_ids() -> None:
    for ids in (np.random.default_rng(0).integers(0, 5, (13, 9)), np.full((3, 4), 7)):
        masks = instance_masks(ids.astype(np.int32))
        assert sorted(masks) == sorted(set(ids.ravel().tolist()))
        for number, mask in masks.items():
            assert (coco_mask.decode(mask) == (ids == number)).all()


def test_a_perfect_panoptic_prediction(cityscapes: Path, cfg: CfgNode) -> None:
    name = "cityscapes_fine_panoptic_val"
    cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON = True
    cfg.MODEL.MASK_FORMER.TEST.INSTANCE_ON = True
    evaluators = build_evaluators(cfg, name)
    assert [type(e) for e in evaluators] == [PanopticEvaluator, SemanticEvaluator]
    ids = torch.zeros(SIZE, dtype=torch.int32)
    ids[:30], ids[5:20, 10:20], ids[5:20, 20:30] = 1, 2, 3
    ids[25:29, 2:8] = 1  # void in the annotation
    segments = [
        {"id": number, "isthing": category > 10, "category_id": category}
        for number, category in ((1, 0), (2, 13), (3, 13))
    ]
    ids[5:20, 40:50] = 0
    sem_seg = torch.zeros(19, *SIZE)
    sem_seg[0], sem_seg[13, 5:20, 10:30], sem_seg[13, 5:20, 40:50] = 0.5, 1, 1
    output = {"panoptic_seg": (ids, segments), "sem_seg": sem_seg}
    results = {}
    for evaluator in evaluators:
        for entry in DatasetCatalog.get(name):
            evaluator.process([entry], [output])
        results |= evaluator.evaluate()
    assert results["panoptic_seg"]["PQ_th"] == pytest.approx(100)
    assert results["panoptic_seg"]["PQ_st"] == pytest.approx(100)
    assert results["sem_seg"]["mIoU"] == pytest.approx(100)


def test_average_precision_without_an_annotation_file(cityscapes: Path, cfg: CfgNode) -> None:
    name = "cityscapes_fine_instance_seg_val"
    (evaluator,) = build_evaluators(cfg, name)
    assert isinstance(evaluator, InstanceEvaluator)
    masks = torch.zeros(2, *SIZE)
    masks[0, 5:20, 10:20], masks[1, 5:20, 20:30] = 1, 1
    first, second = DatasetCatalog.get(name)
    for entry, found in ((first, 2), (second, 1)):
        instances = Instances(SIZE)
        instances.pred_masks = masks[:found]
        instances.scores = torch.tensor([0.9, 0.8])[:found]
        instances.pred_classes = torch.full((found,), 2)
        evaluator.process([entry], [{"instances": instances}])
    # Three of four cars, all right: COCO's 101 recall points up to 0.75.
    assert evaluator.evaluate()["segm"]["AP"] == pytest.approx(100 * 76 / 101)

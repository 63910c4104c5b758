"""The labelled frames of NYU Depth v2: splits, depth of 8 bits, classes of labels, crop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rooms import SIZE, few_rooms

from expedite_d2.d2 import CfgNode, DatasetCatalog, MetadataCatalog
from expedite_d2.d2.data import DepthTrainMapper, TestMapper, TrainMapper
from expedite_d2.d2.data.images import read_classes
from expedite_d2.d2.data.nyuv2_labeled import SPLITS, TUNE_FRAMES
from expedite_d2.d2.evaluation.depth import DepthEvaluator, crop_window
from expedite_d2.d2.evaluation.semantic import SemanticEvaluator


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Of two frames to train with, those of "tune" and one to test with."""
    with few_rooms(tmp_path, ["0900"]) as path:
        yield path


def test_the_splits_share_no_frame(folder: Path) -> None:
    found = {
        split: [entry["image_id"] for entry in DatasetCatalog.get(f"nyuv2_labeled_depth_{split}")]
        for split in SPLITS
    }
    assert found["train"] == ["0001", "0002"] and len(found["tune"]) == TUNE_FRAMES
    assert found["tune"][-1] == f"{TUNE_FRAMES + 2:04d}" and found["test"] == ["0900"]
    assert not set(found["train"]) & set(found["tune"])


def test_depth_is_in_metres_to_train_and_to_evaluate(folder: Path, cfg: CfgNode) -> None:
    (entry,) = DatasetCatalog.get("nyuv2_labeled_depth_test")
    expected = (np.indices(SIZE)[1] % 256 + 0.5) * 9.99547 / 255
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.INPUT.CROP.ENABLED = False
    cfg.INPUT.COLOR_AUG_SSD = False
    cfg.MODEL.DPT.TEST_SIZE = [480, 640]
    sample = DepthTrainMapper(cfg)(entry, np.random.default_rng(0))
    np.testing.assert_allclose(sample["depth"], expected, rtol=1e-5)
    evaluator = DepthEvaluator("nyuv2_labeled_depth_test")
    np.testing.assert_allclose(evaluator.truth(entry), expected, rtol=1e-5)
    dropped = {"file_name": entry["file_name"]}  # as Detectron2's own mapper leaves it
    np.testing.assert_allclose(evaluator.truth(dropped), expected, rtol=1e-5)


def test_the_crop_is_nyus_mirrored() -> None:
    plain, mirrored = np.zeros(SIZE), np.zeros(SIZE)
    plain[crop_window("nyu", *SIZE)] = 1
    mirrored[crop_window("nyu_mirrored", *SIZE)] = 1
    assert np.array_equal(mirrored, plain[:, ::-1])
    with pytest.raises(ValueError, match="'nyu_mirrored' is for depth maps of 480x640, got 4x4"):
        crop_window("nyu_mirrored", 4, 4)
    with pytest.raises(ValueError, match="'nyu', 'nyu_mirrored' or '', got 'other'"):
        crop_window("other", *SIZE)


@pytest.mark.parametrize("kind", ["sem_seg", "sem_seg_40"])
def test_classes_are_those_of_the_labels(folder: Path, kind: str, cfg: CfgNode) -> None:
    name = f"nyuv2_labeled_{kind}_test"
    (entry,) = DatasetCatalog.get(name)
    names = MetadataCatalog.get(name).stuff_classes
    assert len(names) == (13 if kind == "sem_seg" else 40)
    classes = read_classes(entry, SIZE)
    assert (classes[:, 0] == 255).all()  # label 0
    by_label = [names[number] for number in classes[0, 1:40]]
    # Labels 1, 4, 24, 25, 39: as the data set's own lists say.
    expected = ["wall", "bed", "furniture", "tv", "furniture"]
    if kind == "sem_seg_40":
        expected = ["wall", "bed", "refrigerator", "television", "otherfurniture"]
    assert [by_label[label - 1] for label in (1, 4, 24, 25, 39)] == expected
    evaluator = SemanticEvaluator(name)
    scores = torch.zeros(len(names), *SIZE)
    scores[names.index("wall")] = 1
    item = TestMapper(cfg)(entry)
    evaluator.process([item], [{"sem_seg": scores}])
    metrics = evaluator.evaluate()["sem_seg"]
    assert 0 < metrics["mIoU"] < 10
    cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_semantic"
    sample = TrainMapper(cfg)(entry, np.random.default_rng(0))
    assert set(sample["sem_seg"].unique().tolist()) <= {*range(len(names)), 255}


def test_what_is_broken_is_told(folder: Path) -> None:
    (entry,) = DatasetCatalog.get("nyuv2_labeled_sem_seg_test")
    labels = np.full(SIZE, 41, np.uint8)
    Image.fromarray(labels).save(entry["sem_seg_file_name"])
    with pytest.raises(ValueError, match="0900.png must hold labels from 0 to 40, got 41"):
        read_classes(entry, SIZE)
    (folder / "labels40" / "0900.png").unlink()
    with pytest.raises(FileNotFoundError, match="'nyuv2_labeled_sem_seg_test': .*0900.png not f"):
        DatasetCatalog.get("nyuv2_labeled_sem_seg_test")
    (folder / "train.txt").write_text("0001\n")
    with pytest.raises(ValueError, match="train.txt must list more than 80 frames, got 1"):
        DatasetCatalog.get("nyuv2_labeled_depth_train")
    (folder / "test.txt").unlink()
    with pytest.raises(FileNotFoundError, match="test.txt not found; set DETECTRON2_DATASETS"):
        DatasetCatalog.get("nyuv2_labeled_depth_test")

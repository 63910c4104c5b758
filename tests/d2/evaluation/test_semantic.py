"""Mean IoU and accuracies: hand-computed literals, and ground truth from files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from expedite_d2.d2.evaluation.semantic import SemanticEvaluator, semantic_metrics

CLASSES = ["wall", "sky", "tree"]


def scores(labels: list) -> dict:
    """A model's output whose most probable classes are ``labels``."""
    return {"sem_seg": torch.nn.functional.one_hot(torch.tensor(labels), 3).permute(2, 0, 1)}


def test_metrics_by_hand():
    # Rows are labels; class 2 is predicted and never labelled.
    metrics = semantic_metrics(np.array([[6, 2, 0], [1, 2, 1], [0, 0, 0]]))
    iou = np.array([6 / 9, 2 / 6])
    assert metrics["mIoU"] == pytest.approx(100 * iou.mean())
    assert metrics["fwIoU"] == pytest.approx(100 * (iou * [8 / 12, 4 / 12]).sum())
    assert metrics["mACC"] == pytest.approx(100 * (6 / 8 + 2 / 4) / 2)
    assert metrics["pACC"] == pytest.approx(100 * 8 / 12)


def test_metrics_without_labels_are_undefined():
    assert set(semantic_metrics(np.zeros((3, 3), int)).values()) == {None}


@pytest.fixture
def labelled(tmp_path, new_dataset):
    labels = np.array([[0, 0, 1, 255]], np.uint8)
    Image.fromarray(labels).save(tmp_path / "labels.png")
    item = {"file_name": "a.jpg", "sem_seg_file_name": str(tmp_path / "labels.png")}
    return new_dataset([item], stuff_classes=CLASSES, ignore_label=255), item


def test_evaluator_ignores_void_and_sums_images(labelled):
    name, item = labelled
    evaluator = SemanticEvaluator(name)
    second = {**item, "file_name": "b.jpg"}
    evaluator.process([item, second], [scores([[0, 1, 1, 2]]), scores([[0, 0, 0, 1]])])
    metrics = evaluator.evaluate()["sem_seg"]
    # Class 0: 3 of 4 labelled, 4 predicted; class 1: 1 of 2, 2 predicted.
    assert metrics["mIoU"] == pytest.approx(100 * (3 / 5 + 1 / 3) / 2)
    assert metrics["pACC"] == pytest.approx(100 * 4 / 6)


def test_evaluator_finds_labels_that_the_mapper_dropped(labelled):
    name, item = labelled
    evaluator = SemanticEvaluator(name)
    evaluator.process([{"file_name": item["file_name"]}], [scores([[0, 0, 1, 1]])])
    assert evaluator.evaluate()["sem_seg"]["mIoU"] == 100


def test_evaluator_paints_labels_from_the_panoptic_annotation(tmp_path, new_dataset):
    rgb = np.array([[[5, 0, 0], [44, 1, 0], [0, 0, 0], [5, 0, 0]]], np.uint8)
    Image.fromarray(rgb).save(tmp_path / "panoptic.png")
    item = {
        "file_name": "a.jpg",
        "sem_seg_file_name": str(tmp_path / "never_made.png"),
        "pan_seg_file_name": str(tmp_path / "panoptic.png"),
        "segments_info": [{"id": 5, "category_id": 2}, {"id": 300, "category_id": 0}],
    }
    evaluator = SemanticEvaluator(new_dataset([item], stuff_classes=CLASSES))
    assert evaluator.labels(item, (1, 4)).tolist() == [[2, 0, 255, 2]]


def test_evaluator_names_what_is_wrong(labelled):
    name, item = labelled
    evaluator = SemanticEvaluator(name)
    with pytest.raises(KeyError, match="'sem_seg' in the model's output.*SEMANTIC_ON"):
        evaluator.process([item], [{}])
    with pytest.raises(ValueError, match="the 3 classes.*got 4"):
        evaluator.process([item], [{"sem_seg": torch.zeros(4, 1, 4)}])
    sized = {**item, "height": 1, "width": 4}
    with pytest.raises(ValueError, match=r"size \(1, 4\), got \(2, 4\)"):
        evaluator.process([sized], [{"sem_seg": torch.zeros(3, 2, 4)}])
    with pytest.raises(FileNotFoundError, match="no semantic ground truth of unknown.jpg"):
        evaluator.process([{"file_name": "unknown.jpg"}], [scores([[0]])])


def test_label_beyond_the_classes_is_refused(tmp_path, new_dataset):
    Image.fromarray(np.array([[3]], np.uint8)).save(tmp_path / "labels.png")
    item = {"file_name": "a.jpg", "sem_seg_file_name": str(tmp_path / "labels.png")}
    evaluator = SemanticEvaluator(new_dataset([item], stuff_classes=CLASSES))
    with pytest.raises(ValueError, match="below 3 or 255"):
        evaluator.process([item], [scores([[0]])])

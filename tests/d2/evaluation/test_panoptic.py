"""Panoptic quality: hand-computed literals, panopticapi itself, and the evaluator on files."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from expedite_d2.d2.evaluation.panoptic import PanopticEvaluator, match_segments, panoptic_quality


def segment(segment_id: int, category: int, area: int = 0, crowd: int = 0) -> dict:
    return {"id": segment_id, "category_id": category, "area": area, "iscrowd": crowd}


def write_panoptic(path: Path, ids: np.ndarray) -> None:
    rgb = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)
    Image.fromarray(rgb).save(path)


def test_match_counts_hits_misses_and_false_positives_by_hand():
    truth = np.array([[7, 7, 7, 7, 7, 7, 0, 0, 900, 900]])
    prediction = np.array([[1, 1, 1, 1, 2, 2, 1, 2, 3, 3]])
    counts = match_segments(
        truth,
        [segment(7, 1), segment(900, 2)],
        prediction,
        [segment(1, 1), segment(2, 1), segment(3, 3)],
    ).counts
    # Segment 1: 4 common pixels, 5 + 6 - 4 - 1 void = 6 in the union.
    assert counts[1].ious == [4 / 6]
    # Segment 2: a third of it is void, so it is a false positive.
    assert (counts[1].false_positives, counts[1].false_negatives) == (1, 0)
    assert (counts[2].ious, counts[2].false_negatives) == ([], 1)
    assert (counts[3].ious, counts[3].false_positives) == ([], 1)
    quality = panoptic_quality([counts], {1, 2, 3, 4})
    assert quality["PQ"] == pytest.approx(100 * (4 / 6 / 1.5) / 3)
    assert quality["SQ"] == pytest.approx(100 * (4 / 6) / 3)
    assert quality["RQ"] == pytest.approx(100 * (1 / 1.5) / 3)


def test_match_needs_more_than_half_the_union():
    truth = np.array([[5, 5, 5, 6]])
    prediction = np.array([[1, 1, 2, 2]])
    counts = match_segments(
        truth, [segment(5, 1), segment(6, 2)], prediction, [segment(1, 1), segment(2, 2)]
    ).counts
    assert counts[1].ious == [2 / 3]
    # Exactly one half is no match.
    assert (counts[2].ious, counts[2].false_positives, counts[2].false_negatives) == ([], 1, 1)


def test_prediction_mostly_in_void_or_crowd_is_ignored():
    truth = np.array([[0, 0, 0, 8, 8, 8, 9, 9]])
    prediction = np.array([[1, 1, 1, 1, 2, 2, 2, 3]])
    counts = match_segments(
        truth,
        [segment(8, 1, crowd=1), segment(9, 2)],
        prediction,
        [segment(1, 2), segment(2, 1), segment(3, 1)],
    ).counts
    # 1: three quarters void. 2: two thirds in the crowd of its class. 3: outside of both.
    assert 1 in counts and counts[1].false_positives == 1
    assert counts[1].false_negatives == 0, "a crowd is never missed"
    assert (counts[2].false_positives, counts[2].false_negatives) == (0, 1)


def test_map_and_segments_that_disagree_are_refused():
    ids = np.array([[1, 2]])
    with pytest.raises(ValueError, match="list different segments"):
        match_segments(ids, [], ids, [segment(1, 1)])
    with pytest.raises(ValueError, match="list different segments"):
        match_segments(ids, [], ids, [segment(1, 1), segment(2, 1), segment(3, 1)])
    with pytest.raises(ValueError, match="annotation's size"):
        match_segments(ids, [], ids.T, [segment(1, 1), segment(2, 1)])


def test_quality_of_nothing_is_undefined():
    assert panoptic_quality([], {1}) == {"PQ": None, "SQ": None, "RQ": None}


def random_case(rng: np.random.Generator) -> tuple:
    """Annotation and prediction that overlap much, with void, crowds and all kinds of errors."""
    height, width = rng.integers(8, 40, 2)
    blocks = np.kron(rng.integers(0, 9, (6, 6)), np.ones((7, 7), int))[:height, :width]
    ids = np.unique(rng.integers(1, 2**24 - 1, 9))
    truth = np.concatenate([[0], ids])[blocks % (len(ids) + 1)]
    truth_segments = [
        segment(int(i), int(rng.integers(1, 6)), int((truth == i).sum()), int(rng.random() < 0.2))
        for i in np.unique(truth)
        if i != 0 and rng.random() < 0.95
    ]
    category = {s["id"]: s["category_id"] for s in truth_segments}
    prediction = np.zeros_like(truth)
    predicted = []
    for number, i in enumerate(np.unique(truth), 1):
        shifted = np.roll(truth == i, tuple(rng.integers(-2, 3, 2)), (0, 1))
        prediction[shifted & (rng.random(truth.shape) < 0.9)] = number
        if rng.random() < 0.9:
            predicted.append((number, category.get(int(i), 1)))
        else:
            predicted.append((number, int(rng.integers(1, 6))))
    present = set(np.unique(prediction))
    return truth, truth_segments, prediction, [segment(n, c) for n, c in predicted if n in present]


def test_quality_equals_panopticapi_on_random_maps(tmp_path):
    root = os.environ.get("PANOPTICAPI_ROOT")
    if root:
        sys.path.insert(0, root)
    try:
        panopticapi = importlib.import_module("panopticapi.evaluation")
    except ImportError:
        pytest.skip("panopticapi is not importable: set PANOPTICAPI_ROOT to a checkout of it")
    finally:
        if root:
            sys.path.remove(root)

    rng = np.random.default_rng(0)
    categories = {c: {"id": c, "isthing": int(c < 4)} for c in range(1, 7)}
    counts, pairs = [], []
    for index in range(40):
        truth, truth_segments, prediction, predicted = random_case(rng)
        counts.append(match_segments(truth, truth_segments, prediction, predicted).counts)
        name = f"{index}.png"
        for folder, ids in (("truth", truth), ("prediction", prediction)):
            (tmp_path / folder).mkdir(exist_ok=True)
            write_panoptic(tmp_path / folder / name, ids)
        pairs.append(
            (
                {"image_id": index, "file_name": name, "segments_info": truth_segments},
                {"image_id": index, "file_name": name, "segments_info": predicted},
            )
        )
    theirs = panopticapi.pq_compute_single_core(
        0, pairs, str(tmp_path / "truth"), str(tmp_path / "prediction"), categories
    )
    assert sum(c.tp for c in theirs.pq_per_cat.values()) > 50
    assert sum(c.fp for c in theirs.pq_per_cat.values()) > 10
    for isthing, group in ((None, set(categories)), (True, {1, 2, 3}), (False, {4, 5, 6})):
        expected, _ = theirs.pq_average(categories, isthing=isthing)
        ours = panoptic_quality(counts, group)
        for name in ("PQ", "SQ", "RQ"):
            assert ours[name] == pytest.approx(100 * expected[name.lower()], abs=1e-9)


@pytest.fixture
def dataset(tmp_path, new_dataset):
    """One 2x4 image: thing 17 (contiguous 0) on the left, stuff 120 (contiguous 1) on the right."""
    ids = np.array([[300, 300, 70000, 70000]] * 2)
    write_panoptic(tmp_path / "a.png", ids)
    annotation = {
        "categories": [{"id": 17, "isthing": 1}, {"id": 120, "isthing": 0}],
        "annotations": [
            {
                "image_id": 5,
                "file_name": "a.png",
                "segments_info": [segment(300, 17, 4), segment(70000, 120, 4)],
            }
        ],
    }
    (tmp_path / "panoptic.json").write_text(json.dumps(annotation))
    return new_dataset(
        [],
        panoptic_json=str(tmp_path / "panoptic.json"),
        panoptic_root=str(tmp_path),
        thing_dataset_id_to_contiguous_id={17: 0},
        stuff_dataset_id_to_contiguous_id={120: 1},
    )


def output(ids: list, *segments: tuple[int, int, bool]) -> dict:
    infos = [{"id": i, "category_id": c, "isthing": t} for i, c, t in segments]
    return {"panoptic_seg": (torch.tensor(ids, dtype=torch.int32), infos)}


def test_evaluator_reads_png_and_maps_categories(dataset):
    evaluator = PanopticEvaluator(dataset)
    ids = [[1, 1, 2, 2], [1, 1, 2, 0]]
    evaluator.process([{"image_id": 5}], [output(ids, (1, 0, True), (2, 1, False))])
    metrics = evaluator.evaluate()["panoptic_seg"]
    assert metrics["PQ_th"] == metrics["SQ_th"] == metrics["RQ_th"] == 100
    assert (metrics["PQ_st"], metrics["RQ_st"]) == (75, 100)
    assert metrics["PQ"] == 87.5
    assert set(metrics) == {m + s for m in ("PQ", "SQ", "RQ") for s in ("", "_th", "_st")}


def test_evaluator_counts_an_image_once_and_forgets_on_reset(dataset):
    evaluator = PanopticEvaluator(dataset)
    good = output([[1, 1, 2, 2]] * 2, (1, 0, True), (2, 1, False))
    for _ in range(3):
        evaluator.process([{"image_id": 5}], [good])
    assert evaluator.evaluate()["panoptic_seg"]["PQ"] == 100
    assert len(evaluator.records) == 1
    evaluator.reset()
    assert evaluator.evaluate()["panoptic_seg"]["PQ"] is None


def test_evaluator_names_what_is_wrong(dataset):
    evaluator = PanopticEvaluator(dataset)
    with pytest.raises(KeyError, match="'panoptic_seg' in the model's output.*PANOPTIC_ON"):
        evaluator.process([{"image_id": 5}], [{"sem_seg": None}])
    with pytest.raises(ValueError, match="image 6 is not in the panoptic annotation of .*json"):
        evaluator.process([{"image_id": 6}], [output([[0]])])
    with pytest.raises(ValueError, match="no stuff class 9"):
        evaluator.process([{"image_id": 5}], [output([[1]], (1, 9, False))])

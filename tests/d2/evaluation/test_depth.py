"""Depth errors: hand-computed literals, the crops of the literature, and truth from files."""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from expedite_d2.d2.evaluation import build_evaluators
from expedite_d2.d2.evaluation.depth import DepthEvaluator, crop_window, depth_errors

METADATA = {"depth_scale": 1 / 256, "depth_min": 1e-3, "depth_max": 80.0, "depth_crop": ""}


def test_errors_by_hand():
    errors = depth_errors(np.array([2.0, 4.0, 10.0, 1.0]), np.array([1.0, 4.0, 8.0, 2.0]))
    assert errors.RMSE == pytest.approx(math.sqrt((1 + 0 + 4 + 1) / 4))
    assert errors.AbsRel == pytest.approx((1 + 0 + 0.25 + 0.5) / 4)
    assert errors.SqRel == pytest.approx((1 + 0 + 0.5 + 0.5) / 4)
    # Ratios 2, 1, 1.25 (not below 1.25), 2; the second and third threshold are 1.5625, 1.953125.
    assert (errors.d1, errors.d2, errors.d3) == (0.25, 0.5, 0.5)
    a, b = math.log(2), math.log(1.25)
    squares, mean = (2 * a * a + b * b) / 4, (a + b - a) / 4
    assert errors.RMSE_log == pytest.approx(math.sqrt(squares))
    assert errors.SILog == pytest.approx(100 * math.sqrt(squares - mean**2))


def test_silog_forgives_a_common_factor_and_the_rest_does_not():
    truth = np.array([1.0, 3.0, 20.0])
    errors = depth_errors(1.2 * truth, truth)
    assert errors.SILog == pytest.approx(0, abs=1e-6)
    assert errors.RMSE_log == pytest.approx(math.log(1.2))
    assert errors.AbsRel == pytest.approx(0.2)
    assert errors.d1 == 1


@pytest.mark.parametrize(
    ("kind", "size", "rows", "columns"),
    [
        ("", (4, 6), (0, 4), (0, 6)),
        ("garg", (375, 1242), (153, 371), (44, 1197)),
        ("garg", (352, 1216), (143, 349), (43, 1172)),
        ("eigen", (375, 1242), (124, 342), (44, 1197)),
        ("nyu", (480, 640), (45, 471), (41, 601)),
    ],
)
def test_crops(kind, size, rows, columns):
    window = crop_window(kind, *size)
    assert [part.indices(side)[:2] for part, side in zip(window, size, strict=True)] == [
        rows,
        columns,
    ]


def test_crops_name_what_is_wrong():
    with pytest.raises(ValueError, match="'nyu', 'nyu_mirrored' or '', got 'centre'"):
        crop_window("centre", 4, 4)
    with pytest.raises(ValueError, match="480x640, got 240x320"):
        crop_window("nyu", 240, 320)


def save_depth(path, metres, scale=1 / 256):
    units = np.round(np.asarray(metres, dtype=np.float64) / scale).astype(np.uint16)
    Image.fromarray(units).save(path)
    return str(path)


@pytest.fixture
def measured(tmp_path, new_dataset):
    """A data set of two images, 2x3, whose second one has a single valid pixel."""
    items = []
    for name, metres in (("a", [[1, 4, 8], [2, 0, 90]]), ("b", [[0, 0, 5], [0, 0, 0]])):
        path = save_depth(tmp_path / f"{name}.png", metres)
        items.append({"file_name": f"{name}.jpg", "depth_file_name": path})
    return new_dataset(items, evaluator_type="depth", **METADATA), items


def output(metres):
    return {"depth": torch.tensor(metres, dtype=torch.float32)}


def test_evaluator_averages_images_not_pixels(measured):
    name, items = measured
    evaluator = DepthEvaluator(name)
    # No measure at (1, 1), beyond the cap at (1, 2).
    evaluator.process(items, [output([[2, 4, 10], [1, 7, 7]]), output([[9, 9, 6], [9, 9, 9]])])
    metrics = evaluator.evaluate()["depth"]
    first = math.sqrt((1 + 0 + 4 + 1) / 4)
    assert metrics["RMSE"] == pytest.approx((first + 1.0) / 2)
    assert metrics["AbsRel"] == pytest.approx(((1 + 0.25 + 0.5) / 4 + 0.2) / 2)
    assert metrics["d1"] == pytest.approx((0.25 + 1) / 2)
    assert list(metrics) == ["RMSE", "RMSE_log", "AbsRel", "SqRel", "d1", "d2", "d3", "SILog"]


def test_evaluator_clamps_predictions_and_survives_what_is_not_a_number(measured):
    name, items = measured
    evaluator = DepthEvaluator(name)
    evaluator.process(items[1:], [output([[0, 0, math.inf], [0, 0, 0]])])
    assert evaluator.evaluate()["depth"]["RMSE"] == pytest.approx(75)
    evaluator.reset()
    evaluator.process(items[1:], [output([[0, 0, math.nan], [0, 0, 0]])])
    assert evaluator.evaluate()["depth"]["RMSE"] == pytest.approx(5 - 1e-3)


def test_evaluator_leaves_out_images_without_truth(measured, tmp_path):
    name, items = measured
    empty = {"file_name": "c.jpg", "depth_file_name": save_depth(tmp_path / "c.png", [[0, 99]])}
    evaluator = DepthEvaluator(name)
    evaluator.process([empty], [output([[3, 3]])])
    assert set(evaluator.evaluate()["depth"].values()) == {None}
    evaluator.process(items[1:], [output([[0, 0, 6], [0, 0, 0]])])
    assert evaluator.evaluate()["depth"]["RMSE"] == pytest.approx(1)


def test_evaluator_finds_the_depth_that_a_mapper_dropped(measured):
    name, items = measured
    evaluator = DepthEvaluator(name)
    evaluator.process([{"file_name": "b.jpg"}], [output([[0, 0, 5], [0, 0, 0]])])
    assert evaluator.evaluate()["depth"]["RMSE"] == 0
    with pytest.raises(KeyError, match="no depth of unknown.jpg"):
        evaluator.process([{"file_name": "unknown.jpg"}], [output([[1]])])


def test_evaluator_crops_the_whole_image_before_the_benchmark_window(tmp_path, new_dataset):
    size = (375, 1242)
    top, left = size[0] - 352, (size[1] - 1216) // 2
    metres = np.full(size, 10.0)
    metres[:153] = 1.0  # outside of Garg's crop
    item = {
        "file_name": "a.jpg",
        "depth_file_name": save_depth(tmp_path / "a.png", metres),
        "crop": (top, left, 352, 1216),
    }
    name = new_dataset([item], **{**METADATA, "depth_crop": "garg"})
    evaluator = DepthEvaluator(name)
    prediction = torch.full((352, 1216), 10.0)
    prediction[: 153 - top] = 77.0
    evaluator.process([item], [{"depth": prediction}])
    assert evaluator.evaluate()["depth"]["RMSE"] == 0
    prediction[153 - top] = 11.0
    evaluator.process([item], [{"depth": prediction}])
    # One row of 371 - 153.
    assert evaluator.evaluate()["depth"]["RMSE"] == pytest.approx(math.sqrt(1 / 218))


def test_evaluator_names_what_is_wrong(measured, tmp_path):
    name, items = measured
    evaluator = DepthEvaluator(name)
    with pytest.raises(KeyError, match="'depth' in the model's output, got \\['sem_seg'\\]"):
        evaluator.process(items[:1], [{"sem_seg": torch.zeros(2, 2, 3)}])
    with pytest.raises(ValueError, match=r"size \(2, 3\), got \(3, 2\)"):
        evaluator.process(items[:1], [output([[1, 1], [1, 1], [1, 1]])])
    Image.fromarray(np.zeros((2, 3), np.uint8)).save(tmp_path / "grey.png")
    grey = {"file_name": "g.jpg", "depth_file_name": str(tmp_path / "grey.png")}
    with pytest.raises(ValueError, match="grey.png is not a depth map.*got uint8"):
        evaluator.process([grey], [output([[1, 1, 1], [1, 1, 1]])])
    with pytest.raises(FileNotFoundError, match="absent.png"):
        evaluator.process(
            [{"file_name": "h.jpg", "depth_file_name": str(tmp_path / "absent.png")}],
            [output([[1]])],
        )


def test_evaluator_of_two_ranks_gives_the_metrics_of_one(measured):
    name, items = measured
    outputs = [output([[2, 4, 10], [1, 7, 7]]), output([[9, 9, 6], [9, 9, 9]])]
    whole, first, second = (DepthEvaluator(name) for _ in range(3))
    whole.process(items, outputs)
    first.process(items[:1], outputs[:1])
    second.process(items[1:], outputs[1:])
    shares = [first.records, second.records, {}]
    with mock.patch("expedite_d2.d2.evaluation.evaluator.comm.gather", return_value=shares):
        gathered = first.evaluate()
    assert gathered == whole.evaluate()


def test_depth_data_sets_get_this_evaluator(measured):
    name, _ = measured
    cfg = mock.MagicMock()
    evaluators = build_evaluators(cfg, name)
    assert [type(evaluator) for evaluator in evaluators] == [DepthEvaluator]

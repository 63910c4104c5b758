"""Average precision: literals that follow from COCO's definition."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from expedite_d2.d2 import Boxes, Instances
from expedite_d2.d2.evaluation.instance import InstanceEvaluator, encode_masks

SIZE = 64, 48  # height, width


def mask(top: int, left: int, height: int, width: int) -> torch.Tensor:
    result = torch.zeros(SIZE, dtype=torch.bool)
    result[top : top + height, left : left + width] = True
    return result


def annotation(number: int, image: int, category: int, box: tuple, crowd: int = 0) -> dict:
    top, left, height, width = box
    rle = coco_mask.encode(np.asfortranarray(mask(*box).numpy().astype(np.uint8)))
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": [left, top, width, height],
        "area": height * width,
        "iscrowd": crowd,
        "segmentation": {"size": list(SIZE), "counts": rle["counts"].decode()},
    }


def output(*found: tuple[tuple, float, int], boxes: bool = False) -> dict:
    """Instances from (mask's box, score, contiguous class); boxes are zeros, or the masks'."""
    instances = Instances(SIZE)
    instances.pred_masks = torch.stack(
        [mask(*box) for box, _, _ in found] or [torch.zeros(SIZE)]
    ).float()[: len(found)]
    instances.scores = torch.tensor([score for _, score, _ in found])
    instances.pred_classes = torch.tensor([c for _, _, c in found], dtype=torch.int64)
    corners = [[x, y, x + w, y + h] for (y, x, h, w), _, _ in found]
    tensor = torch.tensor(corners, dtype=torch.float32).reshape(-1, 4)
    instances.pred_boxes = Boxes(tensor if boxes else torch.zeros_like(tensor))
    return {"instances": instances}


SQUARE, OTHER = (4, 4, 10, 10), (30, 20, 20, 20)


@pytest.fixture
def evaluator(tmp_path, new_dataset):
    """Images 1, 2 and 3; classes 7 and 9; the third image is never evaluated."""
    content = {
        "images": [{"id": i, "height": SIZE[0], "width": SIZE[1]} for i in (1, 2, 3)],
        "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
        "annotations": [
            annotation(1, 1, 7, SQUARE),
            annotation(2, 2, 7, OTHER),
            annotation(3, 3, 9, SQUARE),
        ],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    name = new_dataset([], json_file=str(path), thing_dataset_id_to_contiguous_id={7: 0, 9: 1})
    return InstanceEvaluator(name, max_detections=100)


def evaluate(evaluator: InstanceEvaluator, *outputs: dict) -> dict:
    evaluator.reset()
    evaluator.process([{"image_id": i} for i in range(1, len(outputs) + 1)], outputs)
    return evaluator.evaluate()


def test_perfect_masks_have_full_precision_in_their_sizes(evaluator, capsys):
    results = evaluate(evaluator, output((SQUARE, 0.9, 0)), output((OTHER, 0.8, 0)))
    # 100 and 400 pixels are both "small"; class 9 is in no evaluated image.
    expected = {"AP": 100, "AP50": 100, "AP75": 100, "APs": 100, "APm": None, "APl": None}
    assert results == {"segm": pytest.approx(expected)}
    assert capsys.readouterr().out == ""


def test_precision_by_hand(evaluator):
    # IoU 0.81 on image 1: matched at 0.50 … 0.80, 7 of 10 thresholds. Missed on image 2: recall
    # ends at one half, 51 of COCO's 101 recall points.
    results = evaluate(evaluator, output(((4, 4, 9, 9), 0.9, 0)), output())
    assert results["segm"]["AP50"] == pytest.approx(100 * 51 / 101)
    assert results["segm"]["AP75"] == pytest.approx(100 * 51 / 101)
    assert results["segm"]["AP"] == pytest.approx(100 * 51 / 101 * 0.7)


def test_false_positive_with_the_higher_score_halves_precision(evaluator):
    results = evaluate(
        evaluator,
        output(((40, 0, 5, 5), 0.95, 0), (SQUARE, 0.9, 0)),
        output((OTHER, 0.85, 0)),
    )
    # Precisions at recall 0.5 and 1: 1/2 and 2/3; the envelope is 2/3 everywhere.
    assert results["segm"]["AP"] == pytest.approx(100 * 2 / 3)


def test_no_detection_at_all_is_zero_not_undefined(evaluator):
    assert evaluate(evaluator, output(), output())["segm"]["AP"] == 0


def test_boxes_count_only_where_they_are_predicted(evaluator):
    found = output((SQUARE, 0.9, 0), boxes=True), output((OTHER, 0.8, 0), boxes=True)
    results = evaluate(evaluator, *found)
    assert set(results) == {"segm", "bbox"}
    assert results["bbox"]["AP"] == pytest.approx(100)


def test_detections_beyond_the_limit_are_dropped(evaluator):
    evaluator.max_detections = 1
    results = evaluate(
        evaluator, output(((40, 0, 5, 5), 0.95, 0), (SQUARE, 0.9, 0)), output((OTHER, 0.8, 0))
    )
    # The hit on image 1 is not seen: recall 1/2 at precision 1/2.
    assert results["segm"]["AP"] == pytest.approx(100 * 51 / 101 / 2)


def test_encoded_masks_decode_to_themselves():
    masks = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0)) > 0.5
    decoded = coco_mask.decode(encode_masks(masks)).transpose(2, 0, 1)
    assert np.array_equal(decoded.astype(bool), masks.numpy())
    assert encode_masks(torch.zeros(0, 5, 7)) == []


def test_evaluator_names_what_is_wrong(evaluator):
    with pytest.raises(KeyError, match="'instances' in the model's output.*INSTANCE_ON"):
        evaluate(evaluator, {})
    with pytest.raises(ValueError, match="no thing class 5"):
        evaluate(evaluator, output((SQUARE, 0.9, 5)))
    evaluator.reset()
    with pytest.raises(ValueError, match="image 44 is not in the instance annotation of .*json"):
        evaluator.process([{"image_id": 44}], [output()])

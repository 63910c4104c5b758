"""Mutations of valid annotations end in a sensible metric or in one sentence, never otherwise.

Every case is drawn from a seed that stands in the test's name. What may end a process is tried in
``test_masks.py``, in a process of its own.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expedite_d2.d2 import Boxes, CfgNode, DatasetCatalog, Instances
from expedite_d2.d2.data import TrainMapper
from expedite_d2.d2.data.build import get_dataset
from expedite_d2.d2.data.masks import decode_segmentation
from expedite_d2.d2.evaluation import InstanceEvaluator, PanopticEvaluator, SemanticEvaluator
from expedite_d2.d2.evaluation.panoptic import read_panoptic

SIZE = (40, 60)
# What stands in a field instead.
VALUES: list[Any] = [None, True, False, "", "0", "7", "x", 0, 1, -1, 2, 0.5, -0.0, 2**31, 10**400]
VALUES += [1e11, -1e300, math.nan, math.inf, [], {}, [[]], [None], [1, 2], {"size": [1, 1]}]


def nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in items:
        yield value, key
        if isinstance(child, (dict, list)):
            yield from nodes(child)


def mutate(content: dict[str, Any], rng: np.random.Generator) -> None:
    """Drops, replaces, repeats or exchanges one or two values anywhere in the file."""
    for _ in range(rng.integers(1, 3)):
        places = list(nodes(content))
        container, key = places[rng.integers(len(places))]
        other, place = places[rng.integers(len(places))]
        action = rng.integers(6)
        if action == 0:
            del container[key]
        elif action == 1 and isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        elif action == 2:
            container[key] = copy.deepcopy(other[place])
        else:
            container[key] = copy.deepcopy(VALUES[rng.integers(len(VALUES))])


def flip(data: bytes, rng: np.random.Generator) -> bytes:
    """A byte or two with another bit, or a piece cut out."""
    damaged = bytearray(data)
    for _ in range(rng.integers(1, 3)):
        damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
    if rng.random() < 0.3:
        start = rng.integers(len(damaged))
        del damaged[start : start + rng.integers(1, 40)]
    return bytes(damaged)


def samples(cfg: CfgNode, mapper: str, name: str) -> None:
    """A training sample of every image of a data set."""
    cfg.INPUT.DATASET_MAPPER_NAME, cfg.INPUT.IMAGE_SIZE = mapper, 48
    train = TrainMapper(cfg)
    for entry in train.usable(name, get_dataset(name)):
        train(entry, np.random.default_rng(0))


def found_instances(name: str) -> dict[Any, dict[str, Any]]:
    """Perfect predictions of an instance data set."""
    found = {}
    for entry in DatasetCatalog.get(name):
        kept = [one for one in entry["annotations"] if not one["iscrowd"]]
        masks = [decode_segmentation(one["segmentation"], *SIZE) for one in kept]
        instances = Instances(SIZE)
        instances.pred_masks = torch.from_numpy(np.stack(masks or [np.zeros(SIZE)])[: len(kept)])
        instances.pred_classes = torch.tensor([one["category_id"] for one in kept], dtype=int)
        instances.scores = torch.full((len(kept),), 0.5)
        x, y, w, h = torch.tensor([o["bbox"] for o in kept]).reshape(-1, 4).unbind(1)
        instances.pred_boxes = Boxes(torch.stack([x, y, x + w, y + h], 1).float())
        found[entry["image_id"]] = {"instances": instances}
    return found


def found_segments(name: str) -> dict[Any, dict[str, Any]]:
    """Perfect predictions of a panoptic data set, crowds included."""
    found = {}
    for entry in DatasetCatalog.get(name):
        ids = torch.from_numpy(read_panoptic(entry["pan_seg_file_name"], SIZE))
        scores = torch.zeros(150, *SIZE)
        for segment in entry["segments_info"]:
            scores[segment["category_id"]][ids == segment["id"]] = 1
        segments = [dict(segment) for segment in entry["segments_info"]]
        found[entry["image_id"]] = {"panoptic_seg": (ids, segments), "sem_seg": scores}
    return found


def evaluate(evaluator: Any, name: str, found: dict[Any, dict[str, Any]]) -> list[float | None]:
    """All metrics of these predictions, whatever the data set lists by now."""
    evaluator.reset()
    for entry in DatasetCatalog.get(name):
        output = found.get(entry["image_id"], next(iter(found.values())))
        evaluator.process([{**entry, "height": SIZE[0], "width": SIZE[1]}], [output])
    return [value for metrics in evaluator.evaluate().values() for value in metrics.values()]


def ends_well(run: Callable[[], Any]) -> str | None:
    """The sentence that something ends in, None if in a result; every metric is one."""
    try:
        result = run()
    except (ValueError, OSError) as error:
        assert str(error) and "\n" not in str(error)
        return str(error)
    assert all(value is None or 0 <= value <= 100 + 1e-9 for value in result or ())
    return None


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("damage", ["mutated", "flipped"])
@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_annotation_files(task: str, damage: str, seed: int, ade20k: Path, cfg: CfgNode) -> None:
    name = f"ade20k_{task}_val"
    path = ade20k / f"ADEChallengeData2016/{name}.json"
    valid = path.read_bytes()
    if task == "instance":
        found = found_instances(name)
        mapper, evaluators = "coco_instance_lsj", [InstanceEvaluator]
    else:
        found = found_segments(name)
        mapper, evaluators = "coco_panoptic_lsj", [PanopticEvaluator, SemanticEvaluator]
    rng = np.random.default_rng(seed)
    sentences = 0
    for _ in range(25):
        if damage == "mutated":
            content = json.loads(valid)
            mutate(content, rng)
            path.write_text(json.dumps(content))
        else:
            path.write_bytes(flip(valid, rng))
        runs = [lambda: samples(cfg, mapper, name)]
        for kind in evaluators:
            more = (100,) if kind is InstanceEvaluator else ()
            runs.append(lambda kind=kind, more=more: evaluate(kind(name, *more), name, found))
        ends = [ends_well(run) for run in runs]
        sentences += any(ends)
    assert sentences > 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("field", ["pan_seg_file_name", "sem_seg_file_name"])
def test_maps_of_labels(field: str, seed: int, ade20k: Path, cfg: CfgNode) -> None:
    name = "ade20k_panoptic_val"
    path = Path(DatasetCatalog.get(name)[0][field])
    found, valid = found_segments(name), path.read_bytes()
    task, kind = (
        ("panoptic", PanopticEvaluator) if "pan" in field else ("semantic", SemanticEvaluator)
    )
    rng = np.random.default_rng(seed)
    sentences = 0
    for _ in range(25):
        path.write_bytes(flip(valid, rng))
        ends = [
            ends_well(lambda: samples(cfg, f"mask_former_{task}", name)),
            ends_well(lambda: evaluate(kind(name), name, found)),
        ]
        for sentence in filter(None, ends):
            assert path.name in sentence or "labels of " in sentence
        sentences += any(ends)
    assert sentences > 0


BEGINNINGS = {
    "utf-8": "utf-8-sig",
    "utf-16": "utf-16",
    "utf-16 little": "utf-16-le",
    "utf-32": "utf-32",
    "utf-8 without a mark": "utf-8",
}


@pytest.mark.parametrize("encoding", BEGINNINGS.values(), ids=BEGINNINGS)
@pytest.mark.parametrize("name", ["ade20k_instance_val", "ade20k_panoptic_val"])
def test_json_in_every_encoding_of_unicode(name: str, encoding: str, ade20k: Path) -> None:
    path = ade20k / f"ADEChallengeData2016/{name}.json"
    expected = DatasetCatalog.get(name)
    path.write_text(path.read_text(), encoding=encoding)
    assert DatasetCatalog.get(name) == expected


def test_deeply_nested_json_is_refused(ade20k: Path) -> None:
    path = ade20k / "ADEChallengeData2016/ade20k_instance_val.json"
    path.write_text('{"annotations": ' + "[" * 100000)
    with pytest.raises(ValueError, match="instance_val.json is not a JSON file"):
        DatasetCatalog.get("ade20k_instance_val")

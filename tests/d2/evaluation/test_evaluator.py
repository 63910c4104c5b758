"""The evaluation loop: modes, empty data, choice of evaluators, and ranks that share the images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from expedite_d2.d2 import Boxes, CfgNode, DatasetCatalog, Instances, MetadataCatalog, comm
from expedite_d2.d2.evaluation import (
    InstanceEvaluator,
    PanopticEvaluator,
    SemanticEvaluator,
    build_evaluators,
    inference_on_dataset,
)

IMAGES = 5
SIZE = 24, 32


def config(panoptic: bool, semantic: bool, instance: bool) -> CfgNode:
    return CfgNode(
        {
            "TEST": {"DETECTIONS_PER_IMAGE": 100},
            "MODEL": {
                "MASK_FORMER": {
                    "TEST": {
                        "PANOPTIC_ON": panoptic,
                        "SEMANTIC_ON": semantic,
                        "INSTANCE_ON": instance,
                    }
                }
            },
        }
    )


THINGS = [{"id": 10, "name": "box", "isthing": 1}, {"id": 20, "name": "crate", "isthing": 1}]
STUFF = [{"id": 30, "name": "floor", "isthing": 0}]


def write_dataset(root: Path) -> list[dict]:
    """Images of two boxes (things) on a floor (stuff) in all three annotations; their dicts."""
    items, panoptic, instances = [], [], []
    for number in range(IMAGES):
        ids = np.full(SIZE, 3, np.int64)
        ids[2 : 8 + number, 2:9] = 1
        ids[10:20, 12 : 20 + number] = 2
        rgb = np.stack([ids, 0 * ids, 0 * ids], -1).astype(np.uint8)
        path = root / f"{number}.png"
        Image.fromarray(rgb).save(path)
        segments = [
            {"id": i, "category_id": c, "area": int((ids == i).sum()), "iscrowd": 0}
            for i, c in ((1, 10), (2, 20), (3, 30))
        ]
        panoptic.append({"image_id": number, "file_name": path.name, "segments_info": segments})
        for i in (1, 2):
            ys, xs = np.nonzero(ids == i)
            left, top, right, bottom = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
            corners = [left, top, right, top, right, bottom, left, bottom]
            instances.append(
                {
                    "id": len(instances) + 1,
                    "image_id": number,
                    "category_id": 10 * i,
                    "bbox": [int(v) for v in (left, top, right - left, bottom - top)],
                    "area": int((ids == i).sum()),
                    "iscrowd": 0,
                    "segmentation": [[float(v) for v in corners]],
                }
            )
        items.append(
            {
                "image_id": number,
                "file_name": f"{number}.jpg",
                "pan_seg_file_name": str(path),
                "segments_info": [
                    {**s, "category_id": s["category_id"] // 10 - 1} for s in segments
                ],
            }
        )
    (root / "panoptic.json").write_text(
        json.dumps({"annotations": panoptic, "categories": THINGS + STUFF})
    )
    images = [{"id": i, "height": SIZE[0], "width": SIZE[1]} for i in range(IMAGES)]
    (root / "instances.json").write_text(
        json.dumps({"images": images, "annotations": instances, "categories": THINGS})
    )
    return items


def register_dataset(root: Path, items: list[dict]) -> str:
    """Registers what has been written."""
    name = f"evaluator_test_{root.name}"
    DatasetCatalog.register(name, lambda: items)
    MetadataCatalog.get(name).set(
        evaluator_type="coco_panoptic_seg",
        panoptic_json=str(root / "panoptic.json"),
        panoptic_root=str(root),
        json_file=str(root / "instances.json"),
        stuff_classes=["box", "crate", "floor"],
        thing_dataset_id_to_contiguous_id={10: 0, 20: 1},
        stuff_dataset_id_to_contiguous_id={30: 2},
    )
    return name


@pytest.fixture
def dataset(tmp_path):
    name = register_dataset(tmp_path, write_dataset(tmp_path))
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


class NoisyOracle(nn.Module):
    """Predicts the annotation with errors that depend on the image alone."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.BatchNorm2d(1).eval()
        self.seen: list[tuple[bool, bool]] = []

    def forward(self, batch: list[dict]) -> list[dict]:
        self.seen.append((self.training, torch.is_grad_enabled()))
        return [self.predict(item) for item in batch]

    def predict(self, item: dict) -> dict:
        rng = np.random.default_rng(item["image_id"])
        ids = np.asarray(Image.open(item["pan_seg_file_name"]))[..., 0].astype(np.int32)
        ids = np.roll(ids, tuple(rng.integers(-2, 3, 2)), (0, 1))
        ids[rng.random(ids.shape) < 0.1] = 3
        ids = torch.from_numpy(ids)
        instances = Instances(SIZE)
        instances.pred_masks = torch.stack([ids == 1, ids == 2]).float()
        instances.pred_boxes = Boxes(torch.zeros(2, 4))
        instances.scores = torch.from_numpy(rng.random(2).astype(np.float32))
        instances.pred_classes = torch.tensor([0, 1])
        segments = [{"id": i, "category_id": i - 1, "isthing": i < 3} for i in (1, 2, 3)]
        return {
            "panoptic_seg": (ids, segments),
            "sem_seg": nn.functional.one_hot(ids.long() - 1, 3).permute(2, 0, 1).float(),
            "instances": instances,
        }


def test_all_three_tasks_of_a_panoptic_data_set(dataset):
    loader = [[item] for item in DatasetCatalog.get(dataset)]
    evaluators = build_evaluators(config(True, True, True), dataset)
    results = inference_on_dataset(NoisyOracle(), loader, evaluators)
    assert set(results) == {"panoptic_seg", "sem_seg", "segm"}
    for task, metric in (("panoptic_seg", "PQ"), ("sem_seg", "mIoU"), ("segm", "AP")):
        assert 10 < results[task][metric] < 99
    json.dumps(results, allow_nan=False)


def test_model_is_evaluated_without_gradients_and_its_modes_come_back(dataset):
    model = NoisyOracle().train()
    model.frozen.eval()
    loader = [[item] for item in DatasetCatalog.get(dataset)]
    inference_on_dataset(model, loader, SemanticEvaluator(dataset))
    assert set(model.seen) == {(False, False)}
    assert model.training and not model.frozen.training


def test_modes_come_back_after_an_error(dataset):
    model = NoisyOracle().train()
    with pytest.raises(KeyError, match="pan_seg_file_name"):
        inference_on_dataset(model, [[{"image_id": 0}]], SemanticEvaluator(dataset))
    assert model.training


def test_empty_data_set_is_an_error(dataset):
    with pytest.raises(ValueError, match="data set is empty"):
        inference_on_dataset(NoisyOracle(), [], [SemanticEvaluator(dataset)])


@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        ((True, True, True), [PanopticEvaluator, SemanticEvaluator, InstanceEvaluator]),
        ((True, False, False), [PanopticEvaluator]),
        ((False, True, False), [SemanticEvaluator]),
        ((False, False, True), [InstanceEvaluator]),
    ],
)
def test_build_evaluators_follows_the_switches(dataset, switches, expected):
    assert [type(e) for e in build_evaluators(config(*switches), dataset)] == expected


def test_build_evaluators_of_data_sets_with_one_task(new_dataset):
    all_off = config(False, False, False)
    (semantic,) = build_evaluators(all_off, new_dataset([], evaluator_type="sem_seg"))
    (instance,) = build_evaluators(all_off, new_dataset([], evaluator_type="coco"))
    assert (type(semantic), type(instance)) == (SemanticEvaluator, InstanceEvaluator)


def test_build_evaluators_names_what_is_wrong(dataset, new_dataset):
    with pytest.raises(ValueError, match="nothing to evaluate"):
        build_evaluators(config(False, False, False), dataset)
    with pytest.raises(ValueError, match="evaluator_type.*got 'lvis'"):
        build_evaluators(config(True, True, True), new_dataset([], evaluator_type="lvis"))


# What each of two processes evaluates.
SHARES = {
    "one image handed out twice": ([0, 1, 2], [3, 4, 0]),
    "one share empty": ([0, 1, 2, 3, 4], []),
}


def evaluate_shares(root: Path, items: list[dict]) -> None:
    """One of two processes: writes its results for all SHARES to ``rank<r>.json``."""
    rank, name = comm.get_rank(), register_dataset(root, items)
    evaluators = build_evaluators(config(True, True, True), name)
    results = [
        inference_on_dataset(NoisyOracle(), [[items[i]] for i in shares[rank]], evaluators)
        for shares in SHARES.values()
    ]
    (root / f"rank{rank}.json").write_text(json.dumps(results))


@pytest.mark.slow
def test_two_processes_give_the_metrics_of_one(dataset, tmp_path, launch_two):
    loader = [[item] for item in DatasetCatalog.get(dataset)]
    evaluators = build_evaluators(config(True, True, True), dataset)
    alone = inference_on_dataset(NoisyOracle(), loader, evaluators)
    # Written before: one process would write what the other one reads.
    launch_two(evaluate_shares, tmp_path, DatasetCatalog.get(dataset))
    assert json.loads((tmp_path / "rank0.json").read_text()) == [alone] * len(SHARES)
    assert json.loads((tmp_path / "rank1.json").read_text()) == [{}] * len(SHARES)

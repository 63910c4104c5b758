"""Loaders: each image once for tests; an endless, reproducible stream for training."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from expedite_d2.d2 import CfgNode, MetadataCatalog, comm
from expedite_d2.d2.data import build_test_loader, build_train_loader
from expedite_d2.d2.data.scenes.dataset import load_scenes


@pytest.fixture
def train_cfg(cfg: CfgNode, scenes_cache: Path, register: Callable[..., None]) -> CfgNode:
    """Six scenes, batches of four."""
    metadata = MetadataCatalog.get("scenes_train").as_dict()
    register("tiny", lambda: load_scenes("train", scenes_cache, metadata))
    cfg.DATASETS.TRAIN = ("tiny",)
    cfg.INPUT.DATASET_MAPPER_NAME = "coco_panoptic_lsj"
    cfg.INPUT.IMAGE_SIZE, cfg.INPUT.MIN_SCALE = 96, 0.5
    cfg.SOLVER.IMS_PER_BATCH = 4
    return cfg


def _fingerprints(batches: list[list[dict[str, Any]]]) -> list[tuple[int, int]]:
    return [(sample["image_id"], int(sample["image"].sum())) for b in batches for sample in b]


def test_train_loader_is_endless_and_reproducible(train_cfg: CfgNode) -> None:
    batches = list(islice(build_train_loader(train_cfg), 6))
    assert [len(batch) for batch in batches] == [4] * 6
    ids = [number for number, _ in _fingerprints(batches)]
    assert all(sorted(ids[start : start + 6]) == list(range(6)) for start in range(0, 24, 6))
    again = list(islice(build_train_loader(train_cfg), 6))
    assert _fingerprints(again) == _fingerprints(batches)
    train_cfg.SEED += 1
    assert _fingerprints(list(islice(build_train_loader(train_cfg), 6))) != _fingerprints(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_train_loader_resumes_where_it_stopped(train_cfg: CfgNode, workers: int) -> None:
    whole = list(islice(build_train_loader(train_cfg), 5))
    train_cfg.DATALOADER.NUM_WORKERS = workers
    rest = list(islice(build_train_loader(train_cfg, start_iteration=3), 2))
    assert _fingerprints(rest) == _fingerprints(whole[3:])


def test_ranks_share_the_stream(train_cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = _fingerprints(list(islice(build_train_loader(train_cfg), 3)))
    parts = []
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        batches = list(islice(build_train_loader(train_cfg), 3))
        assert [len(batch) for batch in batches] == [2] * 3
        parts.append(_fingerprints(batches))
    assert [one for pair in zip(*parts, strict=True) for one in pair] == alone


def test_test_loader_gives_every_image_once(cfg: CfgNode, coco: Path) -> None:
    cfg.INPUT.MIN_SIZE_TEST = 40
    loader = build_test_loader(cfg, "coco_2017_val_panoptic")
    assert len(loader) == 2
    assert [[one["image_id"] for one in batch] for batch in loader] == [[1], [2]]
    assert torch.equal(loader.dataset[1]["image"], list(loader)[1][0]["image"])
    mapped = build_test_loader(cfg, "coco_2017_val_panoptic", lambda entry: entry["image_id"])
    assert list(mapped) == [[1], [2]]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_one_sentence(cfg: CfgNode, coco: Path, workers: int) -> None:
    path = coco / "coco/val2017/000000000002.jpg"
    path.write_bytes(b"no image")
    cfg.DATALOADER.NUM_WORKERS = workers
    with pytest.raises(ValueError, match="cannot be read") as caught:
        list(build_test_loader(cfg, "coco_2017_val_panoptic"))
    assert str(path) in str(caught.value) and "Traceback" not in str(caught.value)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="not found"):
        list(build_test_loader(cfg, "coco_2017_val_panoptic"))


def test_unknown_and_empty_data_sets(cfg: CfgNode, register: Callable[..., None]) -> None:
    with pytest.raises(
        ValueError, match="'no_such' is not registered; registered are .*scenes_val"
    ):
        build_test_loader(cfg, "no_such")
    register("empty", lambda: [])
    with pytest.raises(ValueError, match="'empty' is empty"):
        build_test_loader(cfg, "empty")
    cfg.DATASETS.TRAIN = ("empty",)
    with pytest.raises(ValueError, match="'empty' is empty"):
        build_train_loader(cfg)
    cfg.DATASETS.TRAIN = ()
    with pytest.raises(ValueError, match="DATASETS.TRAIN must name"):
        build_train_loader(cfg)


def test_a_task_without_annotations_is_refused(cfg: CfgNode, coco: Path) -> None:
    cfg.DATASETS.TRAIN = ("coco_2017_val",)
    cfg.INPUT.DATASET_MAPPER_NAME = "coco_panoptic_lsj"
    with pytest.raises(ValueError, match="needs 'pan_seg_file_name'"):
        build_train_loader(cfg)


def test_images_without_objects_are_left_out_for_instances(cfg: CfgNode, coco: Path) -> None:
    cfg.DATASETS.TRAIN = ("coco_2017_val",)
    cfg.INPUT.DATASET_MAPPER_NAME = "coco_instance_lsj"
    cfg.INPUT.IMAGE_SIZE, cfg.SOLVER.IMS_PER_BATCH = 64, 2
    for batch in islice(build_train_loader(cfg), 3):
        assert [sample["image_id"] for sample in batch] == [1, 1]


def test_a_batch_that_ranks_cannot_share_is_refused(
    train_cfg: CfgNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comm, "get_world_size", lambda: 3)
    with pytest.raises(ValueError, match=r"multiple of the number of processes \(3\), got 4"):
        build_train_loader(train_cfg)

"""Data: the embedded scenes, COCO and ADE20K, and the loaders. Importing it registers them all."""

from __future__ import annotations

from expedite_d2.data.ade20k import register_ade20k
from expedite_d2.data.build import build_test_loader, build_train_loader
from expedite_d2.data.coco import register_coco
from expedite_d2.data.mappers import TestMapper, TrainMapper, read_image
from expedite_d2.data.scenes.dataset import register_scenes

register_scenes()
register_coco()
register_ade20k()

__all__ = [
    "TestMapper",
    "TrainMapper",
    "build_test_loader",
    "build_train_loader",
    "read_image",
]

"""Data: the embedded scenes, the public data sets, and the loaders; importing it registers all."""

from __future__ import annotations

from expedite_d2.d2.data.ade20k import register_ade20k
from expedite_d2.d2.data.build import build_test_loader, build_train_loader
from expedite_d2.d2.data.cityscapes import register_cityscapes
from expedite_d2.d2.data.coco import register_coco
from expedite_d2.d2.data.depth import DepthTestMapper, DepthTrainMapper
from expedite_d2.d2.data.images import read_image
from expedite_d2.d2.data.kitti import register_kitti
from expedite_d2.d2.data.mappers import TestMapper, TrainMapper
from expedite_d2.d2.data.nyuv2 import register_nyuv2
from expedite_d2.d2.data.nyuv2_labeled import register_nyuv2_labeled
from expedite_d2.d2.data.panoptic_folder import register_panoptic_folders
from expedite_d2.d2.data.pascal_context import register_pascal_context
from expedite_d2.d2.data.scenes.dataset import register_scenes
from expedite_d2.d2.data.scenes.depth import register_scenes_depth

register_scenes()
register_scenes_depth()
register_kitti()
register_nyuv2()
register_nyuv2_labeled()
register_coco()
register_ade20k()
register_cityscapes()
register_pascal_context()
register_panoptic_folders()

__all__ = [
    "DepthTestMapper",
    "DepthTrainMapper",
    "TestMapper",
    "TrainMapper",
    "build_test_loader",
    "build_train_loader",
    "read_image",
]

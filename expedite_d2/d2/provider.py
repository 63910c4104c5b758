"""Which Detectron2: the real one where it can be imported, else the stand-in.

``EXPEDITE_D2_PROVIDER`` decides otherwise: ``builtin`` forces the stand-in, ``detectron2`` makes a
missing Detectron2 an error.
"""

# ruff: noqa: F401 - every import below is what this module is for
from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from typing import Literal


def _choose() -> Literal["detectron2", "builtin"]:
    wish = os.environ.get("EXPEDITE_D2_PROVIDER", "")
    if wish not in ("", "builtin", "detectron2"):
        raise ValueError(
            f"EXPEDITE_D2_PROVIDER must be 'builtin', 'detectron2' or unset, got {wish!r}"
        )
    installed = importlib.util.find_spec("detectron2") is not None
    if wish == "builtin" or not (wish or installed):
        return "builtin"
    try:
        # The package that imports all the others, its compiled module included.
        importlib.import_module("detectron2.engine")
    except ImportError as error:
        if wish:
            raise
        warnings.warn(
            f"Detectron2 is installed but cannot be imported ({error}); using the stand-in",
            RuntimeWarning,
            stacklevel=2,
        )
        return "builtin"
    return "detectron2"


PROVIDER = _choose()

if PROVIDER == "detectron2":
    from detectron2.checkpoint import DetectionCheckpointer, PeriodicCheckpointer
    from detectron2.config import CfgNode, configurable, get_cfg
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.samplers import InferenceSampler, TrainingSampler
    from detectron2.engine import default_argument_parser, default_setup
    from detectron2.layers import ShapeSpec
    from detectron2.modeling import (
        BACKBONE_REGISTRY,
        META_ARCH_REGISTRY,
        Backbone,
        build_backbone,
        build_model,
    )
    from detectron2.structures import BitMasks, Boxes, ImageList, Instances
    from detectron2.utils import comm
    from detectron2.utils.env import seed_all_rng
    from detectron2.utils.file_io import PathManager
    from detectron2.utils.registry import Registry
else:
    from expedite_d2.d2.builtin import (
        BACKBONE_REGISTRY,
        META_ARCH_REGISTRY,
        Backbone,
        BitMasks,
        Boxes,
        CfgNode,
        DatasetCatalog,
        DetectionCheckpointer,
        ImageList,
        InferenceSampler,
        Instances,
        MetadataCatalog,
        PathManager,
        PeriodicCheckpointer,
        Registry,
        ShapeSpec,
        TrainingSampler,
        build_backbone,
        build_model,
        comm,
        configurable,
        default_argument_parser,
        default_setup,
        get_cfg,
        seed_all_rng,
    )

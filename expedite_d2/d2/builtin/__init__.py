# ruff: noqa: F401 - every import below is what this module is for
"""A compact stand-in for Detectron2, made of fvcore, iopath and torch.

The names, signatures and behaviour are Detectron2's, as far as this project uses them; a
conformance test holds the two together wherever Detectron2 is installed.
"""

from fvcore.common.checkpoint import PeriodicCheckpointer
from fvcore.common.registry import Registry

from expedite_d2.d2.builtin import comm
from expedite_d2.d2.builtin.catalog import DatasetCatalog, Metadata, MetadataCatalog
from expedite_d2.d2.builtin.checkpoint import DetectionCheckpointer
from expedite_d2.d2.builtin.config import CfgNode, configurable, get_cfg
from expedite_d2.d2.builtin.engine import default_argument_parser, default_setup, seed_all_rng
from expedite_d2.d2.builtin.file_io import PathManager
from expedite_d2.d2.builtin.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    Backbone,
    ShapeSpec,
    build_backbone,
    build_model,
)
from expedite_d2.d2.builtin.samplers import InferenceSampler, TrainingSampler
from expedite_d2.d2.builtin.structures import BitMasks, Boxes, ImageList, Instances

"""The one door to Detectron2: its own objects where it is installed, a stand-in elsewhere.

Every name that must be Detectron2's (registries, config, structures, catalogs, samplers) comes from
``provider``. ``launch``, ``default_setup``, ``setup_logger``, ``build_model`` and
``DetectionCheckpointer`` keep Detectron2's signatures, but are shared by both providers: they add
training on CPUs, torchrun, one-sentence errors and checkpoints that are never half written.
"""

from expedite_d2.d2.common import (
    CorruptCheckpointError,
    DetectionCheckpointer,
    build_model,
    default_setup,
    launch,
)
from expedite_d2.d2.logger import setup_logger
from expedite_d2.d2.provider import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROVIDER,
    Backbone,
    BitMasks,
    Boxes,
    CfgNode,
    DatasetCatalog,
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
    comm,
    configurable,
    default_argument_parser,
    get_cfg,
    seed_all_rng,
)

__all__ = [
    "BACKBONE_REGISTRY",
    "META_ARCH_REGISTRY",
    "PROVIDER",
    "Backbone",
    "BitMasks",
    "Boxes",
    "CfgNode",
    "CorruptCheckpointError",
    "DatasetCatalog",
    "DetectionCheckpointer",
    "ImageList",
    "InferenceSampler",
    "Instances",
    "MetadataCatalog",
    "PathManager",
    "PeriodicCheckpointer",
    "Registry",
    "ShapeSpec",
    "TrainingSampler",
    "build_backbone",
    "build_model",
    "comm",
    "configurable",
    "default_argument_parser",
    "default_setup",
    "get_cfg",
    "launch",
    "seed_all_rng",
    "setup_logger",
]

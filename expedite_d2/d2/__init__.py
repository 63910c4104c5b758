"""The Detectron2 project: importing it registers the backbones, models and data sets.

Names that are Detectron2's own (registries, config, structures, catalogs, samplers) are its own
objects where it is installed, and a stand-in's elsewhere (``provider``). ``launch``,
``default_setup``, ``setup_logger``, ``build_model`` and ``DetectionCheckpointer`` keep Detectron2's
signatures, but are shared by both providers: they add training on CPUs, torchrun, one-sentence
errors and checkpoints that are never half written.
"""

from expedite_d2.errors import needs_extra

with needs_extra("d2"):
    from expedite_d2.d2 import data, modeling
    from expedite_d2.d2.checkpoint.checkpointer import CorruptCheckpointError, DetectionCheckpointer
    from expedite_d2.d2.config import add_expedite_config
    from expedite_d2.d2.engine.defaults import default_setup
    from expedite_d2.d2.engine.launch import launch
    from expedite_d2.d2.logger import setup_logger
    from expedite_d2.d2.modeling.build import build_model
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
    "add_expedite_config",
    "build_backbone",
    "build_model",
    "comm",
    "configurable",
    "data",
    "default_argument_parser",
    "default_setup",
    "get_cfg",
    "launch",
    "modeling",
    "seed_all_rng",
    "setup_logger",
]

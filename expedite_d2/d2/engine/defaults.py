"""What runs begin with: config, log, seed and output directory, the trained model, a few images."""

from __future__ import annotations

import argparse
import os
from itertools import islice
from typing import Any

from torch import nn

from expedite_d2.d2 import provider
from expedite_d2.d2.checkpoint import load_weights
from expedite_d2.d2.config import find_config, load_config
from expedite_d2.d2.data import build_test_loader
from expedite_d2.d2.logger import setup_logger
from expedite_d2.d2.modeling.build import build_model
from expedite_d2.d2.provider import CfgNode, comm


def default_setup(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Start the log (stdout and ``OUTPUT_DIR/log.txt``), record environment and config, seed.

    Args:
        cfg: the full config.
        args: the command line.

    Raises:
        OSError: ``OUTPUT_DIR`` cannot be created or written to.
    """
    if not cfg.OUTPUT_DIR:
        raise ValueError("OUTPUT_DIR must name a directory, got an empty string")
    try:
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    except OSError as error:
        raise OSError(f"OUTPUT_DIR {cfg.OUTPUT_DIR} cannot be created: {error.strerror}") from error
    if not os.access(cfg.OUTPUT_DIR, os.W_OK | os.X_OK):
        raise OSError(f"OUTPUT_DIR {cfg.OUTPUT_DIR} cannot be written to")
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank())
    provider.default_setup(cfg, args)


def setup(args: argparse.Namespace) -> CfgNode:
    """Config from the command line; logger, seed and output directory by Detectron2's rules."""
    setup_logger(distributed_rank=comm.get_rank())  # what load_config decides is logged, too
    cfg = load_config(args.config_file, args.opts)
    cfg.freeze()
    # Detectron2 logs the file, and knows nothing of configs that come with a package.
    args = argparse.Namespace(**vars(args) | {"config_file": str(find_config(args.config_file))})
    default_setup(cfg, args)
    return cfg


def build_trained_model(cfg: CfgNode) -> nn.Module:
    """The config's model with the weights of ``MODEL.WEIGHTS``, in evaluation mode."""
    model = build_model(cfg)
    load_weights(model, cfg.MODEL.WEIGHTS)
    return model.eval()


def first_images(cfg: CfgNode, count: int, verb: str) -> tuple[list[Any], str]:
    """Reads the first inputs of a config's model, to measure settings on.

    Args:
        cfg: the config. The first training set is read, through the test loader and so without
            augmentation, or else the first test set.
        count: how many to read, fewer where the data set has fewer.
        verb: who asks, for messages.

    Returns:
        The inputs, one image each, and the name of their data set.
    """
    if count < 1:
        raise ValueError(f"--images must be at least 1, got {count}")
    datasets = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    if not datasets:
        raise ValueError(f"{verb} needs a data set in DATASETS.TRAIN or DATASETS.TEST, got none")
    return list(islice(build_test_loader(cfg, datasets[0]), count)), datasets[0]

"""What every run begins with: config, log, seed and output directory, and the trained model."""

from __future__ import annotations

import argparse
import os

from torch import nn

from expedite_d2.d2 import provider
from expedite_d2.d2.checkpoint import load_weights
from expedite_d2.d2.config import find_config, load_config
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

"""Command line, set-up of a run, and seeds."""

from __future__ import annotations

import argparse
import logging
import os
import platform
import random
import sys

import fvcore
import numpy as np
import torch
import torchvision
from tabulate import tabulate

from expedite_d2.d2.builtin import comm
from expedite_d2.d2.builtin.config import CfgNode
from expedite_d2.d2.logger import setup_logger

logger = logging.getLogger(__name__)


def default_argument_parser(epilog: str | None = None) -> argparse.ArgumentParser:
    """The options that every Detectron2 script has.

    Args:
        epilog: text below the list of options; by default, examples.
    """
    script = sys.argv[0]
    examples = f"""examples:
  one machine:        {script} --config-file cfg.yaml --num-gpus 8
  override settings:  {script} --config-file cfg.yaml MODEL.WEIGHTS weights.pth SEED 1
  first of two:       {script} --num-machines 2 --machine-rank 0 --dist-url tcp://HOST:PORT …
  second of two:      {script} --num-machines 2 --machine-rank 1 --dist-url tcp://HOST:PORT …
"""
    parser = argparse.ArgumentParser(
        epilog=epilog or examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="YAML config file")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR, if any"
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate, do not train")
    parser.add_argument(
        "--num-gpus",
        type=int,
        default=1,
        help="GPUs on this machine; without a GPU, processes on the CPU",
    )
    parser.add_argument("--num-machines", type=int, default=1, help="number of machines")
    parser.add_argument(
        "--machine-rank", type=int, default=0, help="number of this machine, from 0"
    )
    # A port that depends on the user alone, in the range of private ports: a second run, or an
    # orphan of the last one, shows itself by the port being taken.
    user = os.getuid() if hasattr(os, "getuid") else 1
    parser.add_argument(
        "--dist-url",
        default=f"tcp://127.0.0.1:{2**15 + 2**14 + hash(user) % 2**14}",
        help="where the processes meet; 'auto' takes a free port (one machine)",
    )
    parser.add_argument(
        "opts",
        default=None,
        nargs=argparse.REMAINDER,
        help="settings that override the config file, as KEY VALUE pairs",
    )
    return parser


def default_setup(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Start the log, record environment and config, seed the random generators.

    Args:
        cfg: the full config; it is written to ``OUTPUT_DIR/config.yaml``.
        args: the command line; ``config_file`` and ``eval_only`` are read where present.
    """
    rank = comm.get_rank()
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name="fvcore")
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank)
    logger.info("rank %d of %d", rank, comm.get_world_size())
    logger.info("environment:\n%s", _environment())
    logger.info("command line: %s", args)
    if comm.is_main_process():
        path = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
        with open(path + ".tmp", "w") as file:
            file.write(cfg.dump())
        os.replace(path + ".tmp", path)
        logger.info("config written to %s", path)

    # Each rank draws its own augmentations, the same ones at every run.
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + rank)
    # The search for the fastest convolution pays only for many images of few sizes.
    if not getattr(args, "eval_only", False):
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    if cfg.FLOAT32_PRECISION and torch.cuda.is_available():
        torch.set_float32_matmul_precision(cfg.FLOAT32_PRECISION)
        torch.backends.cudnn.allow_tf32 = cfg.FLOAT32_PRECISION != "highest"


def _environment() -> str:
    rows = [
        ("platform", f"{platform.platform()}, {os.cpu_count()} cores"),
        ("Python", platform.python_version()),
        (
            "torch",
            f"{torch.__version__}, CUDA {torch.version.cuda}, {torch.get_num_threads()} threads",
        ),
        ("torchvision", torchvision.__version__),
        ("fvcore", fvcore.__version__),
    ]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        capability = f"sm_{device.major}{device.minor}"
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        rows.append((f"GPU {index}", f"{device.name}, {capability}, {memory}"))
    return tabulate(rows)


def seed_all_rng(seed: int | None = None) -> None:
    """Seed the generators of Python, NumPy and torch; None takes a seed from the system."""
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "big")
        logger.info("random seed %d", seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    os.environ["PYTHONHASHSEED"] = str(seed)

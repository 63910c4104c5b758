"""Find the settings of a trained model that change its results least, without labels.

expedite-d2 tune --config-file FILE [--images N] [--budget B | --max-error E]
    [--output SETTINGS.yaml] [--plot FRONT.png] [KEY VALUE ...]
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expedite_d2.adapters.registry import find_encoder
from expedite_d2.d2.config import load_config
from expedite_d2.d2.config.command_line import config_parser
from expedite_d2.d2.engine.defaults import build_trained_model, first_images
from expedite_d2.d2.evaluation.dense_scores import dense_scores
from expedite_d2.d2.provider import CfgNode
from expedite_d2.tools.budget import BUDGET
from expedite_d2.tools.tune import tune
from expedite_d2.tools.tuning import Tuning

# Sixteen to calibrate on, and eight to judge by.
IMAGES = 24


def measure(
    cfg: CfgNode,
    images: int = IMAGES,
    budget: float | None = None,
    max_error: float | None = None,
) -> Tuning:
    """Tune a config's trained model, whether or not it is expedited: settings it has are set aside.

    Args:
        cfg: names the model, its weights and its data sets, see `first_images`.
        images: how many images to read, fewer where the data set has fewer.
        budget: see `expedite_d2.tune`.
        max_error: see `expedite_d2.tune`; the error is that of `dense_scores`.
    """
    inputs, _ = first_images(cfg, images, "tune")
    model = build_trained_model(cfg)
    size = seen_size(model, inputs[0])
    outputs = partial(dense_scores, classes=_classes(cfg))
    return tune(model, inputs, budget, max_error=max_error, size=size, outputs=outputs)


def seen_size(model: nn.Module, inputs: Any) -> tuple[int, int]:
    """Returns height and width, in pixels, of the first image that an encoder gets of an input.

    Resizing, padding and sliding windows lie between the two.

    Args:
        model: holds one encoder.
        inputs: what the model is called on.
    """
    sizes: list[tuple[int, int]] = []
    encoder = find_encoder(model)[1]
    hook = encoder.register_forward_pre_hook(
        lambda module, args: sizes.append((args[0].shape[-2], args[0].shape[-1]))
    )
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        hook.remove()
    return sizes[0]


def main(argv: Sequence[str]) -> None:
    """Print what was measured, write the best settings, and tell the keys that take them."""
    parser = config_parser(
        "tune", "Find the settings that change a model's results least.", models=True
    )
    parser.add_argument(
        "--images",
        type=int,
        default=IMAGES,
        help=f"how many unlabelled images (default {IMAGES}): two thirds of them are calibrated "
        "on, the others judge",
    )
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument(
        "--budget",
        type=float,
        help=f"share of the encoder's multiply-adds that may be left (default {BUDGET})",
    )
    goal.add_argument(
        "--max-error",
        type=float,
        metavar="E",
        help="instead the largest error of the results, such as 0.05: the fastest settings within "
        "it are the best",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="a YAML file for the best settings"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a PNG of error against speed-up")
    args = parser.parse_args(argv)
    _check_folder("--output", args.output)
    _check_folder("--plot", args.plot)
    cfg = load_config(args.config_file, args.opts)
    tuning = measure(cfg, args.images, args.budget, args.max_error)
    print(tuning)
    best = tuning.best  # there may be none, also where nothing is to be written
    if args.output is not None:
        best.save(args.output)
        keys = f"MODEL.EXPEDITE.SETTINGS {args.output}"
        if not cfg.MODEL.EXPEDITE.ENABLED:
            keys = f"MODEL.EXPEDITE.ENABLED True {keys}"
        print(f"best settings written to {args.output}: {keys}")
    if args.plot is not None:
        tuning.plot(args.plot)
        print(f"plotted in {args.plot}")


def _check_folder(option: str, path: Path | None) -> None:
    """Raises where a file cannot be written to, before minutes are spent on what it will hold."""
    if path is not None and not path.parent.is_dir():
        raise FileNotFoundError(f"{option} must be in a folder that exists, got {path}")


def _classes(cfg: CfgNode) -> int:
    """An upper bound of the number of classes of instances, whichever head makes them."""
    return max(cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)

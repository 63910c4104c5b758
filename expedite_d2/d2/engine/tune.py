"""Find the settings of a trained model that change its results least, without labels.

expedite-d2 tune --config-file FILE [--images N] [--budget B | --max-error E]
    [--output SETTINGS.yaml] [--plot FRONT.png] [KEY VALUE ...]
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from expedite_d2.adapters.registry import find_encoder
from expedite_d2.d2.config import load_config
from expedite_d2.d2.config.command_line import config_parser
from expedite_d2.d2.engine.defaults import build_trained_model, first_images
from expedite_d2.d2.evaluation.dense_scores import dense_scores
from expedite_d2.d2.provider import CfgNode
from expedite_d2.tools.command_line import add_outcome, check_outcome, report
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
        help=f"how many images (default {IMAGES}) of the first training set, or else of the first "
        "test set, without their labels: two thirds of them are calibrated on, the others judge",
    )
    add_outcome(parser)
    args = parser.parse_args(argv)
    check_outcome(args)
    cfg = load_config(args.config_file, args.opts)
    tuning = measure(cfg, args.images, args.budget, args.max_error)
    keys = f"MODEL.EXPEDITE.SETTINGS {args.output}"
    if not cfg.MODEL.EXPEDITE.ENABLED:
        keys = f"MODEL.EXPEDITE.ENABLED True {keys}"
    report(tuning, args, keys)


def _classes(cfg: CfgNode) -> int:
    """An upper bound of the number of classes of instances, whichever head makes them."""
    return max(cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)

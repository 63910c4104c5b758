"""Measure settings of a trained model on a few images.

expedite-d2 calibrate --config-file FILE [--images N] [--output SETTINGS.yaml] [KEY VALUE ...]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from expedite_d2.d2.config import load_config
from expedite_d2.d2.config.command_line import config_parser
from expedite_d2.d2.engine.defaults import build_trained_model, first_images
from expedite_d2.d2.modeling.backbone.settings import reduction_from_config
from expedite_d2.d2.progress import progress
from expedite_d2.d2.provider import CfgNode
from expedite_d2.reducers import Cluster, Reduction
from expedite_d2.tools.calibrate import calibrate

# Means and sums over thousands of tokens per image: more images hardly change them.
IMAGES = 16


def measure(
    cfg: CfgNode, images: int = IMAGES, correction: bool = True
) -> tuple[Reduction, int, str]:
    """Calibrate a config's trained model.

    Args:
        cfg: names the model, its weights and its data sets, see `first_images`.
        images: how many images to read, fewer where the data set has fewer.
        correction: whether to fit detail maps, too.

    Returns:
        The settings, the number of images that they were measured on, and the name of their data
        set.
    """
    if not cfg.MODEL.EXPEDITE.ENABLED:
        raise ValueError(
            "calibrate needs an expedited config, got MODEL.EXPEDITE.ENABLED False: add "
            "MODEL.EXPEDITE.ENABLED True"
        )
    inputs, dataset = first_images(cfg, images, "calibrate")
    model = build_trained_model(cfg)
    with progress(inputs, "calibrating", unit="image") as shown:
        settings = calibrate(model, shown, correction=correction)
    return settings, len(inputs), dataset


def main(argv: Sequence[str]) -> None:
    """Print the temperature, or write all settings to a file, and tell the key that takes them."""
    parser = config_parser("calibrate", "Measure settings of a model on a few images.")
    parser.add_argument(
        "--images",
        type=int,
        default=IMAGES,
        help=f"how many (default {IMAGES}) of the first training set, or of the first test set",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="a YAML file for the settings, with detail maps if they help; default: none, the "
        "temperature alone is printed",
    )
    args = parser.parse_args(argv)
    cfg = load_config(args.config_file, args.opts)
    given = reduction_from_config(cfg)
    if args.output is None and given is not None and not isinstance(given.steps[0], Cluster):
        raise ValueError(
            "calibrate needs --output for settings that merge tokens, which have no temperature to "
            "print"
        )
    settings, images, dataset = measure(cfg, args.images, correction=args.output is not None)
    (step, *_) = settings.steps
    if isinstance(step, Cluster):
        print(f"temperature {step.temperature:.6g}, measured on {images} images of {dataset}")
        if args.output is None:
            print(f"to store it: MODEL.EXPEDITE.TEMPERATURE {step.temperature:.6g}")
    if args.output is None:
        return
    settings.save(args.output)
    maps = "without detail maps" if settings.correction is None else "with detail maps"
    print(f"settings {maps} written to {args.output}: MODEL.EXPEDITE.SETTINGS {args.output}")

"""Measure the clustering temperature of a trained model on a few images.

expedite-d2 calibrate --config-file FILE [--images N] [KEY VALUE ...]
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from expedite_d2.d2.config import load_config
from expedite_d2.d2.config.command_line import config_parser
from expedite_d2.d2.data import build_test_loader
from expedite_d2.d2.engine.defaults import build_trained_model
from expedite_d2.d2.progress import progress
from expedite_d2.d2.provider import CfgNode
from expedite_d2.tools.calibrate import calibrate

# The measure is a mean over thousands of tokens an image; more images hardly move it.
IMAGES = 8


def measure(cfg: CfgNode, images: int = IMAGES) -> tuple[float, int, str]:
    """Calibrate a config's trained model.

    Args:
        cfg: names the model, its weights and its data sets; the first training set is read, through
            the test loader and so without augmentation, or else the first test set.
        images: how many images to read, fewer where the data set has fewer.

    Returns:
        The temperature, the images that it was measured on, and the name of their data set.
    """
    if not cfg.MODEL.EXPEDITE.ENABLED:
        raise ValueError(
            "calibrate needs an expedited config, got MODEL.EXPEDITE.ENABLED False: add "
            "MODEL.EXPEDITE.ENABLED True"
        )
    if images < 1:
        raise ValueError(f"--images must be at least 1, got {images}")
    datasets = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    if not datasets:
        raise ValueError("calibrate needs a data set in DATASETS.TRAIN or DATASETS.TEST, got none")
    inputs = list(islice(build_test_loader(cfg, datasets[0]), images))
    model = build_trained_model(cfg)
    with progress(inputs, "calibrating", unit="image") as shown:
        temperature = calibrate(model, shown).cluster.temperature
    return temperature, len(inputs), datasets[0]


def main(argv: Sequence[str]) -> None:
    """Print the temperature, and the key that stores it."""
    parser = config_parser("calibrate", "Measure the temperature of a model on a few images.")
    parser.add_argument("--images", type=int, default=IMAGES, help=f"how many (default {IMAGES})")
    args = parser.parse_args(argv)
    cfg = load_config(args.config_file, args.opts)
    temperature, images, dataset = measure(cfg, args.images)
    print(f"temperature {temperature:.6g}, measured on {images} images of {dataset}")
    print(f"to store it: MODEL.EXPEDITE.TEMPERATURE {temperature:.6g}")

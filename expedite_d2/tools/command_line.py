"""The verbs of the command line for a model of another library, by its name.

    expedite-d2 describe --model NAME [--size H W] [--budget B | --settings FILE]
    expedite-d2 cost --model NAME [--size H W] [--budget B | --settings FILE] [--json]
    expedite-d2 tune --model NAME --input FOLDER [--images N] [--budget B | --max-error E]
        [--output SETTINGS.yaml] [--plot FRONT.png]

NAME is a model of timm, or a directory of transformers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expedite_d2.reducers import Reduction
from expedite_d2.tools.budget import BUDGET
from expedite_d2.tools.describe import Description, describe
from expedite_d2.tools.expedite import expedite
from expedite_d2.tools.named_models import named_model, pictures
from expedite_d2.tools.tune import tune
from expedite_d2.tools.tuning import Tuning, check_picture

#: How many pictures of a folder `tune` reads, unless it is told.
IMAGES = 24


def main(verb: str, argv: Sequence[str]) -> None:
    """Runs "describe", "cost" or "tune"."""
    {"describe": _describe, "cost": _cost, "tune": _tune}[verb](argv)


def _parser(verb: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"expedite-d2 {verb}", description=description)
    parser.add_argument(
        "--model", required=True, metavar="NAME", help="of timm, or a directory of transformers"
    )
    add_size(parser)
    return parser


def add_size(parser: argparse.ArgumentParser) -> None:
    """Adds the option of the image for which costs are counted."""
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="image in pixels; default: that of the encoder's configuration, or 512 512",
    )


def _add_settings(parser: argparse.ArgumentParser) -> None:
    settings = parser.add_mutually_exclusive_group()
    settings.add_argument(
        "--budget", type=float, metavar="B", help=f"share of the multiply-adds; default: {BUDGET}"
    )
    settings.add_argument("--settings", type=Path, metavar="FILE", help="a file of settings")


def _described(args: argparse.Namespace) -> Description:
    model: nn.Module = named_model(args.model)
    size = None if args.size is None else (args.size[0], args.size[1])
    if args.settings is not None:
        expedite(model, Reduction.load(args.settings))
    else:
        expedite(model, budget=args.budget, size=size)
    return describe(model, size)


def _describe(argv: Sequence[str]) -> None:
    parser = _parser("describe", "Tokens and multiply-adds of a model's encoder, block by block.")
    _add_settings(parser)
    print(_described(parser.parse_args(argv)))


def _cost(argv: Sequence[str]) -> None:
    parser = _parser("cost", "Multiply-adds of a model's encoder, plain and expedited.")
    _add_settings(parser)
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    args = parser.parse_args(argv)
    found = _described(args)
    plain, expedited = found.multiply_adds / 1e9, found.reduced_multiply_adds / 1e9
    if args.json:
        result: dict[str, Any] = {
            "size": list(found.size),
            "baseline": {"gflops": {"encoder": plain}},
            "expedited": {"gflops": {"encoder": expedited}},
            "ratio": {"gflops_encoder": expedited / plain},
        }
        print(json.dumps(result, indent=2))
        return
    height, width = found.size
    print(f"{found.encoder}, G multiply-adds at {height}x{width}")
    print(
        f"plain      {plain:10.4g}\nexpedited  {expedited:10.4g}  ({100 * expedited / plain:.1f} %)"
    )


def _tune(argv: Sequence[str]) -> None:
    parser = _parser("tune", "Settings that change a model's outputs least, found without labels.")
    parser.add_argument("--input", required=True, type=Path, metavar="FOLDER", help="of pictures")
    parser.add_argument(
        "--images",
        type=int,
        default=IMAGES,
        metavar="N",
        help=f"how many of them (default {IMAGES}): two thirds of them are calibrated on, the "
        "others judge",
    )
    parser.add_argument("--device", default="cpu", help="default: cpu")
    add_outcome(parser)
    args = parser.parse_args(argv)
    check_outcome(args)
    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        raise ValueError(f"--device must be one that torch has, got {args.device!r}") from error
    model = named_model(args.model, weights=True).to(device)
    images = pictures(args.model, model, args.input, args.images, args.size)
    tuning = tune(
        model,
        [{name: value.to(device) for name, value in image.items()} for image in images],
        args.budget,
        max_error=args.max_error,
    )
    report(tuning, args, f"expedite(model, Reduction.load({str(args.output)!r}))")


def add_outcome(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which settings `tune` looks for, and what it writes."""
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument(
        "--budget",
        type=float,
        metavar="B",
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


def check_outcome(args: argparse.Namespace) -> None:
    """Raises where a file cannot be written to, before minutes are spent on what it will hold."""
    for option, path in (("--output", args.output), ("--plot", args.plot)):
        if path is not None and not path.parent.is_dir():
            raise FileNotFoundError(f"{option} must be in a folder that exists, got {path}")
    if args.plot is not None:
        check_picture(args.plot)


def report(tuning: Tuning, args: argparse.Namespace, use: str) -> None:
    """Prints what was measured, and writes what was asked for.

    Args:
        tuning: the outcome.
        args: with the options of `add_outcome`.
        use: how the file of the best settings is used.

    Raises:
        ValueError: no settings are good enough.
    """
    print(tuning)
    if args.plot is not None:
        tuning.plot(args.plot)
        print(f"plotted in {args.plot}")
    best = tuning.best  # there may be none, also where nothing is to be written
    if args.output is not None:
        best.save(args.output)
        print(f"best settings written to {args.output}: {use}")

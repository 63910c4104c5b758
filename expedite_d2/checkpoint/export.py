"""A training checkpoint's weights as a small file to ship.

python -m expedite_d2.checkpoint.export OUTPUT_DIR/model_final.pth weights.pth
python -m expedite_d2.checkpoint.export --backbone OUTPUT_DIR/model_final.pth backbone.pth
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from expedite_d2.checkpoint.files import read_checkpoint
from expedite_d2.checkpoint.loading import is_training_only
from expedite_d2.config import cli
from expedite_d2.files import replacing


def export(source: Path, destination: Path, backbone: bool = False) -> None:
    """Write the weights alone, in float16, without what only training needs.

    Args:
        source: a checkpoint of this project's names that ``read_checkpoint`` reads.
        destination: the file to write; it appears whole or not at all.
        backbone: whether to write the backbone alone, for a model with other heads.

    Raises:
        FileNotFoundError: ``source`` is missing.
        ValueError: ``source`` is no checkpoint, or has no backbone.
    """
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in read_checkpoint(source).items()
        if not is_training_only(name) and (name.startswith("backbone.") or not backbone)
    }
    if not state:
        raise ValueError(f"{source} has no backbone: none of its names starts with 'backbone.'")
    with replacing(destination) as partial:
        torch.save({"model": state}, partial)


@cli
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m expedite_d2.checkpoint.export")
    parser.add_argument("source", type=Path, help="a checkpoint, e.g. OUTPUT_DIR/model_final.pth")
    parser.add_argument("destination", type=Path, help="the file to write")
    parser.add_argument("--backbone", action="store_true", help="write the backbone alone")
    args = parser.parse_args(argv)
    export(args.source, args.destination, args.backbone)
    megabytes = args.destination.stat().st_size / 1e6
    print(f"wrote {args.destination}, {megabytes:.1f} MB")


if __name__ == "__main__":
    main()

"""A training checkpoint's weights as a small file to ship.

expedite-d2 convert OUTPUT_DIR/model_final.pth weights.pth
expedite-d2 convert --backbone OUTPUT_DIR/model_final.pth backbone.pth
expedite-d2 convert --base swin.pth OUTPUT_DIR/model_final.pth heads.pth
expedite-d2 convert --official OUTPUT_DIR/model_final.pth mask2former.pth
expedite-d2 convert --transformers CONFIG.yaml OUTPUT_DIR/model_final.pth mask2former/
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expedite_d2.d2.checkpoint.files import backbone_of, read_checkpoint
from expedite_d2.d2.checkpoint.matching import is_training_only
from expedite_d2.d2.checkpoint.names import from_ours
from expedite_d2.d2.checkpoint.official import CLASS_WEIGHTS, to_mask2former, with_position_indices
from expedite_d2.d2.checkpoint.to_transformers import write_directory
from expedite_d2.d2.config import load_config
from expedite_d2.files import replacing


def convert(
    source: Path,
    destination: Path,
    backbone: bool = False,
    base: Path | None = None,
    official: bool = False,
) -> None:
    """Write the weights alone, in float16, without what only training needs.

    A Swin's come with the constant ``relative_position_index`` of each block, which this project
    computes and the official backbone's strict ``load_state_dict`` wants.

    Args:
        source: a checkpoint of this project's names that ``read_checkpoint`` reads.
        destination: the file to write; it appears whole or not at all.
        backbone: whether to write the backbone alone, for a model with other heads.
        base: a converted file in the folder of ``destination`` that has the same backbone: it is
            named in place of a second copy, and read with the new file.
        official: whether to write the names of the official Mask2Former, which loads the file
            strictly; ``load_weights`` reads it as well.

    Raises:
        FileNotFoundError: ``source`` or ``base`` is missing.
        ValueError: ``source`` is no checkpoint, or has no backbone, or another one than ``base``,
            or nothing else, or ``base`` does not lie beside ``destination``, or ``official`` is
            asked for weights of another model, or together with a part.
    """
    if official and (backbone or base):
        raise ValueError(
            "official names are written for a whole model: leave backbone and base out"
        )
    state = {
        name: tensor.half() if tensor.is_floating_point() and name != CLASS_WEIGHTS else tensor
        for name, tensor in from_ours(read_checkpoint(source)).items()
        if not is_training_only(name) or (official and name == CLASS_WEIGHTS)
    }
    shared = backbone_of(state)
    if (backbone or base) and not shared:
        raise ValueError(f"{source} has no backbone: none of its names starts with 'backbone.'")
    content: dict[str, Any] = {}
    if base is not None:
        _check_base(source, shared, base, destination)
        state = {name: tensor for name, tensor in state.items() if name not in shared}
        if not state:
            raise ValueError(f"{source} has nothing but the backbone that {base} has")
        content["base"] = base.name
    elif backbone:
        state = shared
    try:
        content["model"] = to_mask2former(state) if official else with_position_indices(state)
    except ValueError as error:
        raise ValueError(f"{source} has no official counterpart: {error}") from error
    with replacing(destination) as partial:
        torch.save(content, partial)


def _check_base(source: Path, backbone: dict[str, Tensor], base: Path, destination: Path) -> None:
    if base.resolve().parent != destination.resolve().parent:
        raise ValueError(f"{base} must lie beside {destination}, which is read with it")
    if base.resolve() == destination.resolve():
        raise ValueError(f"{destination} cannot be its own base")
    theirs = backbone_of(from_ours(read_checkpoint(base)))
    if backbone.keys() != theirs.keys() or any(
        not torch.equal(tensor, theirs[name]) for name, tensor in backbone.items()
    ):
        raise ValueError(f"{source} has another backbone than {base}")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="expedite-d2 convert", description="Write the weights of a training checkpoint alone."
    )
    parser.add_argument("source", type=Path, help="a checkpoint, e.g. OUTPUT_DIR/model_final.pth")
    parser.add_argument("destination", type=Path, help="the file, or directory, to write")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--backbone", action="store_true", help="write the backbone alone")
    part.add_argument("--base", type=Path, help="file beside the new one that has its backbone")
    part.add_argument("--official", action="store_true", help="write official Mask2Former's names")
    part.add_argument(
        "--transformers",
        metavar="CONFIG",
        help="write this config's Mask2Former, in float32, as a directory for transformers' "
        "from_pretrained",
    )
    args = parser.parse_args(argv)
    if args.transformers:
        cfg = load_config(args.transformers, ["MODEL.DEVICE", "cpu"])
        write_directory(cfg, args.source, args.destination)
        print(f"wrote {args.destination}, for Mask2FormerForUniversalSegmentation.from_pretrained")
        return
    convert(args.source, args.destination, args.backbone, args.base, args.official)
    megabytes = args.destination.stat().st_size / 1e6
    print(f"wrote {args.destination}, {megabytes:.1f} MB")

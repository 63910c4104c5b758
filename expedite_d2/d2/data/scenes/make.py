"""Makes the embedded data set before it is needed: ``expedite-d2 scenes``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from expedite_d2.d2.data.scenes.writer import SPLITS, ensure_split


def main(argv: Sequence[str]) -> None:
    """Makes the splits that are asked for and prints where they are."""
    parser = argparse.ArgumentParser(
        prog="expedite-d2 scenes",
        description="Make the embedded scenes data set.",
    )
    parser.add_argument("--split", choices=[*SPLITS, "all"], default="all", help="default: all")
    parser.add_argument(
        "--root",
        type=Path,
        default=None,
        help="cache directory (default: $EXPEDITE_D2_CACHE, else ~/.cache/expedite_d2)",
    )
    args = parser.parse_args(argv)
    for split in SPLITS if args.split == "all" else [args.split]:
        print(ensure_split(split, args.root))

"""``python -m expedite_d2.data.scenes``: makes the embedded data set before it is needed."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from expedite_d2.config import cli
from expedite_d2.data.scenes.writer import SPLITS, ensure_split


@cli
def main() -> None:
    """Makes the splits that are asked for and prints where they are."""
    parser = argparse.ArgumentParser(
        prog="python -m expedite_d2.data.scenes", description="Make the embedded scenes data set."
    )
    parser.add_argument("--split", choices=[*SPLITS, "all"], default="all", help="default: all")
    parser.add_argument(
        "--root",
        type=Path,
        default=None,
        help="cache directory (default: $EXPEDITE_D2_CACHE, else ~/.cache/expedite_d2)",
    )
    args = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    for split in SPLITS if args.split == "all" else [args.split]:
        print(ensure_split(split, args.root))


if __name__ == "__main__":
    main()

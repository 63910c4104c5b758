"""Lays out labelled NYU Depth v2 as the data sets `nyuv2_labeled_…` want it.

    git clone https://github.com/markshih91/refinenet_pytorch  # the frames
    git clone https://github.com/ankurhanda/nyuv2-meta-data    # the official split
    python -m benchmarks.rooms_data refinenet_pytorch/data nyuv2-meta-data/splits.mat \\
        $DETECTRON2_DATASETS/nyuv2_labeled

Neither repository states a licence: treat the data as for research alone. Images and depth are
copied as they are, mirrored left to right. In the label files of the source 0 to 38 are the classes
of NYU-40, and 39 is "otherprop" or nothing; here the classes are 1 to 39, and 0 does not count.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import loadmat

from expedite_d2.errors import cli

SPLITS = ("train", "test")


def read_splits(path: Path) -> dict[str, list[int]]:
    """Reads the numbers of the frames for training and of those for testing.

    Raises:
        ValueError: another file than the official one.
    """
    with path.open("rb") as file:
        try:
            lists = loadmat(file)
            return {split: sorted(map(int, lists[f"{split}Ndxs"].flat)) for split in SPLITS}
        except (ValueError, TypeError, KeyError) as error:
            message = f"{path} must be a MATLAB file with trainNdxs and testNdxs: {error}"
            raise ValueError(message) from error


def convert_labels(source: Path, target: Path) -> None:
    """Writes a label file of the layout.

    Raises:
        ValueError: a file of other labels.
    """
    labels = np.asarray(Image.open(source))
    if labels.ndim != 2 or labels.max() > 39:
        raise ValueError(f"{source} must hold one label of 0 to 39 per pixel")
    Image.fromarray(np.where(labels == 39, 0, labels + 1).astype(np.uint8)).save(target)


def lay_out(source: Path, splits: Path, target: Path) -> int:
    """Writes the layout into a new folder, whole or not at all.

    Args:
        source: folder that holds `nyu_images`, `nyu_depths` and `nyu_labels40`, numbered from 0.
        splits: the official `splits.mat`; its frames are numbered from 1.
        target: folder to make.

    Returns:
        The number of frames.

    Raises:
        FileExistsError: there is something at `target`.
        FileNotFoundError: a frame of the split is not in `source`.
        ValueError: no splits, or other labels than those of NYU-40.
    """
    if target.exists():
        raise FileExistsError(f"{target} is there already")
    lists = read_splits(splits)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        folder = Path(temporary, "made")
        for kind in ("images", "depth", "labels40"):
            (folder / kind).mkdir(parents=True)
        for split, numbers in lists.items():
            (folder / f"{split}.txt").write_text("".join(f"{number:04}\n" for number in numbers))
            for number in numbers:
                old, new = number - 1, f"{number:04}"
                shutil.copy(source / f"nyu_images/{old}.jpg", folder / f"images/{new}.jpg")
                shutil.copy(source / f"nyu_depths/{old}.png", folder / f"depth/{new}.png")
                convert_labels(source / f"nyu_labels40/{old}.png", folder / f"labels40/{new}.png")
        folder.rename(target)
    return sum(map(len, lists.values()))


@cli
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="folder of nyu_images, nyu_depths, nyu_labels40")
    parser.add_argument("splits", type=Path, help="the official splits.mat")
    parser.add_argument("target", type=Path, help="folder to make, nyuv2_labeled")
    args = parser.parse_args(argv)
    print(f"{lay_out(args.source, args.splits, args.target)} frames in {args.target}")


if __name__ == "__main__":
    main()

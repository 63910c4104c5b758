"""Draw a model's predictions on one's own images.

    python -m expedite_d2.predict --config-file F --input IMG ... --output DIR [KEY VALUE ...]

Inputs are image files, folders of images, or glob patterns. Each gives ``DIR/<stem>.png``: the
panoptic segmentation where the config switches it on, else instances, else the semantic map; or
the depth.
"""

from __future__ import annotations

import argparse
import glob
import logging
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import nn
from tqdm import tqdm

from expedite_d2.config import cli, load_config
from expedite_d2.d2 import CfgNode, MetadataCatalog
from expedite_d2.data.depth import DEPTH_MAPPER_NAME, network_size, resize_image
from expedite_d2.data.mappers import shortest_edge_size, to_tensor
from expedite_d2.engine import build_trained_model
from expedite_d2.files import replacing
from expedite_d2.visualize import draw_predictions, prediction_of

__all__ = ["find_images", "output_names", "predict_image", "read_image"]

# What is looked for in a folder; a file that is named is read whatever its name.
_SUFFIXES = frozenset(".bmp .gif .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split())
# Written into each picture: only such a file is ever replaced.
_SOFTWARE = "expedite_d2.predict"


def find_images(inputs: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Resolve files, folders and glob patterns.

    Args:
        inputs: What was named, in order.

    Returns:
        The files without repetitions, and a sentence for every input that gave none.
    """
    found: dict[str, Path] = {}
    problems = []
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            files = sorted(
                file
                for file in path.iterdir()
                if file.suffix.lower() in _SUFFIXES
                and not file.name.startswith(".")
                and file.is_file()
            )
            missing = f"{text} is a folder without images"
        elif path.exists():
            # Before patterns: a file may well be called "photo[1].jpg".
            files, missing = [path], ""
        elif glob.has_magic(text):
            matches = sorted(glob.glob(text, recursive=True))
            files = [Path(match) for match in matches if os.path.isfile(match)]
            missing = f"no file matches {text}"
        else:
            files, missing = [], f"{text} does not exist"
        if not files:
            problems.append(missing)
        for file in files:
            found.setdefault(os.path.abspath(file), file)
    return list(found.values()), problems


def output_names(images: Sequence[Path]) -> list[str]:
    """File names for the results: the stem where it is unique, else as much more as it takes.

    Args:
        images: Different files.

    Returns:
        As many names, all different even where case does not count.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index, image in enumerate(images):
        groups[image.stem.casefold()].append(index)
    names: dict[int, str] = {}
    taken: set[str] = set()
    # Unique stems first: they keep their plain names whatever the others need.
    for members in sorted(groups.values(), key=len):
        for spelling in (_stem, _folder_and_stem, _folder_and_name):
            spelled = [spelling(images[index]) for index in members]
            folded = {name.casefold() for name in spelled}
            if len(folded) == len(members) and not folded & taken:
                break
        else:
            spelled = _numbered(images[members[0]].stem, len(members), taken)
        taken.update(name.casefold() for name in spelled)
        names.update(zip(members, spelled, strict=True))
    return [f"{names[index]}.png" for index in range(len(images))]


def _stem(path: Path) -> str:
    return path.stem


def _folder_and_stem(path: Path) -> str:
    return f"{path.absolute().parent.name}_{path.stem}"


def _folder_and_name(path: Path) -> str:
    return f"{_folder_and_stem(path)}_{path.suffix.removeprefix('.')}"


def _numbered(stem: str, count: int, taken: set[str]) -> list[str]:
    names: list[str] = []
    number = 0
    while len(names) < count:
        number += 1
        if f"{stem}_{number}".casefold() not in taken:
            names.append(f"{stem}_{number}")
    return names


def read_image(path: str | os.PathLike) -> np.ndarray:
    """Read any image that Pillow knows as 8-bit RGB, upright.

    The camera's orientation is applied, transparency laid over white, 16-bit grey scaled from its
    full range, and other deep grey images from the range of values they hold.

    Args:
        path: The file.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: the file is not an image, or a broken one; the message names it.
    """
    try:
        with Image.open(path) as opened:
            return np.array(_to_rgb(ImageOps.exif_transpose(opened)))
    except UnidentifiedImageError:
        raise ValueError(f"cannot read {path}: not an image file") from None
    except Exception as error:  # Pillow's decoders meet broken files with errors of every kind
        raise ValueError(f"cannot read {path}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        span = max(float(np.ptp(values)), np.finfo(np.float64).tiny)
        scaled = np.round(255 * (values - values.min()) / span)
        return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def predict_image(model: nn.Module, cfg: CfgNode, image: np.ndarray) -> dict[str, Any]:
    """Run the model on one image, resized as for the evaluation.

    Args:
        model: In evaluation mode.
        cfg: Its config; ``INPUT.FORMAT`` is read, and ``INPUT.{MIN,MAX}_SIZE_TEST`` or, for depth,
            ``MODEL.DPT.TEST_SIZE``.
        image: (H, W, 3) uint8, RGB.

    Returns:
        The model's output, at the size of `image`.
    """
    height, width = image.shape[:2]
    pixels = image
    if cfg.INPUT.DATASET_MAPPER_NAME == DEPTH_MAPPER_NAME:
        pixels = resize_image(image, network_size(height, width, cfg.MODEL.DPT.TEST_SIZE))
    elif cfg.INPUT.MIN_SIZE_TEST > 0:
        rows, columns = shortest_edge_size(
            height, width, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
        )
        # A very narrow image must not vanish when its length is cut to the limit.
        size = (max(columns, 1), max(rows, 1))
        pixels = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    if cfg.INPUT.FORMAT == "BGR":
        pixels = pixels[..., ::-1]
    tensor = to_tensor(pixels)
    with torch.inference_mode():
        return model([{"image": tensor, "height": height, "width": width}])[0]


@cli
def main(argv: Sequence[str] | None = None) -> None:
    """Draw the predictions of the config's model on every input."""
    parser = argparse.ArgumentParser(
        prog="python -m expedite_d2.predict", description="Draw predictions on your own images."
    )
    parser.add_argument("--config-file", required=True, help="YAML configuration")
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="IMG", help="images, folders, glob patterns"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the pictures")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides, at the end"
    )
    args = parser.parse_args(argv)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    cfg = load_config(args.config_file, args.opts)
    images, problems = find_images(args.input)
    if not images:
        raise ValueError("no image to predict on: " + "; ".join(problems))
    folder = Path(args.output)
    targets = [folder / name for name in output_names(images)]
    _check_targets(folder, targets, images, args.input)
    model = build_trained_model(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    drawn = _draw_all(
        lambda image: predict_image(model, cfg, image), _metadata(cfg), images, targets
    )
    print(f"{drawn} of {len(images)} pictures written to {folder}")
    failed = len(problems) + len(images) - drawn
    if failed:
        raise ValueError(f"{failed} of the inputs could not be read, as told above")


def _draw_all(
    predict: Callable[[np.ndarray], dict[str, Any]],
    metadata: Any,
    images: Sequence[Path],
    targets: Sequence[Path],
) -> int:
    """Predict and draw image by image; report unreadable ones and go on. How many were drawn."""
    drawn = 0
    for source, target in tqdm(
        list(zip(images, targets, strict=True)), desc="predicting", unit="image"
    ):
        try:
            image = read_image(source)
        except ValueError as error:
            tqdm.write(f"error: {error}", file=sys.stderr)
            continue
        (picture,) = draw_predictions(image, [prediction_of(predict(image))], metadata)
        mark = PngImagePlugin.PngInfo()
        mark.add_text("Software", _SOFTWARE)
        with replacing(target) as partial:
            Image.fromarray(picture).save(partial, format="PNG", pnginfo=mark)
        drawn += 1
    return drawn


def _check_targets(
    folder: Path, targets: Sequence[Path], images: Sequence[Path], inputs: Sequence[str]
) -> None:
    """Refuse, before any work, to write over anything but this command's own earlier pictures."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--output must be a folder, {folder} is a file")
    if any(Path(text).is_dir() and _same(Path(text), folder) for text in inputs):
        raise ValueError(
            f"--output must be another folder than --input: {folder} would hold both images and "
            "pictures drawn from them"
        )
    sources = {(status.st_dev, status.st_ino) for status in (image.stat() for image in images)}
    for target in targets:
        if not target.exists():
            continue
        status = target.stat()
        if (status.st_dev, status.st_ino) in sources:
            raise ValueError(f"{target} is one of the input images: choose another --output")
        if not _is_ours(target):
            raise ValueError(
                f"{target} exists and was not written by this command: move it or choose another "
                "--output"
            )


def _same(first: Path, second: Path) -> bool:
    return second.exists() and first.samefile(second)


def _is_ours(path: Path) -> bool:
    try:
        with Image.open(path) as picture:
            return picture.info.get("Software") == _SOFTWARE
    except OSError:
        return False


def _metadata(cfg: CfgNode) -> Any:
    """Names and colours of the classes: of the data set that is tested on, else trained on."""
    datasets = [*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN]
    return MetadataCatalog.get(datasets[0]) if datasets else None


if __name__ == "__main__":
    main()

"""Draw a model's predictions on one's own images.

    expedite-d2 predict --config-file F --input IMG ... --output DIR [KEY VALUE ...]

Inputs are image files, folders of images, or glob patterns. Each gives ``DIR/<stem>.png``: the
panoptic segmentation where the config switches it on, else instances, else the semantic map; or
the depth.
"""

from __future__ import annotations

import glob
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import nn
from tqdm import tqdm

from expedite_d2.d2.config import load_config
from expedite_d2.d2.config.command_line import config_parser
from expedite_d2.d2.data.depth import DEPTH_MAPPER_NAME, network_size, resize_image
from expedite_d2.d2.data.images import open_image
from expedite_d2.d2.data.mappers import read_image, resize_shortest_edge, to_tensor
from expedite_d2.d2.engine.defaults import build_trained_model
from expedite_d2.d2.progress import progress
from expedite_d2.d2.provider import CfgNode, MetadataCatalog
from expedite_d2.d2.visualize import draw_predictions, prediction_of
from expedite_d2.files import fitting_name, written

__all__ = ["find_images", "output_names", "predict_image"]

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
        files, missing = _resolve(text)
        if not files:
            problems.append(missing)
        for file in files:
            found.setdefault(os.path.abspath(file), file)
    return list(found.values()), problems


def _resolve(text: str) -> tuple[list[Path], str]:
    """The files of one input, and what to say where there are none."""
    # os.path takes any text; a Path whose name is too long is an error in each of its questions.
    if os.path.isdir(text):
        try:
            inside = [Path(text, name) for name in sorted(os.listdir(text))]
        except OSError as error:
            return [], f"folder {text} cannot be read: {error.strerror}"
        files = [
            file
            for file in inside
            if file.suffix.lower() in _SUFFIXES
            and not file.name.startswith(".")
            and os.path.isfile(file)
        ]
        return files, f"{text} is a folder without images"
    # Before patterns: a file may well be called "photo[1].jpg".
    if os.path.exists(text):
        return [Path(text)], ""
    if glob.has_magic(text):
        matches = sorted(glob.glob(text, recursive=True))
        return [
            Path(match) for match in matches if os.path.isfile(match)
        ], f"no file matches {text}"
    return [], f"{text} does not exist"


def output_names(images: Sequence[Path]) -> list[str]:
    """File names for the results: the stem where it is unique, else as much more as it takes.

    Args:
        images: Different files.

    Returns:
        As many names, all different even where case does not count, and none too long for a file:
        see ``fitting_name``.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index, image in enumerate(images):
        groups[image.stem.casefold()].append(index)
    names: dict[int, str] = {}
    taken: set[str] = set()
    # Unique stems first: they keep their plain names whatever the others need.
    for members in sorted(groups.values(), key=len):
        for spelling in (_stem, _folder_and_stem, _folder_and_name):
            spelled = [_name(spelling(images[index])) for index in members]
            folded = {name.casefold() for name in spelled}
            if len(folded) == len(members) and not folded & taken:
                break
        else:
            spelled = _numbered(images[members[0]].stem, len(members), taken)
        taken.update(name.casefold() for name in spelled)
        names.update(zip(members, spelled, strict=True))
    return [names[index] for index in range(len(images))]


def _name(stem: str) -> str:
    return fitting_name(stem, ".png")


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
        name = _name(f"{stem}_{number}")
        if name.casefold() not in taken:
            names.append(name)
    return names


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
        pixels = resize_shortest_edge(image, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    if cfg.INPUT.FORMAT == "BGR":
        pixels = pixels[..., ::-1]
    tensor = to_tensor(pixels)
    with torch.inference_mode():
        return model([{"image": tensor, "height": height, "width": width}])[0]


def main(argv: Sequence[str]) -> None:
    """Draw the predictions of the config's model on every input."""
    parser = config_parser("predict", "Draw predictions on your own images.")
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="IMG", help="images, folders, glob patterns"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the pictures")
    args = parser.parse_args(argv)
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
        raise ValueError(f"{failed} of the inputs could not be read or drawn, as told above")


def _draw_all(
    predict: Callable[[np.ndarray], dict[str, Any]],
    metadata: Any,
    images: Sequence[Path],
    targets: Sequence[Path],
) -> int:
    """Predict and draw image by image; how many were drawn.

    An image that cannot be read, and a picture that cannot be written, costs only itself.
    """
    drawn = 0
    files = list(zip(images, targets, strict=True))
    with progress(files, "predicting", unit="image") as pairs:
        for source, target in pairs:
            try:
                image = read_image(source)
            except (ValueError, OSError) as error:
                _report(str(error))
                continue
            (picture,) = draw_predictions(image, [prediction_of(predict(image))], metadata)
            mark = PngImagePlugin.PngInfo()
            mark.add_text("Software", _SOFTWARE)
            save = partial(Image.fromarray(picture).save, format="PNG", pnginfo=mark)
            drawn += written(target, save, _report)
    return drawn


def _report(sentence: str) -> None:
    tqdm.write(f"error: {sentence}", file=sys.stderr)


def _check_targets(
    folder: Path, targets: Sequence[Path], images: Sequence[Path], inputs: Sequence[str]
) -> None:
    """Refuse, before any work, to write over anything but this command's own earlier pictures."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--output must be a folder, {folder} is a file")
    if any(os.path.isdir(text) and _same(Path(text), folder) for text in inputs):
        raise ValueError(
            f"--output must be another folder than --input: {folder} would hold both images and "
            "pictures drawn from them"
        )
    sources = {(status.st_dev, status.st_ino) for status in (image.stat() for image in images)}
    for target in targets:
        if not os.path.exists(target):
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
        with open_image(path) as picture:
            return picture.info.get("Software") == _SOFTWARE
    except (ValueError, OSError):
        return False


def _metadata(cfg: CfgNode) -> Any:
    """Names and colours of the classes: of the data set that is tested on, else trained on."""
    datasets = [*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN]
    return MetadataCatalog.get(datasets[0]) if datasets else None

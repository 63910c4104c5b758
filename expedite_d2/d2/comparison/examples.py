"""Images on which a comparison is seen: what all models predict, and which tokens became one."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from expedite_d2.d2.comparison.settings import BASELINE
from expedite_d2.d2.visualize import (
    Prediction,
    disagreement,
    draw_clusters,
    draw_disagreement,
    draw_predictions,
    prediction_of,
)
from expedite_d2.files import written
from expedite_d2.ops.observe import ObservedOperator

__all__ = [
    "Example",
    "Panel",
    "Seen",
    "TokenGroups",
    "choose_examples",
    "draw_panels",
    "fit",
    "run_example",
    "write_examples",
]

logger = logging.getLogger(__name__)

_EXAMPLES = 3
# Four of them stand side by side on a desktop, one fills a phone.
_PANEL_SIDE = 400
_KINDS = ("tokens", "baseline", "input", "prediction", "difference")
# Steps of a Reduction, by what becomes of tokens.
_TOKENS = {"cluster": "clusters", "merge": "merged tokens"}


@dataclass(frozen=True)
class TokenGroups:
    """Which tokens of an image became one.

    Attributes:
        groups: (h, w) integers, the group of each token; they may reach beyond the image, where
            the model has padded it.
        tokens: Rows and columns of tokens that cover the image itself; fractions where a token
            reaches over its edge.
        window: Height and width of a window in tokens, or None.
    """

    groups: np.ndarray
    tokens: tuple[float, float]
    window: tuple[int, int] | None = None


@dataclass(frozen=True)
class Seen:
    """What the model makes of an image with one setting.

    Attributes:
        name: What the setting is called.
        step: "cluster" or "merge".
        groups: None when the model took the plain path, or saw the image in crops.
        prediction: (H, W).
    """

    name: str
    step: str
    groups: TokenGroups | None
    prediction: Prediction


@dataclass(frozen=True)
class Example:
    """One image with what all models see in it.

    Attributes:
        image: (H, W, 3) uint8, RGB, at its original size.
        baseline: The baseline's prediction, (H, W).
        settings: What is seen with each setting.
    """

    image: np.ndarray
    baseline: Prediction
    settings: Sequence[Seen]


@dataclass(frozen=True)
class Panel:
    """A picture of an example.

    Attributes:
        name: Of its file, without number and suffix.
        caption: What it shows.
        picture: (H, W, 3) uint8, RGB.
    """

    name: str
    caption: str
    picture: np.ndarray


def choose_examples(records: Sequence[Mapping[str, Any]], count: int = _EXAMPLES) -> list[int]:
    """Indices of images to show: one from each part of the data set, rich but not the extreme.

    Args:
        records: The data set's dicts; what they tell of segments is counted.
        count: How many, at most.

    Returns:
        Increasing indices, the same for the same data set.
    """
    chosen = []
    for part in np.array_split(np.arange(len(records)), count):
        ranked = sorted(part.tolist(), key=lambda index: (_segments(records[index]), -index))
        # The richest picture of all is often a crowd in which nothing can be told apart.
        chosen += ranked[math.floor(0.95 * (len(ranked) - 1)) :][:1]
    return chosen


def _segments(record: Mapping[str, Any]) -> int:
    return len(record.get("segments_info") or record.get("annotations") or ())


@torch.inference_mode()
def run_example(
    baseline: nn.Module,
    expedited: Mapping[str, tuple[nn.Module, Mapping[str, Any]]],
    item: dict[str, Any],
    image_format: str,
) -> Example:
    """Run all models on one image, and look at which tokens become one.

    Args:
        baseline: The plain model.
        expedited: By name of the setting, the model with it and what ``expedite_settings`` tells.
        item: The image as the test loader gives it.
        image_format: Its channels, "RGB" or "BGR".
    """
    plain = prediction_of(baseline([item])[0])
    pixels = item["image"].permute(1, 2, 0).cpu().numpy().astype(np.uint8)
    if image_format == "BGR":
        pixels = pixels[..., ::-1]
    size = item["image"].shape[-2:]
    return Example(
        image=np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize(plain.size[::-1])),
        baseline=plain,
        settings=[
            _see(name, model, settings, item, size) for name, (model, settings) in expedited.items()
        ],
    )


def _see(
    name: str,
    model: nn.Module,
    settings: Mapping[str, Any],
    item: dict[str, Any],
    size: Sequence[int],
) -> Seen:
    sizes: list[torch.Size] = []
    backbone = model.get_submodule("backbone")
    hook = backbone.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[-2:]))
    windows = ObservedOperator(
        torch.ops.expedite_d2.token_reduce.default, lambda call, _: call["window"]
    )
    # Without tokens, what is spread over them is no undone step, unless the step replaces them.
    replaces = settings["reconstruction"] == "replace"
    reconstructed = ObservedOperator(
        torch.ops.expedite_d2.token_reconstruct.default,
        lambda call, _: _nearest(call) if replaces or call["tokens"] is not None else None,
    )
    with hook, windows, reconstructed:
        prediction = prediction_of(model([item])[0])
    steps = settings["steps"]
    (step,) = steps[0]
    undone = [found for found in reconstructed.kept if found is not None]
    groups = None
    if len(sizes) == 1 and undone:  # crops are not put together
        window = windows.kept[0] if windows.kept else None
        groups = _groups(undone[-len(steps) :], sizes[0], size, window)
    return Seen(name, step, groups, prediction)


def _nearest(call: Mapping[str, Any]) -> tuple[torch.Tensor, int]:
    """Of the first image of a call: each token's nearest among the reduced, and their number."""
    return call["indices"][0, ..., 0], math.prod(call["refined"].shape[1:3])


def _groups(
    undone: Sequence[tuple[torch.Tensor, int]],
    padded: Sequence[int],
    size: Sequence[int],
    window: Sequence[int] | None,
) -> TokenGroups | None:
    """Follow the tokens through all steps.

    Args:
        undone: Of the last calls, as many as there are steps, the nearest; the last one undid the
            first step that ran.
        padded: Height and width of what the backbone saw.
        size: Those of the image in it.
        window: Rows and columns of tokens, or None.
    """
    nearest, count = undone[-1]
    groups = nearest.flatten().long()
    for one, left in undone[-2::-1]:
        if one.numel() != count:  # it undid a step of another read-out
            break
        groups, count = one.flatten().long()[groups], left
    rows, columns = nearest.shape
    if columns == 1:  # a sequence, row by row
        side = math.sqrt(padded[0] * padded[1] / len(groups))
        rows, columns = round(padded[0] / side), round(padded[1] / side)
        if rows * columns != len(groups):
            return None
    return TokenGroups(
        groups.reshape(rows, columns).cpu().numpy(),
        (size[0] * rows / padded[0], size[1] * columns / padded[1]),
        None if window is None else (window[0], window[1]),
    )


def draw_panels(example: Example, size: tuple[int, int], metadata: Any) -> list[list[Panel]]:
    """Draw an example at the size at which it is shown.

    Args:
        example: The image.
        size: Height and width.
        metadata: Detectron2's metadata of the data set.

    Returns:
        A row of four pictures for each setting: its tokens, the baseline's prediction (in later
        rows the input), its own prediction, and where these two differ.
    """
    height, width = size
    # Shown as it is, a photograph is 8-bit RGB; a label map must not be blended.
    image = np.asarray(
        Image.fromarray(example.image).resize((width, height), Image.Resampling.LANCZOS)
    )
    predictions = [example.baseline, *(seen.prediction for seen in example.settings)]
    resized = [prediction.resized(height, width) for prediction in predictions]
    baseline, *drawn = draw_predictions(image, resized, metadata)
    rows: list[list[Panel]] = []
    for seen, own in zip(example.settings, drawn, strict=True):
        tokens, caption = image, "input"
        if seen.groups is not None:
            stride = (height / seen.groups.tokens[0], width / seen.groups.tokens[1])
            tokens = draw_clusters(image, seen.groups.groups, stride, seen.groups.window)
            caption = f"{seen.name}: {_TOKENS[seen.step]}"
        differs = disagreement(example.baseline, seen.prediction)
        shown = Image.fromarray(differs).resize((width, height), Image.Resampling.NEAREST)
        rows.append(
            [
                Panel(f"{seen.name}_tokens", caption, tokens),
                Panel("input", "input", image) if rows else Panel("baseline", BASELINE, baseline),
                Panel(f"{seen.name}_prediction", seen.name, own),
                Panel(
                    f"{seen.name}_difference",
                    f"{seen.name}: {100 * differs.mean():.1f} % of the pixels differ",
                    draw_disagreement(image, np.asarray(shown)),
                ),
            ]
        )
    return rows


def fit(size: tuple[int, ...], column: int, row: int) -> tuple[int, int]:
    """Height and width of an image in a cell; tall images are made narrower instead."""
    height, width = size
    scale = min(column / width, row / height)
    return max(1, round(height * scale)), max(1, round(width * scale))


def write_examples(examples: Sequence[Example], metadata: Any, folder: Path) -> None:
    """Write the pictures one by one, for pages that lay them out by themselves.

    ``examples.json`` names them: a list with, for each image, {"panels": [{"file": name of the
    file, "caption": what it shows}]}, four to a row.

    A picture that cannot be written is told, and its image left out.

    Args:
        examples: The images to show.
        metadata: Detectron2's metadata of the data set.
        folder: Where to write; it is made.
    """
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        logger.warning("%s cannot be made: %s", folder, error.strerror)
        return
    listed: list[dict[str, Any]] = []
    for number, example in enumerate(examples, start=1):
        size = fit(example.image.shape[:2], _PANEL_SIDE, _PANEL_SIDE)
        panels = [panel for row in draw_panels(example, size, metadata) for panel in row]
        files = [f"{number}_{panel.name}.jpg" for panel in panels]
        done = [
            written(
                folder / file,
                partial(Image.fromarray(panel.picture).save, quality=85),
                logger.warning,
            )
            for file, panel in zip(files, panels, strict=True)
        ]
        if all(done):
            entries = zip(files, panels, strict=True)
            listed.append({"panels": [{"file": f, "caption": p.caption} for f, p in entries]})
    text = json.dumps(listed, indent=2) + "\n"
    written(folder / "examples.json", lambda path: path.write_text(text, "utf-8"), logger.warning)
    # What an earlier run with more images or settings has left.
    named = {panel["file"] for entry in listed for panel in entry["panels"]}
    for kind in _KINDS:
        for path in folder.glob(f"[0-9]*_{kind}.jpg"):
            if path.name not in named:
                with contextlib.suppress(OSError):
                    path.unlink()

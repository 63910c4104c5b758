"""Drawing of predictions, clusters and disagreements on images, as uint8 arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from expedite_d2.d2.visualize.clusters import draw_clusters
from expedite_d2.d2.visualize.common import draw_disagreement, to_numpy
from expedite_d2.d2.visualize.depth import DepthMap, depth_disagreement, depth_limits, draw_depth
from expedite_d2.d2.visualize.segmentation import (
    Segment,
    Segmentation,
    draw_segmentation,
    segmentation_disagreement,
    segmentation_of,
)

__all__ = [
    "DepthMap",
    "Prediction",
    "Segment",
    "Segmentation",
    "depth_disagreement",
    "depth_limits",
    "disagreement",
    "draw_clusters",
    "draw_depth",
    "draw_disagreement",
    "draw_predictions",
    "draw_segmentation",
    "prediction_of",
    "segmentation_of",
]

Prediction = Segmentation | DepthMap


def prediction_of(output: dict[str, Any]) -> Prediction:
    """What is drawn of one output of a meta-architecture: its depth, or else its segmentation.

    Raises:
        ValueError: when the output holds neither.
    """
    if "depth" in output:
        return DepthMap(to_numpy(output["depth"]).astype(np.float32))
    return segmentation_of(output)


def draw_predictions(
    image: np.ndarray, predictions: Sequence[Prediction], metadata: Any = None
) -> list[np.ndarray]:
    """Draw predictions for one image, so that they can be compared by eye.

    Args:
        image: (H, W, 3) uint8, RGB.
        predictions: Of one kind, each (H, W). Depths get one scale of colours.
        metadata: See ``draw_segmentation``.

    Returns:
        One (H, W, 3) uint8 each.
    """
    maps = [p.metres for p in predictions if isinstance(p, DepthMap)]
    limits = depth_limits(*maps) if maps else None
    return [
        draw_depth(p.metres, limits)
        if isinstance(p, DepthMap)
        else draw_segmentation(image, p, metadata)
        for p in predictions
    ]


def disagreement(first: Prediction, second: Prediction) -> np.ndarray:
    """Find the pixels on which two predictions for one image differ.

    Segmentations differ in a pixel's class or object, depths by more than a twentieth.

    Args:
        first: One prediction, (H, W).
        second: The other one, of the same kind and size.

    Returns:
        (H, W) bool, True where they differ.
    """
    if isinstance(first, DepthMap) and isinstance(second, DepthMap):
        return depth_disagreement(first.metres, second.metres)
    if isinstance(first, Segmentation) and isinstance(second, Segmentation):
        return segmentation_disagreement(first, second)
    raise TypeError(
        "disagreement: expected two predictions of one kind, got "
        f"{type(first).__name__} and {type(second).__name__}"
    )

"""Drawing of depth maps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from expedite_d2.d2.visualize.common import to_numpy


@dataclass(frozen=True)
class DepthMap:
    """A prediction of depth.

    Attributes:
        metres: (H, W) float32; 0 or NaN where there is none.
    """

    metres: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.metres.shape[0], self.metres.shape[1]

    def resized(self, height: int, width: int) -> DepthMap:
        """The same at another size, bilinearly."""
        image = Image.fromarray(self.metres).resize((width, height), Image.Resampling.BILINEAR)
        return DepthMap(np.asarray(image, dtype=np.float32))


def depth_limits(*depths: Any) -> tuple[float, float]:
    """Nearest and farthest depth that pictures of these maps should tell apart.

    Args:
        depths: (H, W) metres each, of any sizes; 0 where there is none.

    Returns:
        Two positive numbers, the second greater. The outermost hundredths are left out, so that a
        few odd pixels do not use up the colours.
    """
    values = np.concatenate([to_numpy(depth).ravel() for depth in depths])
    values = values[np.isfinite(values) & (values > 0)]
    if not len(values):
        return 1.0, 2.0
    low, high = np.percentile(values, (1, 99)).tolist()
    return low, max(high, 1.01 * low)


def draw_depth(depth: Any, limits: tuple[float, float] | None = None) -> np.ndarray:
    """Colour a depth map: near is bright, far is dark, equal ratios are equal steps.

    Args:
        depth: (H, W) metres, array or tensor; 0 or NaN where there is none, which becomes grey.
        limits: Depths of the brightest and of the darkest colour, for maps that are compared with
            each other; default: this map's own ``depth_limits``.

    Returns:
        (H, W, 3) uint8.
    """
    metres = to_numpy(depth).astype(np.float32)
    known = np.isfinite(metres) & (metres > 0)
    low, high = limits or depth_limits(metres)
    share = np.log(np.where(known, metres, low) / low) / math.log(high / low)
    colours = matplotlib.colormaps["inferno"](1 - share.clip(0, 1))[..., :3]
    colours[~known] = 0.5
    return np.round(255 * colours).astype(np.uint8)


def depth_disagreement(first: Any, second: Any, ratio: float = 1.05) -> np.ndarray:
    """Where two depth maps differ, as ``draw_disagreement`` shows it.

    Args:
        first, second: (H, W) metres.
        ratio: Depths differ whose quotient exceeds it.

    Returns:
        (H, W) bool.
    """
    a, b = (np.maximum(to_numpy(depth), 1e-3) for depth in (first, second))
    return np.maximum(a / b, b / a) > ratio

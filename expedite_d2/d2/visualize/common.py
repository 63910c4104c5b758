"""What all pictures need."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import ndimage

_DISAGREEMENT_COLOUR = np.array([226, 35, 60], dtype=np.float32)


def to_numpy(values: Any) -> np.ndarray:
    """A tensor, wherever it is, or anything that NumPy knows, as an array."""
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def boundaries(ids: np.ndarray, thickness: int, *, inner: bool = False) -> np.ndarray:
    """Pixels next to one of another id; with `inner`, only those above or left of the border."""
    edges = np.zeros(ids.shape, dtype=bool)
    vertical = ids[1:] != ids[:-1]
    horizontal = ids[:, 1:] != ids[:, :-1]
    edges[:-1] |= vertical
    edges[:, :-1] |= horizontal
    if not inner:
        edges[1:] |= vertical
        edges[:, 1:] |= horizontal
    return ndimage.binary_dilation(edges, iterations=thickness - 1) if thickness > 1 else edges


def draw_disagreement(image: np.ndarray, differs: np.ndarray) -> np.ndarray:
    """Colour the pixels on which two predictions differ, on a pale grey copy of the image.

    Args:
        image: (H, W, 3) uint8, RGB.
        differs: (H, W) bool.

    Returns:
        (H, W, 3) uint8, a new array.
    """
    grey = image.astype(np.float32).mean(axis=2, keepdims=True)
    canvas = np.repeat(115.0 + 0.5 * grey, 3, axis=2)
    canvas[differs] = 0.2 * canvas[differs] + 0.8 * _DISAGREEMENT_COLOUR
    return canvas.clip(0, 255).astype(np.uint8)

"""Drawing of clusters of tokens."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from expedite_d2.d2.visualize.common import boundaries


def draw_clusters(
    image: np.ndarray,
    clusters: np.ndarray,
    stride: tuple[float, float],
    window: tuple[int, int] | None = None,
) -> np.ndarray:
    """Draw the hard assignment of tokens to clusters on the image.

    Every cluster is tinted with the mean colour of the pixels under it and outlined; the borders
    of the windows, within which tokens are clustered, are drawn lightly above.

    Args:
        image: (H, W, 3) uint8, RGB.
        clusters: (h, w) integers, the cluster of every token; it may reach beyond the image,
            where the model has padded it.
        stride: Height and width of a token in pixels of `image`.
        window: Height and width of a window in tokens; None when the image is one window.

    Returns:
        (H, W, 3) uint8, a new array.
    """
    height, width = image.shape[:2]
    rows = np.minimum((np.arange(height) + 0.5) / stride[0], clusters.shape[0] - 1).astype(int)
    columns = np.minimum((np.arange(width) + 0.5) / stride[1], clusters.shape[1] - 1).astype(int)
    _, dense = np.unique(clusters[rows[:, None], columns[None, :]], return_inverse=True)
    labels = dense.reshape(height, width).astype(np.int32)
    numbers = np.arange(labels.max() + 1)
    means = np.stack(
        [ndimage.mean(image[..., c], labels, numbers) for c in range(3)], axis=1
    ).astype(np.float32)
    canvas = 0.5 * image + 0.5 * means[labels]
    edges = boundaries(labels, 1, inner=True)
    # Dark lines on light ground and light ones on dark ground: seen everywhere.
    tone = np.where(canvas[edges].mean(axis=1, keepdims=True) > 90.0, 20.0, 235.0)
    canvas[edges] = 0.4 * canvas[edges] + 0.6 * tone
    if window is not None:
        for axis, length in enumerate((height, width)):
            step = stride[axis] * window[axis]
            lines = np.round(np.arange(step, length - 1, step)).astype(int)
            taken = (lines, slice(None)) if axis == 0 else (slice(None), lines)
            canvas[taken] = 0.25 * canvas[taken] + 0.75 * 255.0
    return canvas.clip(0, 255).astype(np.uint8)

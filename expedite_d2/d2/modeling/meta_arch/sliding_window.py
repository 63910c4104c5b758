"""Sliding-window inference: a large image in overlapping crops whose predictions are averaged."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from expedite_d2.d2.config.keys import setting
from expedite_d2.d2.config.rules import each, whole
from expedite_d2.d2.provider import CfgNode


class SlidingWindow(NamedTuple):
    """Size and step of the crops, in pixels of the network's input.

    Attributes:
        crop: rows and columns of a crop.
        stride: rows and columns from one crop to the next, at most the crop's.
    """

    crop: tuple[int, int]
    stride: tuple[int, int]

    @classmethod
    def from_config(cls, cfg: CfgNode) -> SlidingWindow | None:
        """Reads ``TEST.SLIDING_WINDOW``; None if it is not enabled.

        Raises:
            ValueError: not two sides each, or a stride that would leave pixels out.
        """
        settings = cfg.TEST.SLIDING_WINDOW
        if not settings.ENABLED:
            return None
        crop, stride = tuple(settings.CROP), tuple(settings.STRIDE)
        sides = each(whole(1), 2)
        two = sides.holds(crop) and sides.holds(stride)
        if not two or any(s > c for s, c in zip(stride, crop, strict=True)):
            raise ValueError(
                "TEST.SLIDING_WINDOW needs CROP and STRIDE of two positive sides each, the stride "
                f"at most the crop, got CROP {list(crop)} and STRIDE {list(stride)}"
            )
        return cls((crop[0], crop[1]), (stride[0], stride[1]))

    def predict(self, images: Tensor, model: Callable[[Tensor], Tensor]) -> Tensor:
        """Runs a model on every crop, and averages where crops overlap.

        The last crop of an axis is moved back to end with the image, so that every crop has the
        full size and every pixel is covered. An image smaller than the crop is not cropped.

        Args:
            images: (B, 3, H, W).
            model: (B, 3, h, w) -> (B, K, h, w), the scores of a crop's pixels.

        Returns:
            (B, K, H, W): the mean score of each pixel over the crops that hold it.
        """
        height, width = int(images.shape[-2]), int(images.shape[-1])
        rows = offsets(height, self.crop[0], self.stride[0])
        columns = offsets(width, self.crop[1], self.stride[1])
        size = min(height, self.crop[0]), min(width, self.crop[1])
        if len(rows) == len(columns) == 1:
            return model(images)
        total: Tensor | None = None
        for top in rows:
            for left in columns:
                crop = images[..., top : top + size[0], left : left + size[1]]
                scores = model(crop)
                if total is None:
                    total = scores.new_zeros(*scores.shape[:2], height, width)
                total[..., top : top + size[0], left : left + size[1]] += scores
        assert total is not None  # there is at least one crop
        total /= _coverage(rows, size[0], height, images.device)[:, None]
        total /= _coverage(columns, size[1], width, images.device)
        return total


def refuse_sliding_window(cfg: CfgNode) -> None:
    """Raises if the sliding window is enabled for a model that does not support it."""
    if setting(cfg, "TEST.SLIDING_WINDOW.ENABLED"):
        raise ValueError(
            "TEST.SLIDING_WINDOW is for semantic segmentation by ExpeditedSegmenter and "
            f"ExpeditedMask2Former, got ENABLED True for {cfg.MODEL.META_ARCHITECTURE}"
        )


def offsets(length: int, crop: int, stride: int) -> list[int]:
    """Returns the first pixels of the crops along one axis: multiples of the stride, but the last.

    Args:
        length: length of the axis.
        crop: length of a crop on this axis.
        stride: distance between crops, at most ``crop``.
    """
    last = max(length - crop, 0)
    return [*range(0, last, stride), last]


def _coverage(starts: list[int], size: int, length: int, device: torch.device) -> Tensor:
    """Counts the crops that hold each position of an axis; (length,) float32."""
    counts = torch.zeros(length, device=device)
    for start in starts:
        counts[start : start + size] += 1
    return counts

"""Semantic segmentation averaged over several sizes of an image and their mirror images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from expedite_d2.d2.data.mappers import resize_shortest_edge, to_tensor
from expedite_d2.d2.provider import CfgNode


class SemanticSegmentorWithTTA(nn.Module):
    """A segmentation model with test-time augmentation: takes and gives what the model does.

    The scores of each pixel are the mean over ``TEST.AUG.MIN_SIZES`` (shorter side of the resized
    input, the longer at most ``TEST.AUG.MAX_SIZE``) and, with ``TEST.AUG.FLIP``, their mirror
    images.

    Args:
        cfg: the config.
        model: takes dataset dicts with ``"image"`` (3, h, w) uint8, gives ``"sem_seg"`` (K, H, W).

    Raises:
        ValueError: no sizes.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module) -> None:
        super().__init__()
        augmentation = cfg.TEST.AUG
        self.model = model
        self.min_sizes: Sequence[int] = tuple(augmentation.MIN_SIZES)
        self.max_size: int = augmentation.MAX_SIZE
        self.flips = (False, True) if augmentation.FLIP else (False,)
        if not self.min_sizes or min(*self.min_sizes, self.max_size) < 1:
            raise ValueError(
                "TEST.AUG needs at least one size in MIN_SIZES, and positive sizes, got MIN_SIZES "
                f"{list(self.min_sizes)} and MAX_SIZE {self.max_size}"
            )

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """``"sem_seg"`` of each image, its scores averaged."""
        return [{"sem_seg": self._mean_scores(inputs)} for inputs in batched_inputs]

    def _mean_scores(self, inputs: dict[str, Any]) -> Tensor:
        """(K, H, W) of one image."""
        image = inputs["image"]
        size = {"height": inputs.get("height", image.shape[1])}
        size["width"] = inputs.get("width", image.shape[2])
        pixels = image.permute(1, 2, 0).cpu().numpy()
        total: Tensor | None = None
        for shortest in self.min_sizes:
            resized = to_tensor(resize_shortest_edge(pixels, shortest, self.max_size))
            for flip in self.flips:
                augmented = resized.flip(-1) if flip else resized
                scores = self._scores({**inputs, **size, "image": augmented})
                scores = scores.flip(-1) if flip else scores
                total = scores if total is None else total + scores
        assert total is not None  # there is at least one size
        return total / (len(self.min_sizes) * len(self.flips))

    @torch.no_grad()
    def _scores(self, inputs: dict[str, Any]) -> Tensor:
        output = self.model([inputs])[0]
        if "sem_seg" not in output:
            raise ValueError(
                "TEST.AUG averages semantic scores: expected a model that gives 'sem_seg', got "
                f"{sorted(output)}"
            )
        return output["sem_seg"]

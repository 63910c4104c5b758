"""A model's results as maps of scores, which can be compared pixel by pixel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from expedite_d2.d2.provider import Instances

# Scores are averaged over squares of so many pixels a side: a map of 150 classes of a large photo
# would take half a gigabyte.
STRIDE = 4


def dense_scores(results: Iterable[Mapping[str, Any]], classes: int) -> list[Tensor]:
    """Returns the maps of a batch of results, whose number and shapes depend on the images alone.

    Args:
        results: of each image what a meta-architecture returns at evaluation: ``"sem_seg"``
            (K, H, W), ``"instances"`` with ``scores``, ``pred_classes`` and ``pred_masks`` (N, H,
            W), ``"depth"`` (H, W), or several of them; what else it has is not compared.
        classes: an upper bound of the number of classes of the instances.

    Returns:
        For each image and kind of result a map (K, ⌈H / 4⌉, ⌈W / 4⌉) float32: the probabilities of
        the classes, of each class the greatest score of an instance (0 where there is none), so
        that neither their order nor their number matters; or the depth (K = 1).

    Raises:
        ValueError: an image's result has none of the three, or instances of a class beyond.
    """
    maps = []
    for result in results:
        found = []
        if "sem_seg" in result:
            found.append(_coarse(_probabilities(result["sem_seg"])))
        if "instances" in result:
            found.append(_instance_scores(result["instances"], classes))
        if "depth" in result:
            found.append(_coarse(result["depth"][None]))
        if not found:
            raise ValueError(
                "a result must have sem_seg, instances or depth to be compared, got "
                f"{', '.join(map(str, result)) or 'nothing'}"
            )
        maps += found
    return maps


def _probabilities(scores: Tensor) -> Tensor:
    """Returns scores as they are, and logits, of which some are negative, as probabilities.

    Detectron2's format leaves open which: Panoptic FPN returns logits, whose scale would drown that
    of all else, Segmenter and Mask2Former do not.
    """
    return scores.float().softmax(0) if (scores < 0).any() else scores


def _instance_scores(instances: Instances, classes: int) -> Tensor:
    """Returns of each class the greatest score at each pixel: (classes, ⌈H / 4⌉, ⌈W / 4⌉)."""
    height, width = instances.image_size
    found = instances.pred_classes
    if len(found) and int(found.max()) >= classes:
        raise ValueError(
            f"pred_classes must be less than {classes}, the number of classes of the config, got "
            f"{int(found.max())}"
        )
    maps = instances.scores.new_zeros((classes, -(-height // STRIDE), -(-width // STRIDE)))
    for score, label, mask in zip(
        instances.scores, found.tolist(), instances.pred_masks, strict=True
    ):
        maps[label] = torch.maximum(maps[label], score * _coarse(mask[None])[0])
    return maps.float()


def _coarse(maps: Tensor) -> Tensor:
    """Averages maps over squares: (K, H, W) -> (K, ⌈H / 4⌉, ⌈W / 4⌉) float32."""
    return F.avg_pool2d(maps.float(), STRIDE, ceil_mode=True)

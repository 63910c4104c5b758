"""Training targets and losses that several meta-architectures share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def instance_targets(inputs: Mapping[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns masks (N, h, w), bool or 0 and 1, and classes (N,) int64 of an image's objects.

    Args:
        inputs: a dict with ``"instances"``: ``gt_classes`` (N,) and ``gt_masks`` (N, h, w), a
            tensor or BitMasks. Without objects, masks may be missing, since Detectron2's mapper
            makes none.
        device: where the targets go.

    Raises:
        ValueError: no ``"instances"``, or masks that are missing or polygons.
    """
    if "instances" not in inputs:
        raise ValueError(
            "training needs inputs with 'instances' (gt_classes and gt_masks), got the keys "
            f"{sorted(inputs)}"
        )
    instances = inputs["instances"]
    classes = instances.gt_classes.to(device=device, dtype=torch.int64)
    if not len(classes):
        return torch.zeros(0, *instances.image_size, dtype=torch.bool, device=device), classes
    masks = instances.gt_masks if instances.has("gt_masks") else None
    masks = getattr(masks, "tensor", masks)
    if not isinstance(masks, Tensor):
        raise ValueError(
            "gt_masks must be bitmaps (INPUT.MASK_FORMAT 'bitmask'), got " + type(masks).__name__
        )
    return masks.to(device), classes


def semantic_loss(
    logits: Tensor,
    batched_inputs: Sequence[Mapping[str, Any]],
    size: tuple[int, int],
    ignore_value: int,
) -> Tensor:
    """Computes the cross-entropy of per-pixel class logits and the labels at their stride.

    Args:
        logits: (B, K, H/s, W/s) float32.
        batched_inputs: dicts with ``"sem_seg"``: (h, w) int64.
        size: (H, W) of the padded batch; the padding is ignored.
        ignore_value: label of pixels to ignore.

    Returns:
        The mean over the pixels that are not ignored, a differentiable scalar; 0 if there are none.

    Raises:
        ValueError: an image without ``"sem_seg"``, or a label that is no class.
    """
    stride = size[0] // logits.shape[-2]
    targets = []
    for inputs in batched_inputs:
        if "sem_seg" not in inputs:
            raise ValueError(
                f"the per-pixel loss needs inputs with 'sem_seg', got the keys {sorted(inputs)}"
            )
        label = inputs["sem_seg"]
        check_labels(label[label != ignore_value], logits.shape[1], inputs, ignore_value)
        label = label.to(logits.device)
        height, width = label.shape
        label = F.pad(label, (0, size[1] - width, 0, size[0] - height), value=ignore_value)
        targets.append(label[stride // 2 :: stride, stride // 2 :: stride])  # centres of the cells
    target = torch.stack(targets)  # (B, H/s, W/s)
    total = F.cross_entropy(logits, target, ignore_index=ignore_value, reduction="sum")
    return total / (target != ignore_value).sum().clamp(min=1)


def check_labels(
    labels: Tensor, classes: int, inputs: Mapping[str, Any], ignore_value: int | None = None
) -> None:
    """Raises for a label that is not a class; on a GPU the loss would abort the process."""
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        void = "" if ignore_value is None else f" or {ignore_value} (ignored)"
        wrong = int(labels.max()) if int(labels.max()) >= classes else int(labels.min())
        raise ValueError(
            f"labels of {inputs.get('file_name', 'an image')} must be below the {classes} classes "
            f"of MODEL.SEM_SEG_HEAD.NUM_CLASSES{void}, got {wrong}"
        )

"""Mask2Former's training targets and losses, normalised over all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from expedite_d2.d2.provider import comm

# Names of the three terms: in transformers, and in Mask2Former.
_NAMES = {"loss_cross_entropy": "loss_ce", "loss_mask": "loss_mask", "loss_dice": "loss_dice"}


class MaskClassificationLoss(Mask2FormerLoss):
    """Bipartite matching, then cross-entropy on classes, and BCE and dice on sampled points.

    The terms are transformers'. Added are Mask2Former's weights and names, and the denominator: the
    mean number of masks over the ranks, which transformers computes only under accelerate.

    Args:
        config: transformers' configuration: number of classes, weights, number of points.
    """

    def __init__(self, config: Mask2FormerConfig) -> None:
        weights = {
            "loss_cross_entropy": config.class_weight,
            "loss_mask": config.mask_weight,
            "loss_dice": config.dice_weight,
        }
        super().__init__(config, weight_dict=weights)

    def forward(  # type: ignore[override]
        self,
        mask_logits: Sequence[Tensor],
        class_logits: Sequence[Tensor],
        masks: list[Tensor],
        labels: list[Tensor],
    ) -> dict[str, Tensor]:
        """Returns weighted losses of the last prediction and of each earlier one.

        Args:
            mask_logits: of each prediction, the last one last: (B, Q, H/4, W/4) float32.
            class_logits: of each prediction: (B, Q, K + 1) float32.
            masks: of each image: (N, H, W) float32, 0 or 1.
            labels: of each image: (N,) int64.

        Returns:
            ``loss_ce``, ``loss_mask`` and ``loss_dice`` of the last prediction, and the same with
            the suffix ``_i`` of the i-th earlier one: scalars, differentiable.
        """
        num_masks = self.get_num_masks(labels, device=mask_logits[-1].device)
        losses = {}
        last = len(mask_logits) - 1
        for index in (last, *range(last)):  # the order in which transformers draws its points
            indices = self.matcher(mask_logits[index], class_logits[index], masks, labels)
            terms = self.loss_masks(
                mask_logits[index],
                masks,
                indices,
                num_masks,  # type: ignore[arg-type]
            )
            terms |= self.loss_labels(class_logits[index], labels, indices)
            suffix = "" if index == last else f"_{index}"
            for name, value in terms.items():
                losses[_NAMES[name] + suffix] = self.weight_dict[name] * value
        return losses

    def get_num_masks(  # type: ignore[override]
        self, class_labels: list[Tensor], device: torch.device
    ) -> Tensor:
        """Returns the number of target masks: the mean over the ranks, at least 1."""
        total = sum(len(labels) for labels in class_labels)
        count = torch.as_tensor(total, dtype=torch.float32, device=device)
        world = comm.get_world_size()
        if world > 1:
            torch.distributed.all_reduce(count)
        return (count / world).clamp(min=1)


def prepare_targets(
    batched_inputs: list[dict[str, Any]],
    size: tuple[int, int],
    num_classes: int,
    device: torch.device,
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns masks, zero-padded to the batch's size, and classes of each image.

    Args:
        batched_inputs: dicts with ``"instances"``: ``gt_masks`` (N, h, w) bool or BitMasks and
            ``gt_classes`` (N,).
        size: (H, W) of the padded batch.
        num_classes: K.
        device: where the targets go.

    Returns:
        masks: of each image (N, H, W) float32; labels: of each image (N,) int64.

    Raises:
        ValueError: an image without ``"instances"``, masks that are no bitmaps, or an object of no
            class.
    """
    masks, labels = [], []
    for inputs in batched_inputs:
        mask, classes = instance_targets(inputs, device)
        # Checked on the device of the mapper: on a GPU, reading values would synchronise.
        _check_labels(inputs["instances"].gt_classes, num_classes, inputs)
        height, width = mask.shape[-2:]
        masks.append(F.pad(mask.float(), (0, size[1] - width, 0, size[0] - height)))
        labels.append(classes)
    return masks, labels


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
    batched_inputs: list[dict[str, Any]],
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
        _check_labels(label[label != ignore_value], logits.shape[1], inputs, ignore_value)
        label = label.to(logits.device)
        height, width = label.shape
        label = F.pad(label, (0, size[1] - width, 0, size[0] - height), value=ignore_value)
        targets.append(label[stride // 2 :: stride, stride // 2 :: stride])  # centres of the cells
    target = torch.stack(targets)  # (B, H/s, W/s)
    total = F.cross_entropy(logits, target, ignore_index=ignore_value, reduction="sum")
    return total / (target != ignore_value).sum().clamp(min=1)


def _check_labels(
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

"""Mask2Former's training targets and losses, normalised over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from expedite_d2.d2.modeling.meta_arch.losses import check_labels, instance_targets
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
        check_labels(inputs["instances"].gt_classes, num_classes, inputs)
        height, width = mask.shape[-2:]
        masks.append(F.pad(mask.float(), (0, size[1] - width, 0, size[0] - height)))
        labels.append(classes)
    return masks, labels

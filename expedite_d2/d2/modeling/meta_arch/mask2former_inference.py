"""Semantic, panoptic and instance results from Mask2Former's class and mask logits."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from expedite_d2.d2.provider import Boxes, Instances


def semantic_inference(class_logits: Tensor, mask_logits: Tensor) -> Tensor:
    """Returns class scores of each pixel: mask probabilities weighted by the queries' classes.

    Args:
        class_logits: (Q, K + 1), the last class is "no object".
        mask_logits: (Q, H, W).

    Returns:
        (K, H, W).
    """
    classes = class_logits.softmax(-1)[:, :-1]
    return torch.einsum("qc,qhw->chw", classes, mask_logits.sigmoid())


def select_panoptic(class_logits: Tensor, object_mask_threshold: float) -> Tensor:
    """Returns indices of the queries for a panoptic result: those with a confident class."""
    scores, labels = class_logits.softmax(-1).max(-1)
    no_object = class_logits.shape[-1] - 1
    return ((labels != no_object) & (scores > object_mask_threshold)).nonzero()[:, 0]


def panoptic_inference(
    class_logits: Tensor,
    mask_logits: Tensor,
    thing_ids: Collection[int],
    overlap_threshold: float,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Assigns each pixel to the query with the largest class score x mask probability.

    A segment is kept if more than ``overlap_threshold`` of its mask was assigned to it; segments
    of one stuff class are merged.

    Args:
        class_logits: (N, K + 1) of the selected queries (see ``select_panoptic``).
        mask_logits: (N, H, W) of the same queries.
        thing_ids: contiguous ids of the classes whose instances are not merged.
        overlap_threshold: least share of a mask that must be assigned to its query.

    Returns:
        ids: (H, W) int32, 0 where nothing was found; segments: ``{"id", "isthing", "category_id"}``
        of each id.
    """
    height, width = mask_logits.shape[-2:]
    count = len(class_logits)
    if count == 0:
        return mask_logits.new_zeros((height, width), dtype=torch.int32), []
    scores, labels = class_logits.softmax(-1).max(-1)
    masks = mask_logits.sigmoid()
    foreground = masks >= 0.5
    owner = (scores[:, None, None] * masks).argmax(0)  # (H, W)
    owned = foreground.gather(0, owner[None])[0]  # foreground of its mask
    areas = torch.stack(
        [
            torch.bincount(owner.flatten(), minlength=count),
            foreground.flatten(1).sum(1),
            torch.bincount(owner[owned], minlength=count),
        ]
    )
    # One copy to the host for all queries, instead of three per query.
    won, original, kept = areas.tolist()
    ids = [0] * count
    segments: list[dict[str, Any]] = []
    stuff: dict[int, int] = {}
    for query, category in enumerate(labels.tolist()):
        if kept[query] == 0 or won[query] / original[query] < overlap_threshold:
            continue
        is_thing = category in thing_ids
        if not is_thing and category in stuff:
            ids[query] = stuff[category]
            continue
        ids[query] = len(segments) + 1
        if not is_thing:
            stuff[category] = ids[query]
        segments.append({"id": ids[query], "isthing": is_thing, "category_id": category})
    table = torch.tensor(ids, dtype=torch.int32, device=owner.device)
    return table[owner] * owned, segments


def select_instances(
    class_logits: Tensor, topk: int, thing_ids: Collection[int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Selects the ``topk`` best pairs of query and class.

    Args:
        class_logits: (Q, K + 1).
        topk: number of pairs.
        thing_ids: keep only pairs of these classes, after the selection; None keeps all.

    Returns:
        queries, labels: (N,) int64; scores: (N,), the classes' probabilities.
    """
    probabilities = class_logits.softmax(-1)[:, :-1]
    classes = probabilities.shape[1]
    pairs = probabilities.flatten()
    scores, indices = pairs.topk(min(topk, len(pairs)), sorted=False)
    queries, labels = indices // classes, indices % classes
    if thing_ids is not None:
        things = torch.tensor(sorted(thing_ids), dtype=torch.int64, device=labels.device)
        keep = torch.isin(labels, things)
        queries, labels, scores = queries[keep], labels[keep], scores[keep]
    return queries, labels, scores


def instance_inference(labels: Tensor, scores: Tensor, mask_logits: Tensor) -> Instances:
    """Makes binary masks, scored by class probability x mean mask probability inside the mask.

    Args:
        labels: (N,) int64; scores: (N,) (see ``select_instances``).
        mask_logits: (N, H, W) of the same pairs.

    Returns:
        Instances with ``pred_masks`` (N, H, W) float 0 or 1, ``pred_boxes`` (zeros: Mask2Former
        predicts none), ``scores`` and ``pred_classes`` (N,).
    """
    result = Instances(tuple(mask_logits.shape[-2:]))
    masks = (mask_logits > 0).to(mask_logits.dtype)
    inside = masks.flatten(1)
    mean = (mask_logits.sigmoid().flatten(1) * inside).sum(1) / (inside.sum(1) + 1e-6)
    result.pred_masks = masks
    result.pred_boxes = Boxes(torch.zeros(len(masks), 4))
    result.scores = scores * mean
    result.pred_classes = labels
    return result

"""Settings that every backbone reads alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from expedite_d2.hourglass import Reduction


def reduction_from_config(cfg: Any) -> Reduction | None:
    """What ``MODEL.EXPEDITE`` asks for; None where it is not enabled."""
    expedite = cfg.MODEL.EXPEDITE
    if not expedite.ENABLED:
        return None
    return Reduction(
        alpha=expedite.ALPHA,
        clusters=tuple(expedite.CLUSTERS),
        iterations=expedite.ITERATIONS,
        neighbourhood=expedite.NEIGHBOURHOOD,
        topk=expedite.TOPK,
        temperature=expedite.TEMPERATURE,
        reconstruction=expedite.RECONSTRUCTION,
    )


def check_clusters(backbone: Any, size: Sequence[int], key: str) -> None:
    """Raise where images have no more tokens than an expedited ViT makes clusters of them.

    Args:
        backbone: with `reduction` and, for patches' side, `size_divisibility`.
        size: height and width of the images.
        key: the setting that says so.

    Raises:
        ValueError: such images would run unreduced, one and all.
    """
    reduction, side = backbone.reduction, backbone.size_divisibility
    if reduction is None:
        return
    rows, columns = (math.ceil(length / side) for length in size)
    if reduction.reduced(rows, columns) == (rows, columns):
        clusters = reduction.grid(rows, columns)
        raise ValueError(
            f"MODEL.EXPEDITE.CLUSTERS must be fewer than the {rows}x{columns} tokens of {key} "
            f"{list(size)}, got {clusters[0]}x{clusters[1]}"
        )

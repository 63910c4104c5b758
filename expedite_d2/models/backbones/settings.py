"""Settings that every backbone reads alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from expedite_d2.d2 import ShapeSpec
from expedite_d2.reducers import Cluster, Reduction


def reduction_from_config(cfg: Any) -> Reduction | None:
    """What ``MODEL.EXPEDITE`` asks for; None where it is not enabled."""
    expedite = cfg.MODEL.EXPEDITE
    if not expedite.ENABLED:
        return None
    cluster = Cluster(
        at=expedite.ALPHA,
        grid=tuple(expedite.CLUSTERS),
        iterations=expedite.ITERATIONS,
        neighbourhood=expedite.NEIGHBOURHOOD,
        topk=expedite.TOPK,
        temperature=expedite.TEMPERATURE,
    )
    return Reduction((cluster,), expedite.RECONSTRUCTION)


class OutputShapes(dict[str, ShapeSpec]):
    """What a backbone offers, by name; one that it does not is answered by a sentence.

    Detectron2's own heads index it with names out of the config.
    """

    def __init__(self, backbone: object, shapes: Mapping[str, ShapeSpec]) -> None:
        """
        Args:
            backbone: whose outputs they are.
            shapes: channels and stride of each.
        """
        super().__init__(shapes)
        self._owner = type(backbone).__name__

    def __missing__(self, name: str) -> ShapeSpec:
        raise KeyError(
            f"{self._owner} has no output {name!r}, which the IN_FEATURES of a head asks for: it "
            f"has {', '.join(self)}"
        )


def check_features(key: str, names: Sequence[str], shapes: Mapping[str, ShapeSpec]) -> None:
    """Raise a ValueError where ``key`` names maps that there are not."""
    if not names or any(name not in shapes for name in names):
        raise ValueError(f"{key} must be among {list(shapes)}, got {list(names)}")


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
    if reduction.cluster.reduced(rows, columns) == (rows, columns):
        clusters = reduction.cluster.cells(rows, columns)
        raise ValueError(
            f"MODEL.EXPEDITE.CLUSTERS must be fewer than the {rows}x{columns} tokens of {key} "
            f"{list(size)}, got {clusters[0]}x{clusters[1]}"
        )

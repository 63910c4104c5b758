"""Settings that all backbones read in the same way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from expedite_d2.d2.config.keys import check_keys
from expedite_d2.d2.config.loading import find_weights
from expedite_d2.d2.provider import ShapeSpec
from expedite_d2.reducers import Cluster, Merge, Reduction


def reduction_from_config(cfg: Any) -> Reduction | None:
    """Returns the settings of ``MODEL.EXPEDITE``; None if it is not enabled."""
    check_keys(cfg, "MODEL.EXPEDITE")
    expedite = cfg.MODEL.EXPEDITE
    if not expedite.ENABLED:
        return None
    if expedite.SETTINGS:
        return Reduction.load(find_weights(expedite.SETTINGS))
    if expedite.METHOD == "merge":
        if not expedite.MERGE_AT:
            raise ValueError(
                "MODEL.EXPEDITE.MERGE_AT must list the blocks before which tokens are merged where "
                "MODEL.EXPEDITE.METHOD is merge, got []"
            )
        merges = Merge(tuple(expedite.MERGE_AT), expedite.KEEP, expedite.ROUNDS)
        return Reduction((merges,), expedite.RECONSTRUCTION)
    cluster = Cluster(
        at=expedite.ALPHA,
        grid=tuple(expedite.CLUSTERS),
        iterations=expedite.ITERATIONS,
        neighbourhood=expedite.NEIGHBOURHOOD,
        topk=expedite.TOPK,
        temperature=expedite.TEMPERATURE,
    )
    return Reduction((cluster,), expedite.RECONSTRUCTION)


def check_swin(cfg: Any) -> None:
    """Raises a ValueError if ``MODEL.SWIN`` describes no Swin."""
    check_keys(cfg, "MODEL.SWIN")
    swin = cfg.MODEL.SWIN
    widths = [swin.EMBED_DIM * 2**stage for stage in range(len(swin.DEPTHS))]
    fits = [width % heads == 0 for width, heads in zip(widths, swin.NUM_HEADS, strict=False)]
    if len(swin.NUM_HEADS) != len(widths) or not all(fits):
        raise ValueError(
            "MODEL.SWIN.NUM_HEADS must be one divisor of each of the stages' widths "
            f"{widths}, got {swin.NUM_HEADS!r}"
        )


class OutputShapes(dict[str, ShapeSpec]):
    """Outputs of a backbone by name; an unknown name raises an error that lists the known ones.

    Detectron2's own heads index it with names from the config.
    """

    def __init__(self, backbone: object, shapes: Mapping[str, ShapeSpec]) -> None:
        """
        Args:
            backbone: the backbone.
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
    """Raises a ValueError if the config key ``key`` names maps that do not exist."""
    if not names or any(name not in shapes for name in names):
        raise ValueError(f"{key} must be among {list(shapes)}, got {list(names)}")


def check_reduces(backbone: Any, size: Sequence[int], key: str) -> None:
    """Raises if images have no more tokens than an expedited ViT has clusters.

    Args:
        backbone: the ViT; its `size_divisibility` is the side of a patch.
        size: height and width of the images.
        key: config key of the size, for the message.

    Raises:
        ValueError: all images of this size would run unreduced.
    """
    reduction, side = backbone.reduction, backbone.size_divisibility
    if reduction is None or not isinstance(reduction.steps[0], Cluster):
        return
    rows, columns = (math.ceil(length / side) for length in size)
    if reduction.cluster.reduced(rows, columns) == (rows, columns):
        clusters = reduction.cluster.cells(rows, columns)
        raise ValueError(
            f"MODEL.EXPEDITE.CLUSTERS must be fewer than the {rows}x{columns} tokens of {key} "
            f"{list(size)}, got {clusters[0]}x{clusters[1]}"
        )

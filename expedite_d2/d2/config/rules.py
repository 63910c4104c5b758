"""What values keys may have, one sentence about the first that is wrong, and Detectron2's own keys.

Keys of this project have their rules where they have their defaults (``keys``).
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """A constraint on a value: its description and its predicate."""

    words: str
    holds: Callable[[Any], bool]

    def check(self, key: str, value: Any) -> None:
        """Raises a ValueError naming the key, what it should be and what it is."""
        if not self.holds(value):
            raise ValueError(f"{key} must be {self.words}, got {value!r}")


class Key(NamedTuple):
    """A key of this project, in dotted form, with its default and what it may be.

    Without a rule its type is enough, or whoever reads it knows more than a rule could.
    """

    name: str
    default: Any
    rule: Rule | None = None


def check(cfg: Any, rules: Mapping[str, Rule]) -> None:
    """Hold a config's values against rules by key.

    Args:
        cfg: the whole config.
        rules: of each key in dotted form.

    Raises:
        ValueError: naming the first key whose value is wrong, what it should be and what it is.
    """
    for key, rule in rules.items():
        rule.check(key, functools.reduce(getattr, key.split("."), cfg))


def check_crop(cfg: Any) -> None:
    """Hold ``INPUT.CROP``, where it is enabled, against what its type asks for."""
    if cfg.INPUT.CROP.ENABLED:
        check(cfg, {"INPUT.CROP.TYPE": one_of(*_CROP_SIZES)})
        check(cfg, {"INPUT.CROP.SIZE": _CROP_SIZES[cfg.INPUT.CROP.TYPE]})


def _is_number(value: Any) -> bool:
    """Python's numbers and numpy's, but no bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and _is_number(value)


def whole(minimum: int) -> Rule:
    """An integer from `minimum` on."""
    return Rule(f"an integer of at least {minimum}", lambda v: _is_whole(v) and v >= minimum)


def number(words: str, holds: Callable[[float], bool]) -> Rule:
    """A finite number that `holds`, in words."""
    return Rule(words, lambda v: _is_number(v) and math.isfinite(v) and holds(v))


def each(rule: Rule, count: int | None = None) -> Rule:
    """A list of `count` values, or of one or more, that `rule` holds for."""
    many = "one or more values" if count is None else f"{count} values"
    return Rule(
        f"a list of {many}, each {rule.words}",
        lambda v: (
            isinstance(v, (list, tuple))
            and (len(v) > 0 if count is None else len(v) == count)
            and all(map(rule.holds, v))
        ),
    )


def one_of(*choices: Any) -> Rule:
    """One of these values."""
    return Rule(f"one of {', '.join(map(repr, choices))}", lambda v: v in choices)


def only(value: Any, why: str = "") -> Rule:
    """This value alone, and why."""
    return Rule(f"{value!r} {why}".rstrip(), lambda v: v == value)


POSITIVE = number("a number above 0", lambda v: v > 0)
NOT_NEGATIVE = number("a number of at least 0", lambda v: v >= 0)
SHARE = number("a number from 0 to 1", lambda v: 0 <= v <= 1)
FLIPS = one_of("horizontal", "none")
RATE = number("a number from 0 to below 1", lambda v: 0 <= v < 1)
SIDES = each(whole(1), 2)
_PART = number("a number above 0, at most 1", lambda v: 0 < v <= 1)
_FOUR_POSITIVE = each(POSITIVE, 4)
_RISING = Rule(
    "two numbers from 0 to 1, the second not below the first",
    lambda v: each(SHARE, 2).holds(v) and v[0] <= v[1],
)

_CROP_SIZES = {
    "absolute": SIDES,
    "absolute_range": Rule(
        "two whole numbers above 0, the second not below the first",
        lambda v: SIDES.holds(v) and v[0] <= v[1],
    ),
    "relative": each(_PART, 2),
    "relative_range": each(_PART, 2),
}

#: Keys of the training data, for segmentation.
TRAINING_KEYS: dict[str, Rule] = {
    "INPUT.RANDOM_FLIP": FLIPS,
    "INPUT.MIN_SIZE_TRAIN": each(whole(1)),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": one_of("choice", "range"),
    "INPUT.MAX_SIZE_TRAIN": whole(1),
}

#: Keys that every run reads.
COMMON_KEYS: dict[str, Rule] = {
    "DATALOADER.NUM_WORKERS": whole(0),
    "INPUT.FORMAT": one_of("RGB", "BGR"),
    "INPUT.MIN_SIZE_TEST": whole(0),
    "INPUT.MAX_SIZE_TEST": whole(1),
    "MODEL.PIXEL_MEAN": each(number("a number", lambda v: True), 3),
    "MODEL.PIXEL_STD": each(POSITIVE, 3),
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": whole(1),
}

#: Keys of training, beside this project's own.
SOLVER_KEYS: dict[str, Rule] = {
    "SOLVER.BASE_LR": NOT_NEGATIVE,
    "SOLVER.WEIGHT_DECAY": NOT_NEGATIVE,
    "SOLVER.WEIGHT_DECAY_NORM": NOT_NEGATIVE,
    "SOLVER.MAX_ITER": whole(1),
    "SOLVER.CHECKPOINT_PERIOD": whole(1),
    "SOLVER.LR_SCHEDULER_NAME": one_of("WarmupMultiStepLR", "WarmupCosineLR", "WarmupPolyLR"),
    "SOLVER.STEPS": Rule(
        "a list of numbers",
        lambda v: isinstance(v, (list, tuple)) and all(map(_is_number, v)),
    ),
    "SOLVER.GAMMA": NOT_NEGATIVE,
    "SOLVER.WARMUP_ITERS": whole(0),
    "SOLVER.WARMUP_FACTOR": NOT_NEGATIVE,
}

#: Keys that this project's own Mask2Former reads beside Mask2Former's.
MASK2FORMER_KEYS: dict[str, Rule] = {
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": whole(1),
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": whole(1),
    "MODEL.SEM_SEG_HEAD.NORM": only("GN"),
    "TEST.DETECTIONS_PER_IMAGE": whole(1),
}

#: Detectron2's keys of two-stage detectors, as this project's own detectors understand them.
DETECTOR_KEYS: dict[str, Rule] = {
    "MODEL.FPN.OUT_CHANNELS": whole(1),
    "MODEL.ANCHOR_GENERATOR.SIZES": each(each(POSITIVE)),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": each(each(POSITIVE)),
    "MODEL.RPN.IOU_THRESHOLDS": _RISING,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": whole(1),
    "MODEL.RPN.POSITIVE_FRACTION": SHARE,
    "MODEL.RPN.BBOX_REG_WEIGHTS": _FOUR_POSITIVE,
    "MODEL.RPN.SMOOTH_L1_BETA": NOT_NEGATIVE,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": whole(1),
    "MODEL.RPN.PRE_NMS_TOPK_TEST": whole(1),
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": whole(1),
    "MODEL.RPN.POST_NMS_TOPK_TEST": whole(1),
    "MODEL.RPN.NMS_THRESH": SHARE,
    "MODEL.ROI_HEADS.NUM_CLASSES": whole(1),
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": each(SHARE),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": whole(1),
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": SHARE,
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": SHARE,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": _FOUR_POSITIVE,
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": NOT_NEGATIVE,
    "MODEL.ROI_BOX_HEAD.NUM_CONV": whole(0),
    "MODEL.ROI_BOX_HEAD.CONV_DIM": whole(1),
    "MODEL.ROI_BOX_HEAD.NUM_FC": whole(1),
    "MODEL.ROI_BOX_HEAD.FC_DIM": whole(1),
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": whole(1),
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": whole(0),
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": one_of("ROIAlignV2"),
    "MODEL.ROI_BOX_CASCADE_HEAD.IOUS": each(SHARE),
    "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": each(_FOUR_POSITIVE),
    "MODEL.ROI_MASK_HEAD.NUM_CONV": whole(1),
    "MODEL.ROI_MASK_HEAD.CONV_DIM": whole(1),
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": whole(1),
    "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": whole(0),
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": one_of("ROIAlignV2"),
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": whole(1),
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": whole(1),
    "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT": NOT_NEGATIVE,
    "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT": NOT_NEGATIVE,
    "MODEL.PANOPTIC_FPN.COMBINE.OVERLAP_THRESH": SHARE,
    "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT": whole(0),
    "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH": SHARE,
    "TEST.DETECTIONS_PER_IMAGE": whole(1),
}

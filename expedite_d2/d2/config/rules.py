"""What values the keys of a config may have, and one sentence about the first that is wrong."""

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


def check(cfg: Any, rules: Mapping[str, Rule]) -> None:
    """Hold a config's values against rules by key.

    Args:
        cfg: the whole config.
        rules: of each key in dotted form.

    Raises:
        ValueError: naming the first key whose value is wrong, what it should be and what it is.
    """
    for key, rule in rules.items():
        value = functools.reduce(getattr, key.split("."), cfg)
        if not rule.holds(value):
            raise ValueError(f"{key} must be {rule.words}, got {value!r}")


def check_training_input(cfg: Any) -> None:
    """Hold ``INPUT``, as segmentation is trained with it, against its rules.

    Raises:
        ValueError: naming the first key whose value is wrong, what it should be and what it is.
    """
    check(cfg, _TRAINING_KEYS)
    if cfg.INPUT.MIN_SCALE > cfg.INPUT.MAX_SCALE:
        raise ValueError(
            f"INPUT.MIN_SCALE must not exceed INPUT.MAX_SCALE {cfg.INPUT.MAX_SCALE}, got "
            f"{cfg.INPUT.MIN_SCALE}"
        )
    check_crop(cfg)


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


def _number(words: str, holds: Callable[[float], bool]) -> Rule:
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


POSITIVE = _number("a number above 0", lambda v: v > 0)
NOT_NEGATIVE = _number("a number of at least 0", lambda v: v >= 0)
SHARE = _number("a number from 0 to 1", lambda v: 0 <= v <= 1)
FLIPS = one_of("horizontal", "none")
RATE = _number("a number from 0 to below 1", lambda v: 0 <= v < 1)
_PART = _number("a number above 0, at most 1", lambda v: 0 < v <= 1)
_SIDES = each(whole(1), 2)
_FOUR_POSITIVE = each(POSITIVE, 4)
# A window of pre-training divides by its side less one.
_WINDOWS = each(Rule("0 or an integer of at least 2", lambda v: _is_whole(v) and v >= 0 and v != 1))
# Maps are enlarged by transposed convolutions and made smaller by strided ones.
_SCALING = each(
    _number(
        "a whole number above 0, or 1 divided by one",
        lambda v: v > 0 and (float(v).is_integer() or (1 / v).is_integer()),
    ),
    4,
)
_RISING = Rule(
    "two numbers from 0 to 1, the second not below the first",
    lambda v: each(SHARE, 2).holds(v) and v[0] <= v[1],
)

_CROP_SIZES = {
    "absolute": _SIDES,
    "absolute_range": Rule(
        "two whole numbers above 0, the second not below the first",
        lambda v: _SIDES.holds(v) and v[0] <= v[1],
    ),
    "relative": each(_PART, 2),
    "relative_range": each(_PART, 2),
}

_TRAINING_KEYS: dict[str, Rule] = {
    "INPUT.RANDOM_FLIP": FLIPS,
    "INPUT.IMAGE_SIZE": whole(1),
    "INPUT.MIN_SCALE": POSITIVE,
    "INPUT.MAX_SCALE": POSITIVE,
    "INPUT.MIN_SIZE_TRAIN": each(whole(1)),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": one_of("choice", "range"),
    "INPUT.MAX_SIZE_TRAIN": whole(1),
}

#: Keys that every config has.
COMMON_KEYS: dict[str, Rule] = {
    "DATALOADER.NUM_WORKERS": whole(0),
    "INPUT.FORMAT": one_of("RGB", "BGR"),
    "INPUT.MIN_SIZE_TEST": whole(0),
    "INPUT.MAX_SIZE_TEST": whole(1),
    "MODEL.PIXEL_MEAN": each(_number("a number", lambda v: True), 3),
    "MODEL.PIXEL_STD": each(POSITIVE, 3),
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": whole(1),
    "MODEL.SWIN.PRETRAIN_IMG_SIZE": whole(1),
    "MODEL.SWIN.PATCH_SIZE": whole(1),
    "MODEL.SWIN.EMBED_DIM": whole(1),
    "MODEL.SWIN.DEPTHS": each(whole(1)),
    "MODEL.SWIN.NUM_HEADS": each(whole(1)),
    "MODEL.SWIN.WINDOW_SIZE": whole(1),
    "MODEL.SWIN.MLP_RATIO": POSITIVE,
    "MODEL.SWIN.DROP_RATE": RATE,
    "MODEL.SWIN.ATTN_DROP_RATE": RATE,
    "MODEL.SWIN.DROP_PATH_RATE": RATE,
    "MODEL.SWIN.VERSION": one_of(1, 2),
    "MODEL.SWIN.PRETRAINED_WINDOW_SIZES": _WINDOWS,
    "MODEL.VIT.IMG_SIZE": whole(0),
    "MODEL.VIT.PATCH_SIZE": whole(0),
    "MODEL.VIT.EMBED_DIM": whole(0),
    "MODEL.VIT.DEPTH": whole(0),
    "MODEL.VIT.NUM_HEADS": whole(0),
    "MODEL.VIT.NORM_EPS": POSITIVE,
    "MODEL.VIT.DROP_RATE": RATE,
    "MODEL.VIT.ATTN_DROP_RATE": RATE,
    "MODEL.VIT.DROP_PATH_RATE": RATE,
    "MODEL.VIT.POS_INTERPOLATION": one_of("bicubic", "bilinear"),
    "MODEL.VIT.WINDOW_SIZE": whole(0),
    "MODEL.VIT.PRETRAIN_IMG_SIZE": whole(1),
    "MODEL.SEGMENTER.DIM": whole(0),
    "MODEL.SEGMENTER.DEPTH": whole(1),
    "MODEL.SEGMENTER.NUM_HEADS": whole(1),
    "MODEL.SEGMENTER.MLP_RATIO": POSITIVE,
    "MODEL.SEGMENTER.DROPOUT": RATE,
    "MODEL.SEGMENTER.DROP_PATH_RATE": RATE,
    "MODEL.DPT.NECK_CHANNELS": each(whole(1), 4),
    "MODEL.DPT.REASSEMBLE_FACTORS": _SCALING,
    "MODEL.DPT.FUSION_CHANNELS": whole(2),
    "MODEL.DPT.READOUT": one_of("project", "add", "ignore"),
    # The head predicts nothing below 0, so that depth is positive.
    "MODEL.DPT.SCALE": POSITIVE,
    "MODEL.DPT.SHIFT": NOT_NEGATIVE,
    "MODEL.DPT.MAX_DEPTH": POSITIVE,
    "MODEL.DPT.SILOG_WEIGHT": SHARE,
    "MODEL.DPT.GRADIENT_WEIGHT": NOT_NEGATIVE,
    "MODEL.DPT.TEST_SIZE": _SIDES,
    "MODEL.HTC.STAGE_LOSS_WEIGHTS": each(NOT_NEGATIVE),
    "MODEL.HTC.SEMANTIC_CONVS": whole(0),
    "MODEL.HTC.SOFT_NMS": one_of("", "linear", "gaussian"),
    "MODEL.HTC.SOFT_NMS_SIGMA": POSITIVE,
    "MODEL.HTC.SOFT_NMS_MIN_SCORE": SHARE,
    "TEST.DTYPE": one_of("float32", "bfloat16", "float16"),
}

#: Keys of training.
SOLVER_KEYS: dict[str, Rule] = {
    "SOLVER.OPTIMIZER": one_of("ADAMW", "MUON"),
    "SOLVER.BASE_LR": NOT_NEGATIVE,
    "SOLVER.BACKBONE_MULTIPLIER": NOT_NEGATIVE,
    "SOLVER.WEIGHT_DECAY": NOT_NEGATIVE,
    "SOLVER.WEIGHT_DECAY_NORM": NOT_NEGATIVE,
    "SOLVER.WEIGHT_DECAY_EMBED": NOT_NEGATIVE,
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
    "SOLVER.POLY_LR_POWER": NOT_NEGATIVE,
    "SOLVER.POLY_LR_CONSTANT_ENDING": NOT_NEGATIVE,
}

#: Mask2Former's keys, as this project's own Mask2Former understands them.
MASK2FORMER_KEYS: dict[str, Rule] = {
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": whole(1),
    "MODEL.SEM_SEG_HEAD.MASK_DIM": whole(1),
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": whole(1),
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": whole(0),
    "MODEL.MASK_FORMER.NHEADS": whole(1),
    "MODEL.MASK_FORMER.DROPOUT": SHARE,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": whole(1),
    "MODEL.MASK_FORMER.HIDDEN_DIM": whole(1),
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": whole(1),
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": whole(1),
    "MODEL.MASK_FORMER.OVERSAMPLE_RATIO": _number("a number of at least 1", lambda v: v >= 1),
    "MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO": SHARE,
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

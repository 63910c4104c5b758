"""Mask2Former's keys, with its names and defaults, so that its official YAMLs load as they are."""

from __future__ import annotations

from typing import Any, NamedTuple

from expedite_d2.d2.config.rules import (
    NOT_NEGATIVE,
    POSITIVE,
    RATE,
    SHARE,
    Key,
    Rule,
    each,
    number,
    one_of,
    only,
    whole,
)

# A window of pre-training divides by its side less one.
_WINDOW = Rule("0 or an integer of at least 2", lambda v: whole(0).holds(v) and v != 1)

MASK2FORMER_KEYS = [
    Key("INPUT.DATASET_MAPPER_NAME", "mask_former_semantic"),
    Key("INPUT.COLOR_AUG_SSD", False),
    Key("INPUT.CROP.SINGLE_CATEGORY_MAX_AREA", 1.0),
    Key("INPUT.SIZE_DIVISIBILITY", -1),
    Key("INPUT.IMAGE_SIZE", 1024, whole(1)),
    Key("INPUT.MIN_SCALE", 0.1, POSITIVE),
    Key("INPUT.MAX_SCALE", 2.0, POSITIVE),
    Key("SOLVER.WEIGHT_DECAY_EMBED", 0.0, NOT_NEGATIVE),
    Key("SOLVER.OPTIMIZER", "ADAMW", one_of("ADAMW", "MUON")),
    Key("SOLVER.BACKBONE_MULTIPLIER", 0.1, NOT_NEGATIVE),
    Key("SOLVER.POLY_LR_POWER", 0.9, NOT_NEGATIVE),
    Key("SOLVER.POLY_LR_CONSTANT_ENDING", 0.0, NOT_NEGATIVE),
    Key("MODEL.MASK_FORMER.DEEP_SUPERVISION", True),
    Key("MODEL.MASK_FORMER.NO_OBJECT_WEIGHT", 0.1),
    Key("MODEL.MASK_FORMER.CLASS_WEIGHT", 1.0),
    Key("MODEL.MASK_FORMER.DICE_WEIGHT", 1.0),
    Key("MODEL.MASK_FORMER.MASK_WEIGHT", 20.0),
    Key("MODEL.MASK_FORMER.NHEADS", 8, whole(1)),
    Key("MODEL.MASK_FORMER.DROPOUT", 0.1, SHARE),
    Key("MODEL.MASK_FORMER.DIM_FEEDFORWARD", 2048, whole(1)),
    # Layers of an encoder that other transformer decoders have.
    Key("MODEL.MASK_FORMER.ENC_LAYERS", 0, only(0)),
    Key("MODEL.MASK_FORMER.DEC_LAYERS", 6),
    Key("MODEL.MASK_FORMER.PRE_NORM", False),
    Key("MODEL.MASK_FORMER.HIDDEN_DIM", 256, whole(1)),
    Key("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 100, whole(1)),
    Key("MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "res5", only("multi_scale_pixel_decoder")),
    Key(
        "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME",
        "MultiScaleMaskedTransformerDecoder",
        only("MultiScaleMaskedTransformerDecoder"),
    ),
    Key("MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ", False),
    Key("MODEL.MASK_FORMER.SIZE_DIVISIBILITY", 32),
    Key("MODEL.MASK_FORMER.TRAIN_NUM_POINTS", 112 * 112, whole(1)),
    Key(
        "MODEL.MASK_FORMER.OVERSAMPLE_RATIO",
        3.0,
        number("a number of at least 1", lambda v: v >= 1),
    ),
    Key("MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO", 0.75, SHARE),
    Key("MODEL.MASK_FORMER.TEST.SEMANTIC_ON", True),
    Key("MODEL.MASK_FORMER.TEST.INSTANCE_ON", False),
    Key("MODEL.MASK_FORMER.TEST.PANOPTIC_ON", False),
    Key("MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD", 0.0),
    Key("MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD", 0.0),
    Key("MODEL.MASK_FORMER.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE", False),
    Key("MODEL.SEM_SEG_HEAD.MASK_DIM", 256, whole(1)),
    Key("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 0, whole(0)),
    Key(
        "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME",
        "BasePixelDecoder",
        only("MSDeformAttnPixelDecoder"),
    ),
    Key(
        "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES",
        ["res3", "res4", "res5"],
    ),
    # transformers has no other number of points.
    Key("MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS", 4, only(4)),
    Key("MODEL.SWIN.PRETRAIN_IMG_SIZE", 224, whole(1)),
    Key("MODEL.SWIN.PATCH_SIZE", 4, whole(1)),
    Key("MODEL.SWIN.EMBED_DIM", 96, whole(1)),
    Key("MODEL.SWIN.DEPTHS", [2, 2, 6, 2], each(whole(1))),
    Key("MODEL.SWIN.NUM_HEADS", [3, 6, 12, 24], each(whole(1))),
    Key("MODEL.SWIN.WINDOW_SIZE", 7, whole(1)),
    Key("MODEL.SWIN.MLP_RATIO", 4.0, POSITIVE),
    Key("MODEL.SWIN.QKV_BIAS", True),
    Key("MODEL.SWIN.QK_SCALE", None),
    Key("MODEL.SWIN.DROP_RATE", 0.0, RATE),
    Key("MODEL.SWIN.ATTN_DROP_RATE", 0.0, RATE),
    Key("MODEL.SWIN.DROP_PATH_RATE", 0.3, RATE),
    Key("MODEL.SWIN.APE", False),
    Key("MODEL.SWIN.PATCH_NORM", True),
    Key("MODEL.SWIN.OUT_FEATURES", ["res2", "res3", "res4", "res5"]),
    Key("MODEL.SWIN.USE_CHECKPOINT", False),
]

#: Keys of ours below nodes that Mask2Former's own config function begins anew: where it ran last
#: they are missing, and their defaults hold.
KEYS_BELOW_ITS_NODES = [
    # Swin v1 or v2, and for v2 the windows of pre-training, a stage each (0: WINDOW_SIZE).
    Key("MODEL.SWIN.VERSION", 1, one_of(1, 2)),
    Key("MODEL.SWIN.PRETRAINED_WINDOW_SIZES", [0, 0, 0, 0], each(_WINDOW)),
    # Weight of a per-pixel cross-entropy on the mask features: quickens training from scratch.
    Key("MODEL.MASK_FORMER.SEM_AUX_WEIGHT", 0.0, NOT_NEGATIVE),
]


class UnreadKey(NamedTuple):
    """A key that official YAMLs or the configs that a training wrote carry, and nothing here reads.

    Attributes:
        name: in dotted form.
        default: Detectron2's or Mask2Former's.
        reason: why it means nothing here.
    """

    name: str
    default: Any
    reason: str


_VIDEO = "of Mask2Former's video project, whose VideoMaskFormer is refused by name"
_RESNET = "of the ResNet of Detectron2's DeepLab project, which is no backbone of this one"
_HEADS = "Mask2Former's own pixel decoder reads MODEL.MASK_FORMER.NHEADS instead, as does this one"
_DEEPLAB = "of the heads of Detectron2's DeepLab project, none of which is here"

#: The only keys that are accepted whatever their values are.
UNREAD_KEYS = [
    UnreadKey("INPUT.SAMPLING_FRAME_NUM", 2, _VIDEO),
    UnreadKey("INPUT.SAMPLING_FRAME_RANGE", 20, _VIDEO),
    UnreadKey("INPUT.SAMPLING_FRAME_SHUFFLE", False, _VIDEO),
    UnreadKey("INPUT.AUGMENTATIONS", [], _VIDEO),
    UnreadKey("MODEL.RESNETS.STEM_TYPE", "deeplab", _RESNET),
    UnreadKey("MODEL.RESNETS.RES4_DILATION", 1, _RESNET),
    UnreadKey("MODEL.RESNETS.RES5_MULTI_GRID", [1, 2, 4], _RESNET),
    UnreadKey("MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS", 8, _HEADS),
    UnreadKey("MODEL.SEM_SEG_HEAD.LOSS_TYPE", "hard_pixel_mining", _DEEPLAB),
    UnreadKey("MODEL.SEM_SEG_HEAD.PROJECT_FEATURES", ["res2"], _DEEPLAB),
    UnreadKey("MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS", [48], _DEEPLAB),
    UnreadKey("MODEL.SEM_SEG_HEAD.ASPP_CHANNELS", 256, _DEEPLAB),
    UnreadKey("MODEL.SEM_SEG_HEAD.ASPP_DILATIONS", [6, 12, 18], _DEEPLAB),
    UnreadKey("MODEL.SEM_SEG_HEAD.ASPP_DROPOUT", 0.1, _DEEPLAB),
    UnreadKey("MODEL.SEM_SEG_HEAD.USE_DEPTHWISE_SEPARABLE_CONV", False, _DEEPLAB),
]

"""Every key of this project, with its default, and the function that adds them to a config.

Mask2Former's architecture keys have its own names and defaults, so that its official YAMLs load as
they are.
"""

from __future__ import annotations

import copy
from typing import Any

from expedite_d2.d2.provider import CfgNode

_EXPEDITE_DEFAULTS: list[tuple[str, Any]] = [
    # Whether the backbone clusters its tokens at all; False is the plain backbone, bit for bit.
    ("MODEL.EXPEDITE.ENABLED", False),
    # Blocks, counted from the first of the encoder, that run at full resolution.
    ("MODEL.EXPEDITE.ALPHA", 9),
    # Cluster grid of a window (Swin) or of the image (ViT): sizes [8, 8] or ratios [0.5, 0.5].
    ("MODEL.EXPEDITE.CLUSTERS", [8, 8]),
    # k-means iterations.
    ("MODEL.EXPEDITE.ITERATIONS", 5),
    # Side of the square of centres (odd) that a token is compared with while clustering.
    ("MODEL.EXPEDITE.NEIGHBOURHOOD", 5),
    # Nearest centres that a token is reconstructed from.
    ("MODEL.EXPEDITE.TOPK", 4),
    # Factor on squared distances; 0.0 derives it from each image (see reducers/cluster.py).
    ("MODEL.EXPEDITE.TEMPERATURE", 0.0),
    # "residual": tokens keep their detail and receive what the blocks added; "replace": the paper.
    ("MODEL.EXPEDITE.RECONSTRUCTION", "residual"),
    # Arithmetic of the evaluation: "float32", or autocast to "bfloat16" or "float16".
    ("TEST.DTYPE", "float32"),
    # Whether semantic scores are those of overlapping crops, averaged; their size and step, in
    # pixels of the network's input.
    ("TEST.SLIDING_WINDOW.ENABLED", False),
    ("TEST.SLIDING_WINDOW.CROP", [512, 512]),
    ("TEST.SLIDING_WINDOW.STRIDE", [512, 512]),
]

# Mask2Former's keys, names and defaults, with those that it takes from DeepLab and those of its
# video project, which nothing here reads; the last three are ours. Mask2Former's own function
# begins MODEL.SWIN and MODEL.MASK_FORMER anew: whoever reads ours there has a default.
_MASK2FORMER_DEFAULTS: list[tuple[str, Any]] = [
    ("INPUT.DATASET_MAPPER_NAME", "mask_former_semantic"),
    ("INPUT.COLOR_AUG_SSD", False),
    ("INPUT.CROP.SINGLE_CATEGORY_MAX_AREA", 1.0),
    ("INPUT.SIZE_DIVISIBILITY", -1),
    ("INPUT.IMAGE_SIZE", 1024),
    ("INPUT.MIN_SCALE", 0.1),
    ("INPUT.MAX_SCALE", 2.0),
    ("INPUT.SAMPLING_FRAME_NUM", 2),
    ("INPUT.SAMPLING_FRAME_RANGE", 20),
    ("INPUT.SAMPLING_FRAME_SHUFFLE", False),
    ("INPUT.AUGMENTATIONS", []),
    ("SOLVER.WEIGHT_DECAY_EMBED", 0.0),
    ("SOLVER.OPTIMIZER", "ADAMW"),
    ("SOLVER.BACKBONE_MULTIPLIER", 0.1),
    ("SOLVER.POLY_LR_POWER", 0.9),
    ("SOLVER.POLY_LR_CONSTANT_ENDING", 0.0),
    ("MODEL.RESNETS.STEM_TYPE", "deeplab"),
    ("MODEL.RESNETS.RES4_DILATION", 1),
    ("MODEL.RESNETS.RES5_MULTI_GRID", [1, 2, 4]),
    ("MODEL.SEM_SEG_HEAD.LOSS_TYPE", "hard_pixel_mining"),
    ("MODEL.SEM_SEG_HEAD.PROJECT_FEATURES", ["res2"]),
    ("MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS", [48]),
    ("MODEL.SEM_SEG_HEAD.ASPP_CHANNELS", 256),
    ("MODEL.SEM_SEG_HEAD.ASPP_DILATIONS", [6, 12, 18]),
    ("MODEL.SEM_SEG_HEAD.ASPP_DROPOUT", 0.1),
    ("MODEL.SEM_SEG_HEAD.USE_DEPTHWISE_SEPARABLE_CONV", False),
    ("MODEL.MASK_FORMER.DEEP_SUPERVISION", True),
    ("MODEL.MASK_FORMER.NO_OBJECT_WEIGHT", 0.1),
    ("MODEL.MASK_FORMER.CLASS_WEIGHT", 1.0),
    ("MODEL.MASK_FORMER.DICE_WEIGHT", 1.0),
    ("MODEL.MASK_FORMER.MASK_WEIGHT", 20.0),
    ("MODEL.MASK_FORMER.NHEADS", 8),
    ("MODEL.MASK_FORMER.DROPOUT", 0.1),
    ("MODEL.MASK_FORMER.DIM_FEEDFORWARD", 2048),
    ("MODEL.MASK_FORMER.ENC_LAYERS", 0),
    ("MODEL.MASK_FORMER.DEC_LAYERS", 6),
    ("MODEL.MASK_FORMER.PRE_NORM", False),
    ("MODEL.MASK_FORMER.HIDDEN_DIM", 256),
    ("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 100),
    ("MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "res5"),
    ("MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", "MultiScaleMaskedTransformerDecoder"),
    ("MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ", False),
    ("MODEL.MASK_FORMER.SIZE_DIVISIBILITY", 32),
    ("MODEL.MASK_FORMER.TRAIN_NUM_POINTS", 112 * 112),
    ("MODEL.MASK_FORMER.OVERSAMPLE_RATIO", 3.0),
    ("MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO", 0.75),
    ("MODEL.MASK_FORMER.TEST.SEMANTIC_ON", True),
    ("MODEL.MASK_FORMER.TEST.INSTANCE_ON", False),
    ("MODEL.MASK_FORMER.TEST.PANOPTIC_ON", False),
    ("MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD", 0.0),
    ("MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD", 0.0),
    ("MODEL.MASK_FORMER.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE", False),
    ("MODEL.SEM_SEG_HEAD.MASK_DIM", 256),
    ("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 0),
    ("MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", "BasePixelDecoder"),
    (
        "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES",
        ["res3", "res4", "res5"],
    ),
    ("MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS", 4),
    ("MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS", 8),
    ("MODEL.SWIN.PRETRAIN_IMG_SIZE", 224),
    ("MODEL.SWIN.PATCH_SIZE", 4),
    ("MODEL.SWIN.EMBED_DIM", 96),
    ("MODEL.SWIN.DEPTHS", [2, 2, 6, 2]),
    ("MODEL.SWIN.NUM_HEADS", [3, 6, 12, 24]),
    ("MODEL.SWIN.WINDOW_SIZE", 7),
    ("MODEL.SWIN.MLP_RATIO", 4.0),
    ("MODEL.SWIN.QKV_BIAS", True),
    ("MODEL.SWIN.QK_SCALE", None),
    ("MODEL.SWIN.DROP_RATE", 0.0),
    ("MODEL.SWIN.ATTN_DROP_RATE", 0.0),
    ("MODEL.SWIN.DROP_PATH_RATE", 0.3),
    ("MODEL.SWIN.APE", False),
    ("MODEL.SWIN.PATCH_NORM", True),
    ("MODEL.SWIN.OUT_FEATURES", ["res2", "res3", "res4", "res5"]),
    ("MODEL.SWIN.USE_CHECKPOINT", False),
    # Ours: 1 or 2, and for 2 the windows of pre-training, a stage each (0: WINDOW_SIZE).
    ("MODEL.SWIN.VERSION", 1),
    ("MODEL.SWIN.PRETRAINED_WINDOW_SIZES", [0, 0, 0, 0]),
    # Weight of a per-pixel cross-entropy on the mask features: quickens training from scratch.
    ("MODEL.MASK_FORMER.SEM_AUX_WEIGHT", 0.0),
]

_VIT_DEFAULTS: list[tuple[str, Any]] = [
    # The transformer's name in timm: a VisionTransformer, distilled, hybrid, or a Beit.
    ("MODEL.VIT.NAME", "vit_base_patch16_224"),
    # What differs from that name, 0 for nothing: side of the images that the position embedding
    # was trained on, side of a patch, width, blocks, heads.
    ("MODEL.VIT.IMG_SIZE", 0),
    ("MODEL.VIT.PATCH_SIZE", 0),
    ("MODEL.VIT.EMBED_DIM", 0),
    ("MODEL.VIT.DEPTH", 0),
    ("MODEL.VIT.NUM_HEADS", 0),
    # Epsilon of the LayerNorms in place of timm's usual 1e-6; names that have another (CLIP's
    # 1e-5) keep theirs. Weights run as they were trained: the Segmenter release's with 1e-5.
    ("MODEL.VIT.NORM_EPS", 1e-6),
    # Dropout after the attention and in the MLP, of attention weights, and stochastic depth of
    # the last block.
    ("MODEL.VIT.DROP_RATE", 0.0),
    ("MODEL.VIT.ATTN_DROP_RATE", 0.0),
    ("MODEL.VIT.DROP_PATH_RATE", 0.0),
    # How the position embedding is resized to an image: "bicubic" (timm) or "bilinear" (DPT,
    # Segmenter).
    ("MODEL.VIT.POS_INTERPOLATION", "bicubic"),
    # Blocks whose outputs are the features block0, block1 ..., and "last" for the normalised
    # output of the last block. A hybrid's stem0 and stem1 are always there.
    ("MODEL.VIT.OUT_BLOCKS", ["last"]),
    # Whether to recompute activations in the backward pass.
    ("MODEL.VIT.USE_CHECKPOINT", False),
    # Detectron2's own ViT reads the sizes (0 for its ViT-B) and NORM_EPS above, no NAME, and these:
    # side of the windows, the blocks that attend in them, whether relative positions are learnt,
    # and the side of the images that the position embedding was trained on.
    ("MODEL.VIT.WINDOW_SIZE", 0),
    ("MODEL.VIT.WINDOW_BLOCKS", []),
    ("MODEL.VIT.USE_REL_POS", False),
    ("MODEL.VIT.PRETRAIN_IMG_SIZE", 224),
]

_SEGMENTER_DEFAULTS: list[tuple[str, Any]] = [
    # "mask" (a transformer over tokens and classes) or "linear".
    ("MODEL.SEGMENTER.DECODER", "mask"),
    # Where an expedited model returns to full resolution: "features" (before the decoder), or
    # "paper" (the decoder runs on the clusters, and its class logits are reconstructed).
    ("MODEL.SEGMENTER.PLACEMENT", "features"),
    # Mask decoder: width (0: the encoder's), blocks, heads, hidden width in units of the width.
    ("MODEL.SEGMENTER.DIM", 0),
    ("MODEL.SEGMENTER.DEPTH", 2),
    ("MODEL.SEGMENTER.NUM_HEADS", 16),
    ("MODEL.SEGMENTER.MLP_RATIO", 4.0),
    ("MODEL.SEGMENTER.DROPOUT", 0.1),
    ("MODEL.SEGMENTER.DROP_PATH_RATE", 0.0),
]

_DPT_DEFAULTS: list[tuple[str, Any]] = [
    # Of the four features that are fused (a hybrid's stem0 and stem1, then MODEL.VIT.OUT_BLOCKS):
    # the channels after the reassembly, and by how much each is enlarged.
    ("MODEL.DPT.NECK_CHANNELS", [256, 512, 1024, 1024]),
    ("MODEL.DPT.REASSEMBLE_FACTORS", [4, 2, 1, 0.5]),
    # Channels of the fusion; half of it in the head.
    ("MODEL.DPT.FUSION_CHANNELS", 256),
    # What becomes of the class token: "project", "add" or "ignore".
    ("MODEL.DPT.READOUT", "project"),
    # Depth in metres is 1 / (SCALE * x + SHIFT), or SCALE * x + SHIFT if INVERSE is False.
    ("MODEL.DPT.INVERSE", True),
    ("MODEL.DPT.SCALE", 1.0),
    ("MODEL.DPT.SHIFT", 0.0),
    # Training: greater depths do not count; how much of a common factor the scale-invariant error
    # forgives (0 to 1); weight of the gradients' error.
    ("MODEL.DPT.MAX_DEPTH", 80.0),
    ("MODEL.DPT.SILOG_WEIGHT", 0.85),
    ("MODEL.DPT.GRADIENT_WEIGHT", 0.0),
    # Height and width that images are brought near to at evaluation, in multiples of 32.
    ("MODEL.DPT.TEST_SIZE", [384, 384]),
]

# Beside Detectron2's own keys of two-stage detectors.
_HTC_DEFAULTS: list[tuple[str, Any]] = [
    # The backbone that build_expedited_fpn_backbone and ExpeditedBackbone build upon.
    ("MODEL.EXPEDITE.BACKBONE", ""),
    # Weight of the losses of each stage of the cascade.
    ("MODEL.HTC.STAGE_LOSS_WEIGHTS", [1.0, 0.5, 0.25]),
    # Whether a semantic branch is learnt and its features are added to the regions'.
    ("MODEL.HTC.SEMANTIC_ON", True),
    # 3x3 convolutions of the semantic branch.
    ("MODEL.HTC.SEMANTIC_CONVS", 4),
    # How overlapping boxes lose score: "linear", "gaussian", or "": they are dropped.
    ("MODEL.HTC.SOFT_NMS", "linear"),
    # Width of "gaussian".
    ("MODEL.HTC.SOFT_NMS_SIGMA", 0.5),
    # Lowered scores below it are dropped.
    ("MODEL.HTC.SOFT_NMS_MIN_SCORE", 0.001),
]

_DEFAULTS = [
    *_EXPEDITE_DEFAULTS,
    *_MASK2FORMER_DEFAULTS,
    *_VIT_DEFAULTS,
    *_SEGMENTER_DEFAULTS,
    *_DPT_DEFAULTS,
    *_HTC_DEFAULTS,
]


def add_expedite_config(cfg: CfgNode) -> None:
    """Add every key of this project to a Detectron2 config, in place; those that are there stay.

    Mask2Former's own keys are among them, so that each backbone and each meta-architecture of this
    package builds from Detectron2's ``get_cfg()`` and this function. Mask2Former's own function may
    come before it or after it.
    """
    for key, value in _DEFAULTS:
        *parents, leaf = key.split(".")
        node = cfg
        for parent in parents:
            node = node.setdefault(parent, CfgNode())
        node.setdefault(leaf, copy.deepcopy(value))

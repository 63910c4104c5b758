"""Every key of this project, with its default and its rule, and the function that adds them.

A new key is one row. Whoever reads the keys of a node calls `check_keys` for it first.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

from expedite_d2.d2.config.keys_mask2former import (
    KEYS_BELOW_ITS_NODES,
    MASK2FORMER_KEYS,
    UNREAD_KEYS,
)
from expedite_d2.d2.config.rules import (
    NOT_NEGATIVE,
    POSITIVE,
    RATE,
    SHARE,
    SIDES,
    TRAINING_KEYS,
    Key,
    Rule,
    check,
    check_crop,
    each,
    number,
    one_of,
    only,
    whole,
)
from expedite_d2.d2.provider import CfgNode

_CLUSTERS = Rule(
    "two sizes or two ratios, e.g. [8, 8] or [0.5, 0.5]",
    lambda v: isinstance(v, (list, tuple)) and len(v) == 2,
)
# Maps are enlarged by transposed convolutions and made smaller by strided ones.
_SCALE = number(
    "a whole number above 0, or 1 divided by one",
    lambda v: v > 0 and (float(v).is_integer() or (1 / v).is_integer()),
)

KEYS = [
    # --- the clustering, and evaluation ---------------------------------------------------------
    # Whether the backbone clusters its tokens at all; False is the plain backbone, bit for bit.
    Key("MODEL.EXPEDITE.ENABLED", False),
    # The backbone that build_expedited_fpn_backbone and ExpeditedBackbone build upon.
    Key("MODEL.EXPEDITE.BACKBONE", ""),
    # Blocks, counted from the first of the encoder, that run at full resolution.
    Key("MODEL.EXPEDITE.ALPHA", 9),
    # Cluster grid of a window (Swin) or of the image (ViT): sizes [8, 8] or ratios [0.5, 0.5].
    Key("MODEL.EXPEDITE.CLUSTERS", [8, 8], _CLUSTERS),
    # k-means iterations.
    Key("MODEL.EXPEDITE.ITERATIONS", 5),
    # Side of the square of centres (odd) that a token is compared with while clustering.
    Key("MODEL.EXPEDITE.NEIGHBOURHOOD", 5),
    # Nearest centres that a token is reconstructed from.
    Key("MODEL.EXPEDITE.TOPK", 4),
    # Factor on squared distances; 0.0 derives it from each image (see reducers/cluster.py).
    Key("MODEL.EXPEDITE.TEMPERATURE", 0.0),
    # "residual": tokens keep their detail and receive what the blocks added; "replace": the paper.
    Key("MODEL.EXPEDITE.RECONSTRUCTION", "residual"),
    # "cluster", by the keys above, or "merge": plain ViTs merge the most similar tokens before each
    # block of MERGE_AT and keep the share KEEP; with ROUNDS > 0 attention runs on groups of about
    # 2 ** ROUNDS of them.
    Key("MODEL.EXPEDITE.METHOD", "cluster", one_of("cluster", "merge")),
    Key("MODEL.EXPEDITE.MERGE_AT", []),
    Key("MODEL.EXPEDITE.KEEP", 0.7),
    Key("MODEL.EXPEDITE.ROUNDS", 0),
    # File of a Reduction, which then decides alone: a path, absolute or relative to the config that
    # names it, or expedite_d2://NAME; "" for none.
    Key("MODEL.EXPEDITE.SETTINGS", ""),
    # Arithmetic of the evaluation: "float32", or autocast to "bfloat16" or "float16".
    Key("TEST.DTYPE", "float32", one_of("float32", "bfloat16", "float16")),
    # Whether semantic scores are those of overlapping crops, averaged; their size and step, in
    # pixels of the network's input.
    Key("TEST.SLIDING_WINDOW.ENABLED", False),
    Key("TEST.SLIDING_WINDOW.CROP", [512, 512]),
    Key("TEST.SLIDING_WINDOW.STRIDE", [512, 512]),
    # --- ViT ------------------------------------------------------------------------------------
    # The transformer's name in timm: a VisionTransformer, distilled, hybrid, or a Beit.
    Key("MODEL.VIT.NAME", "vit_base_patch16_224"),
    # What differs from that name, 0 for nothing: side of the images that the position embedding
    # was trained on, side of a patch, width, blocks, heads.
    Key("MODEL.VIT.IMG_SIZE", 0, whole(0)),
    Key("MODEL.VIT.PATCH_SIZE", 0, whole(0)),
    Key("MODEL.VIT.EMBED_DIM", 0, whole(0)),
    Key("MODEL.VIT.DEPTH", 0, whole(0)),
    Key("MODEL.VIT.NUM_HEADS", 0, whole(0)),
    # Epsilon of the LayerNorms in place of timm's usual 1e-6; names that have another (CLIP's
    # 1e-5) keep theirs. Weights run as they were trained: the Segmenter release's with 1e-5.
    Key("MODEL.VIT.NORM_EPS", 1e-6, POSITIVE),
    # Dropout after the attention and in the MLP, of attention weights, and stochastic depth of
    # the last block.
    Key("MODEL.VIT.DROP_RATE", 0.0, RATE),
    Key("MODEL.VIT.ATTN_DROP_RATE", 0.0, RATE),
    Key("MODEL.VIT.DROP_PATH_RATE", 0.0, RATE),
    # How the position embedding is resized to an image: "bicubic" (timm) or "bilinear" (DPT,
    # Segmenter).
    Key("MODEL.VIT.POS_INTERPOLATION", "bicubic", one_of("bicubic", "bilinear")),
    # Blocks whose outputs are the features block0, block1 ..., and "last" for the normalised
    # output of the last block. A hybrid's stem0 and stem1 are always there.
    Key("MODEL.VIT.OUT_BLOCKS", ["last"]),
    # Whether to recompute activations in the backward pass.
    Key("MODEL.VIT.USE_CHECKPOINT", False),
    # Detectron2's own ViT reads the sizes (0 for its ViT-B) and NORM_EPS above, no NAME, and these:
    # side of the windows, the blocks that attend in them, whether relative positions are learnt,
    # and the side of the images that the position embedding was trained on.
    Key("MODEL.VIT.WINDOW_SIZE", 0, whole(0)),
    Key("MODEL.VIT.WINDOW_BLOCKS", []),
    Key("MODEL.VIT.USE_REL_POS", False),
    Key("MODEL.VIT.PRETRAIN_IMG_SIZE", 224, whole(1)),
    # --- Segmenter ------------------------------------------------------------------------------
    # "mask" (a transformer over tokens and classes) or "linear".
    Key(
        "MODEL.SEGMENTER.DECODER", "mask", Rule("mask or linear", lambda v: v in ("mask", "linear"))
    ),
    # Where an expedited model returns to full resolution: "features" (before the decoder), or
    # "paper" (the decoder runs on the clusters, and its class logits are reconstructed).
    Key(
        "MODEL.SEGMENTER.PLACEMENT",
        "features",
        Rule("one of features, paper", lambda v: v in ("features", "paper")),
    ),
    # Mask decoder: width (0: the encoder's), blocks, heads, hidden width in units of the width.
    Key("MODEL.SEGMENTER.DIM", 0, whole(0)),
    Key("MODEL.SEGMENTER.DEPTH", 2, whole(1)),
    Key("MODEL.SEGMENTER.NUM_HEADS", 16, whole(1)),
    Key("MODEL.SEGMENTER.MLP_RATIO", 4.0, POSITIVE),
    Key("MODEL.SEGMENTER.DROPOUT", 0.1, RATE),
    Key("MODEL.SEGMENTER.DROP_PATH_RATE", 0.0, RATE),
    # --- DPT ------------------------------------------------------------------------------------
    # Of the four features that are fused (a hybrid's stem0 and stem1, then MODEL.VIT.OUT_BLOCKS):
    # the channels after the reassembly, and by how much each is enlarged.
    Key("MODEL.DPT.NECK_CHANNELS", [256, 512, 1024, 1024], each(whole(1), 4)),
    Key("MODEL.DPT.REASSEMBLE_FACTORS", [4, 2, 1, 0.5], each(_SCALE, 4)),
    # Channels of the fusion; half of it in the head.
    Key("MODEL.DPT.FUSION_CHANNELS", 256, whole(2)),
    # What becomes of the class token: "project", "add" or "ignore".
    Key("MODEL.DPT.READOUT", "project", one_of("project", "add", "ignore")),
    # Depth in metres is 1 / (SCALE * x + SHIFT), or SCALE * x + SHIFT if INVERSE is False.
    Key("MODEL.DPT.INVERSE", True),
    Key("MODEL.DPT.SCALE", 1.0, POSITIVE),
    Key("MODEL.DPT.SHIFT", 0.0, NOT_NEGATIVE),
    # Training: greater depths do not count; how much of a common factor the scale-invariant error
    # forgives (0 to 1); weight of the gradients' error.
    Key("MODEL.DPT.MAX_DEPTH", 80.0, POSITIVE),
    Key("MODEL.DPT.SILOG_WEIGHT", 0.85, SHARE),
    Key("MODEL.DPT.GRADIENT_WEIGHT", 0.0, NOT_NEGATIVE),
    # Height and width that images are brought near to at evaluation, in multiples of 32.
    Key("MODEL.DPT.TEST_SIZE", [384, 384], SIDES),
    # --- HTC, beside Detectron2's own keys of two-stage detectors -------------------------------
    # Weight of the losses of each stage of the cascade.
    Key("MODEL.HTC.STAGE_LOSS_WEIGHTS", [1.0, 0.5, 0.25], each(NOT_NEGATIVE)),
    # Whether a semantic branch is learnt and its features are added to the regions'.
    Key("MODEL.HTC.SEMANTIC_ON", True),
    # 3x3 convolutions of the semantic branch.
    Key("MODEL.HTC.SEMANTIC_CONVS", 4, whole(0)),
    # How overlapping boxes lose score: "linear", "gaussian", or "": they are dropped.
    Key("MODEL.HTC.SOFT_NMS", "linear", one_of("", "linear", "gaussian")),
    # Width of "gaussian".
    Key("MODEL.HTC.SOFT_NMS_SIGMA", 0.5, POSITIVE),
    # Lowered scores below it are dropped.
    Key("MODEL.HTC.SOFT_NMS_MIN_SCORE", 0.001, SHARE),
    *MASK2FORMER_KEYS,
    *KEYS_BELOW_ITS_NODES,
]

_DEFAULTS: dict[str, Any] = {key.name: key.default for key in KEYS} | {
    key.name: key.default for key in UNREAD_KEYS
}


def add_expedite_config(cfg: CfgNode) -> None:
    """Add every key of this project to a Detectron2 config, in place; those that are there stay.

    Mask2Former's own keys are among them, so that each backbone and each meta-architecture of this
    package builds from Detectron2's ``get_cfg()`` and this function. Mask2Former's own function may
    come before it or after it. It begins nodes anew: when it comes after, keys of ours below them
    have their defaults, and a file that sets one ends in a KeyError that says what to do.
    """
    for name, default in _DEFAULTS.items():
        *parents, leaf = name.split(".")
        node = cfg
        for parent in parents:
            node = node.setdefault(parent, CfgNode())
        node.setdefault(leaf, copy.deepcopy(default))
    renamed = cfg.__dict__[CfgNode.RENAMED_KEYS]
    if not isinstance(renamed, _RenamedKeys):
        cfg.__dict__[CfgNode.RENAMED_KEYS] = _RenamedKeys(cfg, renamed)


class _RenamedKeys(dict[str, Any]):
    """yacs's table of the renamed keys of a config, which notices keys of ours that were dropped.

    Before a merge calls a key non-existent it looks here, and nowhere else that a config carries
    with it: so ``cfg.merge_from_file`` of anybody's own project can say what to do.
    """

    def __init__(self, cfg: CfgNode, renamed: dict[str, Any]) -> None:
        super().__init__(renamed)
        self.cfg = cfg

    def __contains__(self, name: object) -> bool:
        if name in _DEFAULTS and not _holds(self.cfg, str(name)):
            raise KeyError(_missing(str(name)))
        return super().__contains__(name)


def setting(cfg: CfgNode, name: str) -> Any:
    """The value of a key of this project.

    Args:
        cfg: the whole config.
        name: the key in dotted form.

    Returns:
        Its value, or its default where Mask2Former's own function dropped it.

    Raises:
        ValueError: `add_expedite_config` was not called, or another function dropped the key.
    """
    if _holds(cfg, name):
        return functools.reduce(getattr, name.split("."), cfg)
    if all(name != key.name for key in KEYS_BELOW_ITS_NODES):
        raise ValueError(_missing(name))
    return copy.deepcopy(_DEFAULTS[name])


def check_keys(cfg: CfgNode, node: str) -> None:
    """Hold the keys of this project below a node against their rules.

    Args:
        cfg: the whole config.
        node: in dotted form, e.g. "MODEL.SWIN".

    Raises:
        ValueError: naming the first key that is missing, or whose value is wrong, what it should be
            and what it is.
    """
    for key in KEYS:
        if key.name.startswith(f"{node}."):
            value = setting(cfg, key.name)
            if key.rule is not None:
                key.rule.check(key.name, value)


def check_unset(cfg: CfgNode, names: Sequence[str], owner: str) -> None:
    """Refuse keys that something else reads.

    Args:
        cfg: the whole config.
        names: the keys in dotted form.
        owner: what does not have them, for the message.

    Raises:
        ValueError: naming the first key whose value is not the default.
    """
    for name in names:
        default = only(_DEFAULTS[name], f"for {owner}, which has no such setting")
        default.check(name, setting(cfg, name))


def check_training_input(cfg: CfgNode) -> None:
    """Hold ``INPUT``, as segmentation is trained with it, against its rules.

    Raises:
        ValueError: naming the first key whose value is wrong, what it should be and what it is.
    """
    check_keys(cfg, "INPUT")
    check(cfg, TRAINING_KEYS)
    if cfg.INPUT.MIN_SCALE > cfg.INPUT.MAX_SCALE:
        raise ValueError(
            f"INPUT.MIN_SCALE must not exceed INPUT.MAX_SCALE {cfg.INPUT.MAX_SCALE}, got "
            f"{cfg.INPUT.MIN_SCALE}"
        )
    check_crop(cfg)


def _holds(cfg: CfgNode, name: str) -> bool:
    """Whether a config has a key."""
    node: Any = cfg
    for part in name.split("."):
        if part not in node:
            return False
        node = node[part]
    return True


def _missing(name: str) -> str:
    return (
        f"{name} is not in the config: call add_expedite_config last, after functions that begin "
        "a node anew"
    )

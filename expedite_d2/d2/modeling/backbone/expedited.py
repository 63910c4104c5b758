"""Any registered backbone, expedited, and builders for those that Detectron2 does not register.

The registry uses the name of a builder's function, so that these are named after the classes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from expedite_d2.adapters.core import prepare
from expedite_d2.d2.config.keys import check_keys, check_unset, setting
from expedite_d2.d2.modeling.backbone.settings import check_swin, reduction_from_config
from expedite_d2.d2.provider import BACKBONE_REGISTRY, PROVIDER, Backbone, ShapeSpec
from expedite_d2.reducers import Expeditable

# Keys that Detectron2's own backbones do not have.
_OUR_SWIN_KEYS = ("MODEL.SWIN.VERSION", "MODEL.SWIN.PRETRAINED_WINDOW_SIZES")
_TIMM_KEYS = (
    "MODEL.VIT.NAME",
    "MODEL.VIT.DROP_RATE",
    "MODEL.VIT.ATTN_DROP_RATE",
    "MODEL.VIT.POS_INTERPOLATION",
    "MODEL.VIT.OUT_BLOCKS",
)

# Builders that read MODEL.EXPEDITE.BACKBONE themselves.
_BUILDERS = ("ExpeditedBackbone", "build_expedited_fpn_backbone")


@BACKBONE_REGISTRY.register()
def ExpeditedBackbone(cfg: Any, input_shape: ShapeSpec) -> Backbone:
    """Builds the backbone that ``MODEL.EXPEDITE.BACKBONE`` names; its parameters keep their names.

    Args:
        cfg: the whole config, from which that backbone is built. With ``MODEL.EXPEDITE.ENABLED``
            it is expedited with the settings of ``MODEL.EXPEDITE``.
        input_shape: channels of the images.

    Raises:
        ValueError: no registered backbone is named, or the settings do not fit it.
    """
    name = setting(cfg, "MODEL.EXPEDITE.BACKBONE")
    if name in _BUILDERS or name not in BACKBONE_REGISTRY:
        raise ValueError(
            "MODEL.EXPEDITE.BACKBONE must name a registered backbone, such as "
            f"D2SwinTransformer, got {name!r}"
        )
    # Third-party constructors compute with values, which tensors on the meta device do not have.
    with torch.device("cpu"):
        backbone = BACKBONE_REGISTRY.get(name)(cfg, input_shape)
    backbone.to(torch.get_default_device())
    reduction = reduction_from_config(cfg)
    # Backbones of this package read the settings themselves.
    if reduction is None or isinstance(backbone, Expeditable):
        return backbone
    prepare(backbone, reduction)
    return backbone


def SwinTransformer(cfg: Any, input_shape: ShapeSpec) -> Backbone:
    """Builds Detectron2's own ``SwinTransformer`` from ``MODEL.SWIN``.

    Its outputs are "p0" to "p3" where ``MODEL.SWIN.OUT_FEATURES`` says "res2" to "res5".

    Raises:
        ValueError: a value that no Swin can have, or a key that this one does not have is set.
    """
    check_swin(cfg)
    check_unset(cfg, _OUR_SWIN_KEYS, "Detectron2's SwinTransformer")
    from detectron2.modeling import backbone as detectron2

    swin = cfg.MODEL.SWIN
    backbone = detectron2.SwinTransformer(
        pretrain_img_size=swin.PRETRAIN_IMG_SIZE,
        patch_size=swin.PATCH_SIZE,
        in_chans=input_shape.channels,
        embed_dim=swin.EMBED_DIM,
        depths=swin.DEPTHS,
        num_heads=swin.NUM_HEADS,
        window_size=swin.WINDOW_SIZE,
        mlp_ratio=swin.MLP_RATIO,
        qkv_bias=swin.QKV_BIAS,
        qk_scale=swin.QK_SCALE,
        drop_rate=swin.DROP_RATE,
        attn_drop_rate=swin.ATTN_DROP_RATE,
        drop_path_rate=swin.DROP_PATH_RATE,
        ape=swin.APE,
        patch_norm=swin.PATCH_NORM,
        out_indices=sorted(int(name.removeprefix("res")) - 2 for name in swin.OUT_FEATURES),
        use_checkpoint=swin.USE_CHECKPOINT,
    )
    # Detectron2 sets this attribute under a misspelt name, so that its own property fails.
    backbone._size_divisibility = 32
    return backbone


def ViT(cfg: Any, input_shape: ShapeSpec) -> Backbone:
    """Builds Detectron2's own ``ViT`` from ``MODEL.VIT``; its output is "last_feat".

    Raises:
        ValueError: a value that no ViT can have, or a key that this one does not have is set.
    """
    check_keys(cfg, "MODEL.VIT")
    check_unset(cfg, _TIMM_KEYS, "Detectron2's ViT")
    from detectron2.modeling import backbone as detectron2

    vit = cfg.MODEL.VIT
    sizes = {
        "img_size": vit.IMG_SIZE,
        "patch_size": vit.PATCH_SIZE,
        "embed_dim": vit.EMBED_DIM,
        "depth": vit.DEPTH,
        "num_heads": vit.NUM_HEADS,
    }
    return detectron2.ViT(
        in_chans=input_shape.channels,
        drop_path_rate=vit.DROP_PATH_RATE,
        norm_layer=functools.partial(nn.LayerNorm, eps=vit.NORM_EPS),
        use_rel_pos=vit.USE_REL_POS,
        window_size=vit.WINDOW_SIZE,
        window_block_indexes=vit.WINDOW_BLOCKS,
        use_act_checkpoint=vit.USE_CHECKPOINT,
        pretrain_img_size=vit.PRETRAIN_IMG_SIZE,
        **{name: value for name, value in sizes.items() if value},
    )


if PROVIDER == "detectron2":
    for _builder in (SwinTransformer, ViT):
        if _builder.__name__ not in BACKBONE_REGISTRY:  # another project may have its own
            BACKBONE_REGISTRY.register(_builder)

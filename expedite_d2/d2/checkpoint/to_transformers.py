"""A Mask2Former out of Detectron2: as transformers' own model, the way back of ``names``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    SwinConfig,
)

from expedite_d2.d2.checkpoint.loading import load_weights
from expedite_d2.d2.checkpoint.matching import is_training_only
from expedite_d2.d2.checkpoint.names import State, rename, rules_of
from expedite_d2.d2.config.keys import setting
from expedite_d2.d2.config.rules import only
from expedite_d2.d2.modeling.backbone.swin import ExpeditedSwinTransformer
from expedite_d2.d2.modeling.build import build_model
from expedite_d2.d2.modeling.meta_arch.mask2former import ExpeditedMask2Former
from expedite_d2.d2.modeling.meta_arch.mask2former_heads import mask2former_config
from expedite_d2.d2.provider import CfgNode, MetadataCatalog

_ENCODER = "model.pixel_level_module.encoder."
_BLOCK = r"^(backbone\.layers\.\d+\.blocks\.\d+)\."
_TO_TRANSFORMERS = rules_of(
    [
        (_BLOCK + r"norm1\.", r"\1.layernorm_before."),
        (_BLOCK + r"norm2\.", r"\1.layernorm_after."),
        (_BLOCK + r"attn\.proj\.", r"\1.attention.output.dense."),
        (_BLOCK + r"attn\.", r"\1.attention.self."),
        (_BLOCK + r"mlp\.fc1\.", r"\1.intermediate.dense."),
        (_BLOCK + r"mlp\.fc2\.", r"\1.output.dense."),
        (r"^backbone\.layers\.", _ENCODER + "encoder.layers."),
        (r"^backbone\.patch_embed\.proj\.", _ENCODER + "embeddings.patch_embeddings.projection."),
        (r"^backbone\.patch_embed\.norm\.", _ENCODER + "embeddings.norm."),
        *(
            (rf"^backbone\.norm{i}\.", f"{_ENCODER}hidden_states_norms.stage{i + 1}.")
            for i in range(4)
        ),
        (r"^pixel_decoder\.", "model.pixel_level_module.decoder."),
        (r"^transformer_module\.", "model.transformer_module."),
    ]
)
_FUSED = re.compile(r"^(.*\.attention\.self)\.qkv\.(weight|bias)$")
# What transformers' classes have no setting for, or another meaning.
_ONLY: dict[str, Any] = {
    "MODEL.SWIN.VERSION": 1,
    "MODEL.SWIN.QK_SCALE": None,
    "MODEL.SWIN.APE": False,
    "MODEL.SWIN.PATCH_NORM": True,
    "INPUT.FORMAT": "RGB",
}


def write_directory(cfg: CfgNode, source: Path, directory: Path) -> None:
    """Write a checkpoint as a directory for ``from_pretrained``, with an image processor.

    Args:
        cfg: the config that the checkpoint belongs to.
        source: what ``load_weights`` reads: the official Mask2Former's checkpoint, or this
            project's.
        directory: what to write to.

    Raises:
        FileNotFoundError: ``source`` is missing.
        ValueError: see ``to_transformers``; or the checkpoint of another model, or ``directory`` is
            a file.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} must be a directory, or not exist yet")
    model = build_model(cfg)
    load_weights(model, source)
    to_transformers(cfg, model).save_pretrained(directory)
    _image_processor(cfg).save_pretrained(directory)


def to_transformers(cfg: CfgNode, model: nn.Module) -> Mask2FormerForUniversalSegmentation:
    """transformers' Mask2Former with the weights of this project's, in evaluation mode.

    Both give the same class and mask logits for the same normalised images.

    Args:
        cfg: the config that the model was built from.
        model: an ``ExpeditedMask2Former`` on Swin; whether it is expedited makes no difference.

    Raises:
        ValueError: another model, or a key that asks for what transformers' classes do not have.
    """
    for key, value in _ONLY.items():
        only(value, "for transformers' Mask2Former").check(key, setting(cfg, key))
    backbone = getattr(model, "backbone", None)
    if not isinstance(model, ExpeditedMask2Former) or not isinstance(
        backbone, ExpeditedSwinTransformer
    ):
        raise ValueError(
            "what becomes transformers' Mask2Former must be an ExpeditedMask2Former on an "
            f"ExpeditedSwinTransformer, got {type(model).__name__} on {type(backbone).__name__}"
        )
    shapes = backbone.output_shape()
    config = mask2former_config(cfg, [shapes[name] for name in model.in_features])
    config.backbone_config = _swin_config(cfg)
    config.use_auxiliary_loss = True  # without, its forward pass fails
    names = MetadataCatalog.get(model.dataset_name).get("stuff_classes")
    if names and len(names) == cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}
    # Its loader takes the public names, which in memory change from one release to the next.
    loaded: Any = Mask2FormerForUniversalSegmentation.from_pretrained(
        None, config=config, state_dict=_translated(model.state_dict()), output_loading_info=True
    )
    converted, report = loaded
    wrong = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if wrong:
        raise ValueError(f"the weights do not fit transformers' Mask2Former: {wrong}")
    return converted


def _image_processor(cfg: CfgNode) -> Mask2FormerImageProcessor:
    """transformers' preparation of images, which resizes and normalises as this project's."""
    shortest, longest = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    return Mask2FormerImageProcessor(
        do_resize=shortest > 0,
        size={"shortest_edge": shortest, "longest_edge": longest},
        image_mean=[mean / 255 for mean in cfg.MODEL.PIXEL_MEAN],
        image_std=[deviation / 255 for deviation in cfg.MODEL.PIXEL_STD],
        ignore_index=cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
    )


def _translated(state: State) -> State:
    translated: State = {}
    for name, tensor in state.items():
        if is_training_only(name) and not name.startswith("criterion."):
            continue
        renamed = rename(name, _TO_TRANSFORMERS)
        fused = _FUSED.match(renamed)
        if fused is None:
            translated[renamed] = tensor
            continue
        for kind, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
            translated[f"{fused[1]}.{kind}.{fused[2]}"] = part
    # Of its Swin as a classifier: nothing in the model reads it.
    width = len(translated[f"{_ENCODER}hidden_states_norms.stage4.weight"])
    translated[f"{_ENCODER}swin.layernorm.weight"] = torch.ones(width)
    translated[f"{_ENCODER}swin.layernorm.bias"] = torch.zeros(width)
    return translated


def _swin_config(cfg: CfgNode) -> SwinConfig:
    swin = cfg.MODEL.SWIN
    build: Any = SwinConfig  # some of its keywords are not in its signature
    return build(
        image_size=swin.PRETRAIN_IMG_SIZE,
        patch_size=swin.PATCH_SIZE,
        embed_dim=swin.EMBED_DIM,
        depths=list(swin.DEPTHS),
        num_heads=list(swin.NUM_HEADS),
        window_size=swin.WINDOW_SIZE,
        mlp_ratio=swin.MLP_RATIO,
        qkv_bias=swin.QKV_BIAS,
        hidden_dropout_prob=swin.DROP_RATE,
        attention_probs_dropout_prob=swin.ATTN_DROP_RATE,
        drop_path_rate=swin.DROP_PATH_RATE,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )

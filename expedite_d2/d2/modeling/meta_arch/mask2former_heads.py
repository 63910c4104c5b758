"""Mask2Former's heads from transformers, built and initialised from Mask2Former's config keys."""

from __future__ import annotations

import copy
import warnings

from torch import nn
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoder,
    Mask2FormerPixelDecoderEncoderLayer,
    Mask2FormerPreTrainedModel,
    Mask2FormerTransformerModule,
)

from expedite_d2.d2.modeling.meta_arch.masked_decoder import use_mask_embeddings
from expedite_d2.d2.modeling.meta_arch.pixel_decoder import use_operator
from expedite_d2.d2.provider import CfgNode, ShapeSpec

PIXEL_DECODER_FEEDFORWARD = 1024  # a constant in Mask2Former's code, without a config key


def mask2former_config(cfg: CfgNode, shapes: list[ShapeSpec]) -> Mask2FormerConfig:
    """Makes transformers' configuration of the model that Mask2Former's keys describe.

    Args:
        cfg: a config with Mask2Former's keys.
        shapes: channels and stride of the pixel decoder's input features, by rising stride.

    Raises:
        ValueError: a key asks for something that transformers' modules do not have.
    """
    head, former = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
    strides = [shape.stride for shape in shapes]
    required = {
        "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES": (
            list(head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES), list(head.IN_FEATURES[-3:])
        ),
        "the strides of MODEL.SEM_SEG_HEAD.IN_FEATURES": (strides, [4, 8, 16, 32]),
    }  # fmt: skip
    for key, (value, supported) in required.items():
        if value != supported:
            raise ValueError(f"{key} must be {supported!r}, got {value!r}")
    if head.CONVS_DIM % 32:
        raise ValueError(
            "MODEL.SEM_SEG_HEAD.CONVS_DIM must be a multiple of 32 (the groups of GroupNorm), "
            f"got {head.CONVS_DIM}"
        )
    for key, value in [
        ("MODEL.SEM_SEG_HEAD.CONVS_DIM", head.CONVS_DIM),
        ("MODEL.MASK_FORMER.HIDDEN_DIM", former.HIDDEN_DIM),
    ]:
        if value % former.NHEADS:
            raise ValueError(
                f"{key} must be a multiple of MODEL.MASK_FORMER.NHEADS {former.NHEADS}, got {value}"
            )
    if former.DEC_LAYERS < 1:
        raise ValueError(
            "MODEL.MASK_FORMER.DEC_LAYERS counts the decoder layers and the learnable queries' own "
            f"prediction, so it must be at least 1, got {former.DEC_LAYERS}"
        )
    return Mask2FormerConfig(
        num_labels=head.NUM_CLASSES,  # type: ignore[call-arg]
        feature_size=head.CONVS_DIM,
        mask_feature_size=head.MASK_DIM,
        hidden_dim=former.HIDDEN_DIM,
        encoder_feedforward_dim=PIXEL_DECODER_FEEDFORWARD,
        encoder_layers=head.TRANSFORMER_ENC_LAYERS,
        decoder_layers=former.DEC_LAYERS,
        num_attention_heads=former.NHEADS,
        dropout=former.DROPOUT,
        dim_feedforward=former.DIM_FEEDFORWARD,
        pre_norm=former.PRE_NORM,
        enforce_input_projection=former.ENFORCE_INPUT_PROJ,
        common_stride=head.COMMON_STRIDE,
        ignore_value=head.IGNORE_VALUE,
        num_queries=former.NUM_OBJECT_QUERIES,
        no_object_weight=former.NO_OBJECT_WEIGHT,
        class_weight=former.CLASS_WEIGHT,
        mask_weight=former.MASK_WEIGHT,
        dice_weight=former.DICE_WEIGHT,
        train_num_points=former.TRAIN_NUM_POINTS,
        oversample_ratio=former.OVERSAMPLE_RATIO,
        importance_sample_ratio=former.IMPORTANCE_SAMPLE_RATIO,
        use_auxiliary_loss=former.DEEP_SUPERVISION,
        feature_strides=strides,
    )


def build_pixel_decoder(
    config: Mask2FormerConfig, shapes: list[ShapeSpec]
) -> Mask2FormerPixelDecoder:
    """Builds the multi-scale deformable pixel decoder with Mask2Former's initial weights."""
    with warnings.catch_warnings():
        # Its warning about head sizes is for a CUDA kernel that transformers does not include.
        warnings.filterwarnings("ignore", message="You'd better set embed_dim")
        decoder = Mask2FormerPixelDecoder(config, [shape.channels for shape in shapes])
    use_operator(decoder)
    _initialise(decoder, config)
    # transformers draws these with a deviation of 0.02 for every width. Mask2Former does not, and
    # from scratch that starts narrow decoders with mask features close to zero.
    for module in decoder.modules():
        if isinstance(module, Mask2FormerPixelDecoderEncoderLayer):
            nn.init.xavier_uniform_(module.fc1.weight)
            nn.init.xavier_uniform_(module.fc2.weight)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, a=1)
    return decoder


def build_transformer_decoder(config: Mask2FormerConfig) -> Mask2FormerTransformerModule:
    """Builds the masked-attention transformer decoder with Mask2Former's initial weights."""
    # Mask2Former's DROPOUT is only for the pixel decoder; here it would also drop whole layers.
    config = copy.deepcopy(config)
    config.dropout = 0.0
    decoder = Mask2FormerTransformerModule(config.feature_size, config)
    # In some releases of transformers 5 a plain list, not part of the state and left on the CPU.
    decoder.input_projections = nn.ModuleList(decoder.input_projections)
    use_mask_embeddings(decoder)
    _initialise(decoder, config)
    return decoder


def _initialise(module: nn.Module, config: Mask2FormerConfig) -> None:
    """Applies transformers' own rules, which the constructors of its modules do not."""
    module.apply(Mask2FormerPreTrainedModel(config)._init_weights)

"""This project's weights as the official models want them: the way back of ``names``."""

from __future__ import annotations

import math
import re
from collections import OrderedDict, defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from expedite_d2.adapters.windows import relative_position_index
from expedite_d2.d2.checkpoint.names import State, join, rename, rules_of

_TABLE = re.compile(
    r"^((?:backbone\.)?layers\.\d+\.blocks\.\d+\.attn\.)relative_position_bias_table$"
)


def with_position_indices(state: Mapping[str, Tensor]) -> State:
    """Official Swin's constant beside each bias table: this project computes it, they load it.

    The blocks of one window size share one tensor, of which torch.save writes a single copy.
    """
    indices: dict[int, Tensor] = {}
    completed: State = {}
    for name, tensor in state.items():
        completed[name] = tensor
        table = _TABLE.match(name)
        if table is not None and tensor.ndim == 2:
            # (2 * window - 1)² rows, one per offset between two positions of a window.
            window = (math.isqrt(len(tensor)) + 1) // 2
            if window not in indices:
                indices[window] = relative_position_index((window, window))
            completed[f"{table[1]}relative_position_index"] = indices[window]
    return completed


_DECODER = r"^transformer_module\.decoder\."
_LAYER = _DECODER + r"layers\.(\d+)\."
_PREDICTOR = "sem_seg_head.predictor."
_SELF, _CROSS, _FFN = (
    rf"{_PREDICTOR}transformer_{kind}_layers.\1."
    for kind in ("self_attention", "cross_attention", "ffn")
)
_MASK2FORMER = rules_of(
    [
        (r"^(pixel_decoder)\.input_projections\.", r"\1.input_proj."),
        (r"^(pixel_decoder)\.mask_projection\.", r"\1.mask_features."),
        (r"^(pixel_decoder)\.level_embed$", r"\1.transformer.level_embed"),
        (r"^(pixel_decoder\.(?:adapter|layer)_\d+)\.0\.", r"\1."),
        (r"^(pixel_decoder\.(?:adapter|layer)_\d+)\.1\.", r"\1.norm."),
        (r"^(pixel_decoder)\.encoder\.", r"\1.transformer.encoder."),
        (r"^(pixel_decoder\.transformer\..*)\.self_attn_layer_norm\.", r"\1.norm1."),
        (r"^(pixel_decoder\.transformer\..*)\.final_layer_norm\.", r"\1.norm2."),
        (r"^(pixel_decoder\.transformer\..*)\.fc([12])\.", r"\1.linear\2."),
        (r"^pixel_decoder\.", "sem_seg_head.pixel_decoder."),
        (_LAYER + r"self_attn_layer_norm\.", _SELF + "norm."),
        (_LAYER + r"self_attn\.", _SELF + "self_attn."),
        (_LAYER + r"cross_attn_layer_norm\.", _CROSS + "norm."),
        (_LAYER + r"cross_attn\.", _CROSS + "multihead_attn."),
        (_LAYER + r"final_layer_norm\.", _FFN + "norm."),
        (_LAYER + r"fc([12])\.", _FFN + r"linear\2."),
        (_DECODER + r"layernorm\.", _PREDICTOR + "decoder_norm."),
        (
            _DECODER + r"mask_predictor\.mask_embedder\.(\d+)\.0\.",
            _PREDICTOR + r"mask_embed.layers.\1.",
        ),
        (r"^transformer_module\.queries_features\.", _PREDICTOR + "query_feat."),
        (r"^transformer_module\.queries_embedder\.", _PREDICTOR + "query_embed."),
        (r"^transformer_module\.level_embed\.", _PREDICTOR + "level_embed."),
        (r"^transformer_module\.input_projections\.", _PREDICTOR + "input_proj."),
        (r"^class_predictor\.", _PREDICTOR + "class_embed."),
    ]
)
_PROJECTION = re.compile(r"^(sem_seg_head\..*\.self_attn)\.([qkv])_proj\.(weight|bias)$")
# What ``state_dict`` notes of modules whose names have changed. Without it the official model takes
# today's names for those of its first release, and renames them.
_VERSIONS = {name: {"version": 2} for name in ("sem_seg_head", "sem_seg_head.predictor")}
# The loss's, which the official model keeps among its weights.
CLASS_WEIGHTS = "criterion.empty_weight"
# What Mask2Former's configs give class "no object" in the loss.
_NO_OBJECT_WEIGHT = 0.1


def to_mask2former(state: Mapping[str, Tensor]) -> State:
    """Names and weights that the official Mask2Former loads strictly.

    Args:
        state: an ``ExpeditedMask2Former``'s. Where the loss's class weights are missing, they
            become those of Mask2Former's configs.

    Raises:
        ValueError: the weights of another model.
    """
    if not any(name.startswith("transformer_module.decoder.layers.") for name in state):
        raise ValueError("its names are not those of this project's Mask2Former")
    official: OrderedDict[str, Tensor] = OrderedDict()
    official._metadata = _VERSIONS  # type: ignore[attr-defined]
    separate: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in with_position_indices(state).items():
        renamed = rename(name, _MASK2FORMER)
        part = _PROJECTION.match(renamed)
        if part is None:
            official[renamed] = tensor
        else:
            separate[f"{part[1]}.in_proj_{part[3]}"][part[2]] = tensor
    for name, parts in separate.items():
        official[name] = join(name, [parts[letter] for letter in "qkv" if letter in parts])
    classes = official.get(f"{_PREDICTOR}class_embed.bias")
    if classes is not None and CLASS_WEIGHTS not in official:
        weight = torch.ones(len(classes))
        weight[-1] = _NO_OBJECT_WEIGHT
        official[CLASS_WEIGHTS] = weight
    return official

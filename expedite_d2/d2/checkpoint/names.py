"""Names of public checkpoints, translated to this project's.

Each translation takes names and tensors and gives names and tensors. What it does not know keeps
its name, so that whoever loads it can say what is left over.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

State = dict[str, Tensor]

# Tables that models compute for themselves, and layers that dense prediction does not use.
_COMPUTED = re.compile(r"(^|\.)(relative_position_index|relative_coords_table|attn_mask)$")
_CLASSIFIER = re.compile(r"^(norm|head|head_dist|head\.fc)\.(weight|bias)$")
_MERGING = re.compile(r"^layers\.([1-9]\d*)\.(?=downsample\.)")
_POSITIONS = "backbone.absolute_pos_embed"


class Format(NamedTuple):
    """One public format.

    Attributes:
        title: its name for people.
        recognises: whether names are of this format.
        translate: to this project's names.
        backbone_only: whether it holds a backbone, the start of a model, and no heads.
        norm_eps: epsilon of the backbone's LayerNorms in the code of its owners, if it is not told
            beside the weights; None where this project's backbone leaves no choice.
        norm_eps_may_vary: whether that code has it as a setting, so that it is the usual one only.
    """

    title: str
    recognises: Callable[[Iterable[str]], bool]
    translate: Callable[[Mapping[str, Tensor]], State]
    backbone_only: bool
    norm_eps: float | None = None
    norm_eps_may_vary: bool = False


def rules_of(pairs: Iterable[tuple[str, str]]) -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(pattern), replacement) for pattern, replacement in pairs]


def rename(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str:
    for pattern, replacement in rules:
        name = pattern.sub(replacement, name)
    return name


_PREDICTOR_LAYER = r"^sem_seg_head\.predictor\.transformer_{}_layers\.(\d+)\."
_SELF, _CROSS, _FFN = map(_PREDICTOR_LAYER.format, ("self_attention", "cross_attention", "ffn"))
_LAYER = r"transformer_module.decoder.layers.\1."
_MASK2FORMER = rules_of(
    [
        # The first releases had no pixel_decoder level and called the queries static_query.
        (r"^sem_seg_head\.(?!predictor\.|pixel_decoder\.)", "sem_seg_head.pixel_decoder."),
        (r"\.static_query\.", ".query_feat."),
        (r"^sem_seg_head\.pixel_decoder\.transformer\.encoder\.", "pixel_decoder.encoder."),
        (r"^sem_seg_head\.pixel_decoder\.transformer\.level_embed$", "pixel_decoder.level_embed"),
        (r"^sem_seg_head\.pixel_decoder\.", "pixel_decoder."),
        (r"^(pixel_decoder)\.input_proj\.", r"\1.input_projections."),
        (r"^(pixel_decoder)\.mask_features\.", r"\1.mask_projection."),
        (r"^(pixel_decoder\.(?:adapter|layer)_\d+)\.(weight|bias)$", r"\1.0.\2"),
        (r"^(pixel_decoder\.(?:adapter|layer)_\d+)\.norm\.", r"\1.1."),
        (r"^(pixel_decoder\.encoder\.layers\.\d+)\.norm1\.", r"\1.self_attn_layer_norm."),
        (r"^(pixel_decoder\.encoder\.layers\.\d+)\.norm2\.", r"\1.final_layer_norm."),
        (r"^(pixel_decoder\.encoder\.layers\.\d+)\.linear([12])\.", r"\1.fc\2."),
        (_SELF + r"norm\.", _LAYER + "self_attn_layer_norm."),
        (_SELF, _LAYER),
        (_CROSS + r"norm\.", _LAYER + "cross_attn_layer_norm."),
        (_CROSS + r"multihead_attn\.", _LAYER + "cross_attn."),
        (_FFN + r"norm\.", _LAYER + "final_layer_norm."),
        (_FFN + r"linear([12])\.", _LAYER + r"fc\2."),
        (r"^sem_seg_head\.predictor\.decoder_norm\.", "transformer_module.decoder.layernorm."),
        (
            r"^sem_seg_head\.predictor\.mask_embed\.layers\.(\d+)\.",
            r"transformer_module.decoder.mask_predictor.mask_embedder.\1.0.",
        ),
        (r"^sem_seg_head\.predictor\.query_feat\.", "transformer_module.queries_features."),
        (r"^sem_seg_head\.predictor\.query_embed\.", "transformer_module.queries_embedder."),
        (r"^sem_seg_head\.predictor\.level_embed\.", "transformer_module.level_embed."),
        (r"^sem_seg_head\.predictor\.input_proj\.", "transformer_module.input_projections."),
        (r"^sem_seg_head\.predictor\.class_embed\.", "class_predictor."),
    ]
)
_FUSED = re.compile(
    r"^(transformer_module\.decoder\.layers\.\d+\.self_attn)\.in_proj_(weight|bias)$"
)


def from_mask2former(state: Mapping[str, Tensor]) -> State:
    """Mask2Former's own checkpoints: its fused self-attention becomes three projections."""
    translated: State = {}
    for name, tensor in state.items():
        if _COMPUTED.search(name):
            continue
        renamed = rename(name, _MASK2FORMER)
        fused = _FUSED.match(renamed)
        if fused is None:
            translated[renamed] = tensor
            continue
        if tensor.ndim == 0 or len(tensor) % 3:
            raise ValueError(
                f"{name} must hold three projections of as many rows each, got shape "
                f"{tuple(tensor.shape)}"
            )
        for letter, part in zip("qkv", tensor.chunk(3), strict=True):
            translated[f"{fused[1]}.{letter}_proj.{fused[2]}"] = part
    return translated


_TRANSFORMERS = rules_of(
    [
        (r"^model\.pixel_level_module\.decoder\.", "pixel_decoder."),
        (r"^model\.transformer_module\.", "transformer_module."),
        (
            r"^(?:model\.pixel_level_module\.encoder\.(?:swin\.)?|swin(?:v2)?\.)(?:encoder\.)?",
            "backbone.",
        ),
        (r"^(backbone)\.hidden_states_norms\.stage4\.", r"\1.norm3."),
        (r"^(backbone)\.hidden_states_norms\.stage3\.", r"\1.norm2."),
        (r"^(backbone)\.hidden_states_norms\.stage2\.", r"\1.norm1."),
        (r"^(backbone)\.hidden_states_norms\.stage1\.", r"\1.norm0."),
        (r"^(backbone)\.embeddings\.patch_embeddings\.projection\.", r"\1.patch_embed.proj."),
        (r"^(backbone)\.embeddings\.norm\.", r"\1.patch_embed.norm."),
        (r"^(backbone)\.embeddings\.position_embeddings$", r"\1.absolute_pos_embed"),
        (r"^(backbone\.layers\.\d+\.blocks\.\d+)\.layernorm_before\.", r"\1.norm1."),
        (r"^(backbone\.layers\.\d+\.blocks\.\d+)\.layernorm_after\.", r"\1.norm2."),
        (r"^(backbone\.layers\.\d+\.blocks\.\d+)\.attention\.self\.", r"\1.attn."),
        (r"^(backbone\..*\.attn)\.continuous_position_bias_mlp\.", r"\1.cpb_mlp."),
        (r"^(backbone\.layers\.\d+\.blocks\.\d+)\.attention\.output\.dense\.", r"\1.attn.proj."),
        (r"^(backbone\.layers\.\d+\.blocks\.\d+)\.intermediate\.dense\.", r"\1.mlp.fc1."),
        (r"^(backbone\.layers\.\d+\.blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    ]
)
_UNUSED = re.compile(r"^(backbone\.layernorm|classifier)\.(weight|bias)$")  # of the classifier
_SEPARATE = re.compile(r"^(backbone\..*\.attn)\.(query|key|value)\.(weight|bias)$")


def from_transformers(state: Mapping[str, Tensor]) -> State:
    """transformers' Mask2Former on Swin, or Swin alone: three projections become a fused one."""
    translated: State = {}
    separate: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in state.items():
        if _COMPUTED.search(name):
            continue
        renamed = rename(name, _TRANSFORMERS)
        part = _SEPARATE.match(renamed)
        if part is None and not _UNUSED.match(renamed):
            translated[renamed] = tensor
        elif part is not None:
            separate[f"{part[1]}.qkv.{part[3]}"][part[2]] = tensor
    translated = _with_position_maps(translated)
    for name, parts in separate.items():
        if len(parts) == 3:
            translated[name] = join(name, [parts["query"], parts["key"], parts["value"]])
        elif parts.keys() == {"query", "value"}:  # biases of Swin's second version
            translated[name.replace("qkv.bias", "q_bias")] = parts["query"]
            translated[name.replace("qkv.bias", "v_bias")] = parts["value"]
    return translated


def from_swin(state: Mapping[str, Tensor]) -> State:
    """Swin's own classification weights (v1, v2): without classifier and final norm."""
    return _with_position_maps(
        {
            f"backbone.{name}": tensor
            for name, tensor in state.items()
            if not _COMPUTED.search(name) and not _CLASSIFIER.match(name)
        }
    )


def from_timm_swin(state: Mapping[str, Tensor]) -> State:
    """timm's Swin (v1, v2), where a stage begins with the merging that leads to it."""
    return from_swin(
        {
            _MERGING.sub(lambda match: f"layers.{int(match[1]) - 1}.", name): tensor
            for name, tensor in state.items()
        }
    )


def _with_position_maps(state: State) -> State:
    """Swin's absolute position embedding as a map (1, C, h, w), which classifiers have in a row."""
    row = state.get(_POSITIONS)
    if row is None or row.ndim != 3 or math.isqrt(row.shape[1]) ** 2 != row.shape[1]:
        return state
    side = math.isqrt(row.shape[1])
    return state | {_POSITIONS: row.transpose(1, 2).unflatten(2, (side, side))}


def from_ours(state: Mapping[str, Tensor]) -> State:
    """This project's own names, and those of every model whose parts keep their owner's names."""
    return {name: tensor for name, tensor in state.items() if not _COMPUTED.search(name)}


def join(name: str, parts: list[Tensor]) -> Tensor:
    """Projections below one another; what cannot be is no checkpoint."""
    try:
        return torch.cat(parts)
    except (RuntimeError, TypeError) as error:
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        raise ValueError(
            f"the projections that make up {name} must differ in their rows alone, got {shapes}"
        ) from error


def starts(*prefixes: str) -> Callable[[Iterable[str]], bool]:
    """All of ``prefixes`` occur, each at the start of some name."""
    return lambda names: all(any(n.startswith(p) for n in names) for p in prefixes)


def _is_timm_swin(names: Iterable[str]) -> bool:
    """As official Swin, but for the first merging, which stands in the second stage."""
    names = list(names)
    official = starts("layers.0.downsample.")(names)
    return starts("patch_embed.", "layers.0.blocks.", "layers.1.downsample.")(names) and (
        not official
    )


def _all_start(prefix: str) -> Callable[[Iterable[str]], bool]:
    return lambda names: all(name.startswith(prefix) for name in names)


# The first format that recognises a checkpoint translates it; the last one recognises all.
FORMATS = [
    Format("Mask2Former", starts("sem_seg_head.predictor.transformer_"), from_mask2former, False),
    Format(
        "transformers' Mask2Former", starts("model.pixel_level_module."), from_transformers, False
    ),
    Format("transformers' Swin", starts("swin."), from_transformers, True),
    Format("transformers' Swin", starts("swinv2."), from_transformers, True),
    Format("timm's Swin", _is_timm_swin, from_timm_swin, True),
    Format("Swin classification", starts("patch_embed.", "layers.0.blocks."), from_swin, True),
    Format("expedite_d2 backbone", _all_start("backbone."), from_ours, True),
    Format("expedite_d2", lambda names: True, from_ours, False),
]

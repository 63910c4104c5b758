"""Names of public DPT checkpoints for depth, translated to this project's.

The backbone's parameters have timm's names below ``backbone.vit.``, neck and head those of
transformers' DPT.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor

from expedite_d2.d2.checkpoint.names import Format, State, join, rename, rules_of, starts

# timm's classifier, which the release kept without use.
_CLASSIFIER = re.compile(r"^pretrained\.model\.head\.")
# The release counts stages from 1, and its fusion layers from the finest map on.
_REASSEMBLE = re.compile(r"^pretrained\.act_postprocess([1-4])\.(0\.project\.0|3|4)\.(.*)$")
_REASSEMBLE_PARTS = {
    "0.project.0": "readout_projects.{}.0",
    "3": "layers.{}.projection",
    "4": "layers.{}.resize",
}
_CONVOLUTION = re.compile(r"^scratch\.layer([1-4])_rn\.(.*)$")
_FUSION = re.compile(r"^scratch\.refinenet([1-4])\.(.*)$")
_RELEASE = rules_of(
    [
        (r"^pretrained\.model\.", "backbone.vit."),
        (r"^scratch\.output_conv\.", "head.head."),
        (r"^(neck\.fusion_stage\.layers\.\d)\.out_conv\.", r"\1.projection."),
        (
            r"^(neck\.fusion_stage\.layers\.\d)\.resConfUnit([12])\.conv([12])\.",
            r"\1.residual_layer\2.convolution\3.",
        ),
    ]
)


def from_release(state: Mapping[str, Tensor]) -> State:
    """The original release's checkpoints (github.com/isl-org/DPT), with or without a hybrid."""
    return {
        rename(_count_from_zero(name), _RELEASE): tensor
        for name, tensor in state.items()
        if not _CLASSIFIER.match(name)
    }


def _count_from_zero(name: str) -> str:
    if match := _REASSEMBLE.match(name):
        part = _REASSEMBLE_PARTS[match[2]].format(int(match[1]) - 1)
        return f"neck.reassemble_stage.{part}.{match[3]}"
    if match := _CONVOLUTION.match(name):
        return f"neck.convs.{int(match[1]) - 1}.{match[2]}"
    if match := _FUSION.match(name):
        return f"neck.fusion_stage.layers.{4 - int(match[1])}.{match[2]}"
    return name


_BIT = r"^backbone\.vit\.embeddings\.backbone\.bit"
_STEM = "backbone.vit.patch_embed.backbone"
_TRANSFORMERS = rules_of(
    [
        (r"^dpt\.", "backbone.vit."),
        (_BIT + r"\.embedder\.convolution\.", _STEM + ".stem.conv."),
        (_BIT + r"\.embedder\.norm\.", _STEM + ".stem.norm."),
        (_BIT + r"\.encoder\.stages\.(\d+)\.layers\.", _STEM + r".stages.\1.blocks."),
        (r"^(backbone\.vit)\.embeddings\.position_embeddings$", r"\1.pos_embed"),
        (r"\.vit\.embeddings\.(?:patch_embeddings\.)?projection\.", ".vit.patch_embed.proj."),
        (r"^(backbone\.vit)\.embeddings\.cls_token$", r"\1.cls_token"),
        (r"^(backbone\.vit)\.encoder\.layer\.", r"\1.blocks."),
        (r"^(backbone\.vit)\.layernorm\.", r"\1.norm."),
        (r"^(backbone\.vit\.blocks\.\d+)\.layernorm_before\.", r"\1.norm1."),
        (r"^(backbone\.vit\.blocks\.\d+)\.layernorm_after\.", r"\1.norm2."),
        (r"^(backbone\.vit\.blocks\.\d+)\.attention\.output\.dense\.", r"\1.attn.proj."),
        (r"^(backbone\.vit\.blocks\.\d+)\.intermediate\.dense\.", r"\1.mlp.fc1."),
        (r"^(backbone\.vit\.blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    ]
)
_SEPARATE = re.compile(
    r"^(backbone\.vit\.blocks\.\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)$"
)


def from_transformers(state: Mapping[str, Tensor]) -> State:
    """transformers' DPTForDepthEstimation: its three projections become timm's fused one."""
    translated: State = {}
    separate: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in state.items():
        renamed = rename(name, _TRANSFORMERS)
        part = _SEPARATE.match(renamed)
        if part is None:
            translated[renamed] = tensor
        else:
            separate[f"{part[1]}.attn.qkv.{part[3]}"][part[2]] = tensor
    for name, parts in separate.items():
        if len(parts) == 3:
            translated[name] = join(name, [parts["query"], parts["key"], parts["value"]])
    return translated


DPT_FORMATS = [
    Format(
        "DPT",
        starts("pretrained.model.", "scratch."),
        from_release,
        backbone_only=False,
        norm_eps=1e-6,
    ),
    Format("transformers' DPT", starts("dpt.embeddings.", "neck."), from_transformers, False),
]

"""Names of public Segmenter checkpoints, translated to this project's.

The backbone's parameters have timm's names below ``backbone.vit.``, the decoder the release's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from expedite_d2.d2.checkpoint.names import Format, State, rename, rules_of, starts

# ImageNet's classifier, which the release kept without use.
_CLASSIFIER = re.compile(r"^encoder\.head(_dist)?\.")
_RELEASE = rules_of([(r"^encoder\.", "backbone.vit.")])


def from_release(state: Mapping[str, Tensor]) -> State:
    """The original release's checkpoints (github.com/rstrudel/segmenter), either decoder."""
    return {
        rename(name, _RELEASE): tensor
        for name, tensor in state.items()
        if not _CLASSIFIER.match(name)
    }


_MMSEG = rules_of(
    [
        (r"^backbone\.", "backbone.vit."),
        (r"^decode_head\.", "decoder."),
        (r"^(backbone\.vit|decoder)\.layers\.", r"\1.blocks."),
        (r"^(backbone\.vit\.patch_embed)\.projection\.", r"\1.proj."),
        (r"^(backbone\.vit)\.ln1\.", r"\1.norm."),
        (r"^(.*\.blocks\.\d+)\.ln([12])\.", r"\1.norm\2."),
        (r"^(.*\.blocks\.\d+\.attn)\.attn\.in_proj_", r"\1.qkv."),
        (r"^(.*\.blocks\.\d+\.attn)\.attn\.out_proj\.", r"\1.proj."),
        (r"^(.*\.blocks\.\d+)\.ffn\.layers\.0\.0\.", r"\1.mlp.fc1."),
        (r"^(.*\.blocks\.\d+)\.ffn\.layers\.1\.", r"\1.mlp.fc2."),
        (r"^decoder\.dec_proj\.", "decoder.proj_dec."),
        (r"^decoder\.conv_seg\.", "decoder.head."),
    ]
)
# Linear layers without a bias where the release multiplies from the right.
_TRANSPOSED = re.compile(r"^decoder\.(patch|classes)_proj\.weight$")
# The other heads that MMSegmentation trains beside it.
_AUXILIARY = re.compile(r"^auxiliary_head\.")


def from_mmseg(state: Mapping[str, Tensor]) -> State:
    """MMSegmentation's checkpoints, and those of the released code of arXiv 2210.01035."""
    translated: State = {}
    mask_decoder = "decode_head.cls_emb" in state
    for name, tensor in state.items():
        renamed = rename(name, _MMSEG)
        transposed = _TRANSPOSED.match(renamed)
        if _AUXILIARY.match(name):
            continue
        if transposed is not None:
            translated[f"decoder.proj_{transposed[1]}"] = tensor.t() if tensor.ndim == 2 else tensor
        elif not renamed.startswith("decoder.head."):
            translated[renamed] = tensor
        elif not mask_decoder:  # where there is one, this 1x1 convolution lies idle beside it
            translated[renamed] = tensor.flatten(1) if tensor.ndim == 4 else tensor
    return translated


SEGMENTER_RELEASE = Format(
    "Segmenter",
    starts("encoder.blocks.", "decoder."),
    from_release,
    backbone_only=False,
    norm_eps=1e-5,
)
SEGMENTER_FORMATS = [
    SEGMENTER_RELEASE,
    Format(
        "MMSegmentation's Segmenter",
        starts("backbone.layers.", "decode_head."),
        from_mmseg,
        backbone_only=False,
        norm_eps=1e-6,
        norm_eps_may_vary=True,
    ),
]

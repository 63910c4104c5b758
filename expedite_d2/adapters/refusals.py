"""Why a model is refused: where nothing can be gained, and which family is nearest otherwise."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from expedite_d2.adapters.family import Family

# How much of two names must agree, for the one to be called near the other.
_ALIKE = 0.75


class Refusal(NamedTuple):
    """Encoders that are not expedited.

    Attributes:
        classes: names of classes, or of those that they inherit from.
        reason: why not; the end of a sentence that begins with the class.
    """

    classes: tuple[str, ...]
    reason: str


#: What is known to gain nothing, or to work in another way than any family.
REFUSALS = (
    Refusal(
        ("SegformerModel", "GLPNModel", "MixVisionTransformer", "EfficientVitMit"),
        "has few tokens in its deep stages already, and convolutions in its MLPs, which need the "
        "whole grid",
    ),
    Refusal(
        ("PvtModel", "PvtV2Model", "PvtV2Backbone", "PyramidVisionTransformerV2", "Twins"),
        "has few tokens in its deep stages already, and its attention reads a convolved grid",
    ),
    Refusal(
        ("HieraModel", "HieraBackbone", "Hiera", "HieraDet", "Sam2HieraDetModel"),
        "pools its tokens from stage to stage, in an order of its own: what is left to gain lies "
        "in one short stage",
    ),
    Refusal(
        ("MViT", "MultiScaleVit", "DaVit", "MaxVit", "MaxxVit", "TinyVit", "CvtModel")
        + ("MobileViTModel", "MobileViTV2Model", "EfficientFormer", "CoaT"),
        "mixes its tokens by pooling or convolution on the whole grid",
    ),
    Refusal(
        ("DinatBackbone", "DinatModel"),
        "attends to the neighbours of each token, which clusters do not have",
    ),
    Refusal(
        ("RTDetrModel", "RTDetrV2Model", "DFineModel", "Deimv2Model", "EdgeTamModel")
        + ("InternImage",),
        "has a convolutional encoder: its attention is in layers of few tokens",
    ),
    Refusal(
        ("DetrModel", "ConditionalDetrModel", "DabDetrModel", "DeformableDetrModel")
        + ("TableTransformerModel",),
        "has a convolutional backbone, which takes most of its time",
    ),
    Refusal(
        ("LwDetrViTEncoder", "LwDetrViTBackbone"),
        "has its windows in the batch axis, and no module before its blocks is told their rows and "
        "columns",
    ),
    Refusal(
        ("Swin2SRModel",),
        "restores every pixel: convolutions between its groups of blocks need the whole map",
    ),
    Refusal(
        ("ViTMAEModel",),
        "drops most of its patches at random, so that the others lie on no grid",
    ),
    Refusal(
        ("Siglip2VisionModel",),
        "takes sequences of patches, padded to one length, of images whose rows and columns differ",
    ),
    Refusal(
        ("SwinTransformerV2Cr",),
        "has norms on its main branch at the ends of its stages, so that what blocks add to a "
        "token cannot be told",
    ),
)


def why_not(model: nn.Module, families: Iterable[Family]) -> str:
    """Returns the sentence by which a model without a known encoder is refused."""
    name = type(model).__name__
    for module in model.modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        for refusal in REFUSALS:
            if kinds & {*refusal.classes}:
                inner = type(module).__name__
                within = "" if module is model else f"in {name}, "
                return f"{within}{inner} {refusal.reason}: it cannot be expedited"
    start = f"{name} holds no encoder that can be expedited"
    classes = list(dict.fromkeys(type(module).__name__ for module in model.modules()))
    if not any(part in kind.lower() for kind in classes for part in ("attention", "attn")):
        return f"{start}: it has no attention, and so no tokens to reduce"
    known = {kind: family.name for family in families for kind in family.classes}
    alike = [pair for kind in classes if (pair := _nearest(kind, known)) is not None]
    near = f"the nearest family is {known[max(alike)[1]]}" if alike else "no family is near"
    return f"{start}, and {near}: families() lists all, register_family adds another"


def _nearest(name: str, known: Iterable[str]) -> tuple[float, str] | None:
    """Returns the known class whose name is most like another, and how much it is."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=_ALIKE)
    return (difflib.SequenceMatcher(None, found[0], name).ratio(), found[0]) if found else None

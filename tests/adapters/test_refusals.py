"""Models that are refused: the sentence says why nothing is gained, or which family is near."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

from expedite_d2 import expedite, families
from expedite_d2.adapters.refusals import REFUSALS
from expedite_d2.adapters.registry import find_encoder


def of_transformers(name: str) -> Callable[[], nn.Module]:
    model = getattr(transformers, name)
    return lambda: model(model.config_class())


# How to make each, and what the sentence must hold.
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    name: (of_transformers(name), reason)
    for name, reason in {
        "SegformerForSemanticSegmentation": "in Segf.*, SegformerModel has few tokens .*convolut",
        "GLPNForDepthEstimation": "GLPNModel has few tokens in its deep stages",
        "HieraModel": "^HieraModel pools its tokens",
        "Sam2Model": "in Sam2Model, Sam2HieraDetModel pools its tokens",
        "PvtV2Model": "PvtV2Model has few tokens",
        "MobileViTModel": "mixes its tokens by pooling or convolution",
        "DFineForObjectDetection": "DFineModel has a convolutional encoder",
        "RTDetrForObjectDetection": "RTDetrModel has a convolutional encoder",
        "EdgeTamModel": "EdgeTamModel has a convolutional encoder",
        "ConditionalDetrForObjectDetection": "ConditionalDetrModel has a convolutional backbone",
        "TableTransformerForObjectDetection": "TableTransformerModel has a convolutional backbone",
        "LwDetrForObjectDetection": "LwDetrViTBackbone has its windows in the batch axis",
        "Swin2SRModel": "restores every pixel",
        "ViTMAEModel": "drops most of its patches at random",
        "ConvNextModel": "holds no encoder that can be expedited: it has no attention",
        "Siglip2VisionModel": "takes sequences of patches, padded to one length",
    }.items()
}
REFUSED |= {
    "timm hiera": (lambda: timm.create_model("hiera_tiny_224"), "^Hiera pools its tokens"),
    "timm sam2": (lambda: timm.create_model("sam2_hiera_tiny"), "^HieraDet pools its tokens"),
    "timm relpos": (
        lambda: timm.create_model("vit_relpos_small_patch16_224"),
        "the nearest family is timm VisionTransformer",
    ),
    "timm cait": (lambda: timm.create_model("cait_xxs24_224"), "and no family is near: families"),
    "torchvision maxvit": (lambda: torchvision.models.maxvit_t(), "MaxVit mixes its tokens"),
    "torchvision mvit": (lambda: torchvision.models.video.mvit_v2_s(), "MViT mixes its tokens"),
    "torchvision mask r-cnn": (
        lambda: torchvision.models.detection.maskrcnn_resnet50_fpn(
            weights=None, weights_backbone=None
        ),
        "MaskRCNN holds no encoder that can be expedited: it has no attention",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_is_a_sentence_that_says_why(name: str) -> None:
    make, message = REFUSED[name]
    with torch.device("meta"):
        model = make()
    with pytest.raises(ValueError, match=message) as error:
        find_encoder(model)
    assert "\n" not in str(error.value) and len(str(error.value)) < 240


def test_no_refused_class_is_one_of_a_family() -> None:
    refused = {name for refusal in REFUSALS for name in refusal.classes}
    assert not refused & {name for family in families() for name in family.classes}


def test_a_known_encoder_counts_beside_a_refused_class() -> None:
    class Hiera(nn.Module):
        """A model of this name around a ViT."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = timm.create_model("vit_tiny_patch16_224", img_size=64)

    expedite(Hiera().eval(), alpha=6, clusters=(2, 2))

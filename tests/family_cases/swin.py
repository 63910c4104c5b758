"""Tiny random Swins: their blocks attend within windows of a map, some of them in shifted ones."""

from __future__ import annotations

from typing import Any

import official_shaped
import timm
import torch
import torchvision
import video_swin_shaped
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2
from transformers import (
    MaskFormerSwinConfig,
    SwinConfig,
    SwinModel,
    Swinv2Config,
    Swinv2Model,
)
from transformers.models.maskformer.modeling_maskformer_swin import MaskFormerSwinModel

from family_cases.case import Case, randomised


class SwinCase(Case):
    size = (104, 150)  # 7x10 tokens in the third stage: ragged windows
    alpha, clusters = 4, (4, 4)
    others = [(96, 96), (70, 134)]

    def blocks(self, model: Any) -> list[nn.Module]:
        return [block for stage in model.layers for block in stage.blocks]

    def run(self, model: Any, x: Tensor) -> Tensor:
        return model(x)["res4"]


SWIN = {"embed_dim": 16, "depths": [1, 1, 6, 1], "num_heads": [1, 2, 2, 4], "window_size": 6}


class TransformersSwinCase(SwinCase):
    def blocks(self, model: Any) -> list[nn.Module]:
        return [block for stage in model.encoder.layers for block in stage.blocks]

    def run(self, model: Any, x: Tensor) -> Tensor:
        return model(x).last_hidden_state


class SwinModelCase(TransformersSwinCase):
    def run(self, model: Any, x: Tensor) -> Tensor:
        # As backbones call it: its windows are then no smaller on a small map.
        return model(x, always_partition=True).last_hidden_state


def calmed(model: Any) -> Any:
    """The model with weights so small that tokens keep their nearest centres in half types."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "relative_position" not in name:
                parameter.mul_(0.6)
    return model


def transformers_swin(model: Any, config: Any, **changes: Any) -> Any:
    # Windows of SwinV2 are no larger than a stage's map of the configured image.
    settings = {**SWIN, "image_size": 768, "drop_path_rate": 0.0, **changes}
    return calmed(randomised(model, config(**settings), add_pooling_layer=False))


class TorchvisionCase(SwinCase):
    size = (104, 152)
    others = [(96, 96), (72, 136)]

    def blocks(self, model: Any) -> list[nn.Module]:
        return [block for stage in model.features[1::2] for block in stage]

    def run(self, model: Any, x: Tensor) -> Tensor:
        return model(x)


class ClipCase(TorchvisionCase):
    def blocks(self, model: Any) -> list[nn.Module]:
        return [block for stage in model.features[::2] for block in stage]

    def run(self, model: Any, x: Tensor) -> Tensor:
        # As many frames as a window has, as those of the family's `run`.
        return model(torch.stack([x.roll(3 * frame, 3) for frame in range(4)], 2))


class VideoSwinCase(ClipCase):
    def blocks(self, model: Any) -> list[nn.Module]:
        return [block for stage in model.layers for block in stage.blocks]


class TimmCase(TorchvisionCase):
    def blocks(self, model: Any) -> list[nn.Module]:
        return [block for stage in model.layers for block in stage.blocks]


class TimmFeaturesCase(TorchvisionCase):
    def blocks(self, model: Any) -> list[nn.Module]:
        return [block for stage in list(model.children())[1:] for block in stage.blocks]

    def run(self, model: Any, x: Tensor) -> Tensor:
        return model(x)[-1]


THREE_STAGES = {"embed_dim": 16, "depths": [1, 1, 6], "num_heads": [1, 2, 2]}


def torchvision_swin(kind: Any, window: list[int], **settings: Any) -> Any:
    """Without the classifier: its output is the last map."""

    sizes = {"window_size": window, "stochastic_depth_prob": 0.0, **THREE_STAGES, **settings}

    def build() -> nn.Module:
        model = kind([2, 4, 4][-len(window) :], **sizes)
        for name in ("avgpool", "flatten", "head"):
            setattr(model, name, nn.Identity())
        return model

    return calmed(randomised(build))


def timm_swin(kind: Any, **settings: Any) -> Any:
    settings = {"window_size": 6, "img_size": (104, 152), **settings}
    return calmed(
        randomised(
            kind, **THREE_STAGES, **settings, num_classes=0, global_pool="", drop_path_rate=0.0
        )
    )


def timm_features() -> Any:
    """Of an encoder of one size, with oblong windows."""
    return calmed(
        randomised(
            timm.create_model,
            "swin_tiny_patch4_window7_224",
            **THREE_STAGES,
            features_only=True,
            out_indices=(1, 2),
            window_size=(6, 8),
            img_size=(104, 152),
            drop_path_rate=0.0,
        )
    )


CASES: dict[str, Case] = {
    "official swin": SwinCase(lambda: randomised(official_shaped.SwinTransformer)),
    "transformers swin": SwinModelCase(lambda: transformers_swin(SwinModel, SwinConfig)),
    "transformers swin, eager": SwinModelCase(
        lambda: transformers_swin(SwinModel, SwinConfig, attn_implementation="eager")
    ),
    "transformers maskformer swin": TransformersSwinCase(
        lambda: transformers_swin(MaskFormerSwinModel, MaskFormerSwinConfig)
    ),
    "transformers swin v2": TransformersSwinCase(
        lambda: transformers_swin(Swinv2Model, Swinv2Config, pretrained_window_sizes=[0, 0, 4, 0]),
        # Padding makes NaN of transformers' own SwinV2 in float16.
        size=(192, 192),
        others=[(104, 150), (70, 134)],
    ),
    "torchvision swin": TorchvisionCase(
        lambda: torchvision_swin(torchvision.models.SwinTransformer, [6, 6])
    ),
    "torchvision swin v2": TorchvisionCase(
        lambda: torchvision_swin(
            torchvision.models.SwinTransformer,
            [6, 4],
            block=SwinTransformerBlockV2,
            downsample_layer=PatchMergingV2,
        ),
        clusters=(4, 3),
        compiled=False,
        # Padding makes NaN of torchvision's own in float16.
        size=(96, 128),
        others=[(104, 152), (72, 136)],
    ),
    "torchvision swin3d": ClipCase(
        lambda: torchvision_swin(torchvision.models.video.SwinTransformer3d, [2, 6, 6])
    ),
    "video swin": VideoSwinCase(
        lambda: calmed(randomised(video_swin_shaped.SwinTransformer3D)),
        others=[(96, 96), (70, 134)],
        compiled=False,
    ),
    "timm swin": TimmCase(lambda: timm_swin(SwinTransformer, dynamic_img_size=True)),
    "timm swin v2": TimmCase(
        lambda: timm_swin(
            SwinTransformerV2, dynamic_img_size=True, pretrained_window_sizes=(0, 0, 4)
        ),
        size=(96, 192),
        others=[(104, 152), (72, 136)],
    ),
    "timm swin features": TimmFeaturesCase(
        timm_features, clusters=(4, 5), others=[], compiled=False
    ),
}

# Of two stages, for what takes long.
TWO_STAGES = {"depths": [1, 3], "num_heads": [1, 2]}
SHALLOW: dict[str, Case] = {
    "official swin": SwinCase(
        lambda: randomised(official_shaped.SwinTransformer, **TWO_STAGES),
        alpha=2,
        run=lambda model, x: model(x)["res3"],
    ),
    "transformers swin v2": TransformersSwinCase(
        lambda: transformers_swin(
            Swinv2Model, Swinv2Config, **TWO_STAGES, pretrained_window_sizes=[0, 4]
        ),
        alpha=2,
    ),
}

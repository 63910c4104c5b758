"""Models of transformers with random weights, at their own sizes and tiny ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SamConfig,
    SamModel,
    SwinConfig,
)

Settings = dict[str, Any]


class Other(NamedTuple):
    """A model of another library.

    Attributes:
        title: its name for people.
        side: of its square images, and that of the tiny one's.
        build: makes it, or a tiny one, with random weights.
        inputs: what it takes beside so many images.
        parts: modules that are timed by themselves, too, and take images alone.
    """

    title: str
    side: tuple[int, int]
    build: Callable[[bool], nn.Module]
    inputs: Callable[[int], dict[str, Tensor]] = lambda batch: {}
    parts: tuple[str, ...] = ()


def mask2former(tiny: bool) -> nn.Module:
    swin: Settings = dict(embed_dim=192, depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48])
    swin |= dict(window_size=12, image_size=384)
    heads: Settings = dict(num_queries=200, num_labels=133)
    if tiny:
        swin |= dict(embed_dim=16, depths=[1, 1, 12, 1], num_heads=[1, 1, 2, 2])
        swin |= dict(window_size=4, image_size=128)
        heads |= dict(num_queries=5, num_attention_heads=4, encoder_layers=1, decoder_layers=2)
        heads |= dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), 32)
        heads |= dict(encoder_feedforward_dim=32, dim_feedforward=32)
    stages = [f"stage{number}" for number in (1, 2, 3, 4)]
    build_backbone: Any = SwinConfig  # one of its keywords is not in its signature
    backbone = build_backbone(**swin, out_features=stages)
    # Without auxiliary losses its forward pass fails.
    config = Mask2FormerConfig(backbone_config=backbone, use_auxiliary_loss=True, **heads)
    return Mask2FormerForUniversalSegmentation(config)


def depth_anything(tiny: bool) -> nn.Module:
    vit: Settings = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16)
    vit |= dict(image_size=518, out_indices=[5, 12, 18, 24])
    head: Settings = dict(reassemble_hidden_size=1024, fusion_hidden_size=256)
    head |= dict(neck_hidden_sizes=[256, 512, 1024, 1024])
    if tiny:
        vit = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=2)
        vit |= dict(image_size=112, out_indices=[1, 2, 3, 4])
        head = dict(reassemble_hidden_size=32, fusion_hidden_size=8, neck_hidden_sizes=[8] * 4)
    backbone = Dinov2Config(**vit, patch_size=14, reshape_hidden_states=False)
    return DepthAnythingForDepthEstimation(DepthAnythingConfig(backbone_config=backbone, **head))


def sam(tiny: bool) -> nn.Module:
    # As it is, random weights would be so small that their products are denormal numbers.
    vision: Settings = dict(initializer_range=0.02)
    if not tiny:
        return SamModel(SamConfig(vision_config=vision))
    vision |= dict(image_size=128, hidden_size=32, num_hidden_layers=4, num_attention_heads=2)
    vision |= dict(window_size=6, global_attn_indexes=[3], output_channels=32, num_pos_feats=16)
    prompts: Settings = dict(image_size=128, image_embedding_size=8, hidden_size=32)
    decoder: Settings = dict(hidden_size=32, mlp_dim=32, iou_head_hidden_dim=32)
    return SamModel(
        SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    )


def dinov3(tiny: bool) -> nn.Module:
    vit: Settings = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24)
    vit |= dict(num_attention_heads=16, image_size=512)
    if tiny:
        vit = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4)
        vit |= dict(num_attention_heads=2, image_size=128)
    return DINOv3ViTModel(DINOv3ViTConfig(**vit, patch_size=16, num_register_tokens=4))


def one_point(batch: int) -> dict[str, Tensor]:
    """One point of one object in each image."""
    labels = torch.ones(batch, 1, 1, dtype=torch.long)
    return {"input_points": torch.full((batch, 1, 1, 2), 32.0), "input_labels": labels}


OTHERS = {
    "mask2former": Other("Mask2Former Swin-L", (1024, 128), mask2former),
    "depth_anything": Other("Depth Anything V2-L", (518, 112), depth_anything),
    "sam": Other("SAM ViT-B", (1024, 128), sam, one_point, ("vision_encoder",)),
    "dinov3": Other("DINOv3 ViT-L", (512, 128), dinov3),
}

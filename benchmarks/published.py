"""A published model of each family of encoders, from its library's classes, without weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def on_meta(family: str) -> nn.Module:
    """Makes the published model of a family, or one of the same network, without memory."""
    make = MODELS[family]
    if isinstance(make, str):
        return on_meta(make)
    with torch.device("meta"):
        return make().eval()


def _timm(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: importlib.import_module("timm").create_model(name, **settings)


def _torchvision(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: importlib.import_module("torchvision.models").get_model(name, **settings)


def _segment_anything(name: str) -> Callable[[], nn.Module]:
    return lambda: importlib.import_module("segment_anything").sam_model_registry[name]()


def _transformers(name: str, **settings: Any) -> Callable[[], nn.Module]:
    """Makes a class of transformers from its configuration, with these settings in it."""

    def make() -> nn.Module:
        kind = getattr(importlib.import_module("transformers"), name)
        return kind(kind.config_class(**settings))

    return make


_LARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
_HUGE = {**_LARGE, "hidden_size": 1280, "num_hidden_layers": 32, "intermediate_size": 5120}
_SO400M = {**_HUGE, "hidden_size": 1152, "num_hidden_layers": 27, "intermediate_size": 4304}
_BASE = {**_LARGE, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
_DINOV2_LARGE = {**_LARGE, "image_size": 518, "patch_size": 14}
_SAM_HUGE = {**_HUGE, "mlp_dim": 5120, "global_attn_indexes": [7, 15, 23, 31]}
_SAM_LARGE = {**_LARGE, "mlp_dim": 4096, "global_attn_indexes": [5, 11, 17, 23]}
_SWIN_LARGE: dict[str, Any] = {
    "image_size": 384,
    "embed_dim": 192,
    "depths": [2, 2, 18, 2],
    "num_heads": [6, 12, 24, 48],
    "window_size": 12,
}
_SWIN_V2_LARGE = {**_SWIN_LARGE, "window_size": 24, "pretrained_window_sizes": [12, 12, 12, 6]}
_VITDET_BASE = {
    **_BASE,
    "image_size": 1024,
    "window_size": 14,
    "window_block_indices": [0, 1, 3, 4, 6, 7, 9, 10],
    "use_relative_position_embeddings": True,
}
_RF_DETR_BASE = {
    "hidden_size": 384,
    "num_attention_heads": 6,
    "image_size": 518,
    "window_block_indexes": [0, 1, 3, 4, 6, 7, 9, 10],
    "out_features": ["stage2", "stage5", "stage8", "stage11"],
}
_BEIT_LARGE = {**_LARGE, "image_size": 640, "use_relative_position_bias": True}

#: By name of the family; another family's name stands for a network that is the same, where no
#: package registry has the class.
MODELS: dict[str, Callable[[], nn.Module] | str] = {
    "timm VisionTransformer": _timm("vit_large_patch14_dinov2"),
    "timm NaFlexVit": _timm("naflexvit_so400m_patch16_siglip"),
    "timm Eva": _timm("vit_large_patch16_dinov3"),
    "timm Beit": _timm("beit_large_patch16_512"),
    "timm VisionTransformerSAM": _timm("samvit_base_patch16"),
    "timm SwinTransformer and SwinTransformerV2": _timm(
        "swin_large_patch4_window12_384", img_size=1024
    ),
    "timm features of SwinTransformer and SwinTransformerV2": _timm(
        "swinv2_large_window12to24_192to384", features_only=True
    ),
    "torchvision VisionTransformer": _torchvision("vit_l_16", image_size=512),
    "torchvision SwinTransformer": _torchvision("swin_v2_b"),
    "torchvision SwinTransformer3d": _torchvision("swin3d_b"),
    "transformers Dinov2Model": _transformers("Dinov2Backbone", **_DINOV2_LARGE),
    "transformers Dinov2WithRegistersModel": _transformers(
        "Dinov2WithRegistersModel", **_DINOV2_LARGE
    ),
    "transformers DINOv3ViTModel": _transformers("DINOv3ViTModel", **_LARGE, num_register_tokens=4),
    "transformers ViTModel": _transformers("ViTModel", **_LARGE, image_size=384),
    "transformers ViTMSNModel": _transformers("ViTMSNModel", **_LARGE),
    "transformers DeiTModel": _transformers(
        "DeiTModel", **_BASE | {"intermediate_size": 3072}, image_size=384
    ),
    "transformers IJepaModel": _transformers("IJepaModel", **_HUGE, patch_size=14),
    "transformers SiglipVisionModel": _transformers(
        "SiglipVisionModel", **_SO400M, image_size=384, patch_size=14
    ),
    "transformers CLIPVisionModel": _transformers(
        "CLIPVisionModel", **_LARGE, image_size=336, patch_size=14
    ),
    "transformers CLIPSegVisionModel": _transformers(
        "CLIPSegVisionModel", **_BASE | {"intermediate_size": 3072}, image_size=352, patch_size=16
    ),
    "transformers OwlViTVisionTransformer and Owlv2VisionTransformer": _transformers(
        "Owlv2VisionModel", **_LARGE, image_size=1008, patch_size=14
    ),
    "transformers PixioModel": _transformers("PixioModel"),
    "transformers Tipsv2VisionModel": _transformers(
        "Tipsv2VisionModel", **_LARGE, image_size=448, patch_size=14
    ),
    "transformers RadioModel": _transformers("RadioModel"),
    "transformers Sapiens2Model": _transformers("Sapiens2Model", image_size=[1024, 768]),
    "transformers DPTModel": _transformers("DPTModel", **_LARGE, image_size=384),
    "transformers VitPoseBackbone": _transformers("VitPoseBackbone", **_HUGE),
    "transformers BeitModel": _transformers("BeitModel", **_BEIT_LARGE),
    "transformers Data2VecVisionModel": _transformers(
        "Data2VecVisionModel", **{**_BEIT_LARGE, "image_size": 224}
    ),
    "transformers EomtForUniversalSegmentation": _transformers("EomtForUniversalSegmentation"),
    "transformers EomtDinov3ForUniversalSegmentation": _transformers(
        "EomtDinov3ForUniversalSegmentation"
    ),
    "transformers VideomtForUniversalSegmentation": _transformers(
        "VideomtForUniversalSegmentation"
    ),
    "transformers RfDetrDinov2Backbone": _transformers("RfDetrDinov2Backbone", **_RF_DETR_BASE),
    "transformers YolosModel": _transformers("YolosModel", image_size=[800, 1344]),
    "transformers SamVisionEncoder": _transformers("SamVisionModel", **_SAM_HUGE),
    "transformers SamHQVisionEncoder": _transformers("SamHQVisionModel", **_SAM_LARGE),
    "transformers Sam3ViTModel": _transformers("Sam3ViTModel"),
    "transformers VitDetModel and VitDetBackbone": _transformers("VitDetModel", **_VITDET_BASE),
    "transformers SwinModel": _transformers("SwinModel", **_SWIN_LARGE),
    "transformers MaskFormerSwinModel and DonutSwinModel": _transformers(
        "MaskFormerSwinModel", **_SWIN_LARGE
    ),
    "transformers Swinv2Model and Swinv2Backbone": _transformers("Swinv2Model", **_SWIN_V2_LARGE),
    "Segment Anything ImageEncoderViT": _segment_anything("vit_l"),
    "DINOv2 DinoVisionTransformer": "transformers Dinov2Model",
    "DINOv3 DinoVisionTransformer": "transformers DINOv3ViTModel",
    "Detectron2 ViT": "transformers VitDetModel and VitDetBackbone",
    "Mask2Former and Detectron2 SwinTransformer": "transformers SwinModel",
    "Video-Swin-Transformer SwinTransformer3D": "torchvision SwinTransformer3d",
}

"""What people should know of each family of encoders, beside what the registry tells by itself."""

from __future__ import annotations

from typing import NamedTuple

Size = tuple[int, int]


class Notes(NamedTuple):
    """A family's row on the page of models.

    Attributes:
        used_by: models that people have, whose encoder is of this family.
        title: the published model whose multiply-adds are counted: see `published`.
        size: height and width of its images in pixels; None for those that it is configured for, or
            512x512.
        restrictions: what the family takes alone, or not at all.
        within: where tokens are reduced together, if that is not the image or one of its windows.
    """

    used_by: str
    title: str
    size: Size | None = None
    restrictions: str = ""
    within: str = ""


_CONFIGURED = "images of the configured size"
_SQUARE = "as many rows as columns of clusters"
_STAGE = "one stage is reduced: to its end"
_QUERIES = "reduced until the queries join; images of the configured size"

NOTES = {
    "timm VisionTransformer": Notes(
        "ViT, DeiT, AugReg, CLIP, SigLIP, DINO, DINOv2, FlexiViT",
        "DINOv2 ViT-L/14",
        restrictions=f"{_CONFIGURED}, others with `dynamic_img_size`; grouped attention not in "
        "parallel blocks, or where norms follow",
    ),
    "timm NaFlexVit": Notes(
        "NaFlex ViT, SigLIP 2 NaFlex, C-RADIO",
        "SigLIP 2 so400m/16 NaFlex",
        restrictions="images, not patches; no patch dropout in training",
    ),
    "timm Eva": Notes(
        "EVA-02, DINOv3, Perception Encoder, RoPE-ViT",
        "DINOv3 ViT-L/16",
        (512, 512),
        "no patch dropout in training",
    ),
    "timm Beit": Notes(
        "BEiT, BEiT v2",
        "BEiT-L/16",
        restrictions=f"{_CONFIGURED}, others with `strict_img_size=False`",
    ),
    "timm VisionTransformerSAM": Notes(
        "SAM's image encoder, ViTDet of timm",
        "SAM ViT-B",
        restrictions=f"{_SQUARE}; no rotary positions",
    ),
    "timm SwinTransformer and SwinTransformerV2": Notes(
        "Swin, Swin-S3, SwinV2",
        "Swin-L",
        restrictions=f"{_CONFIGURED}, others with `strict_img_size=False`; {_STAGE}",
    ),
    "timm features of SwinTransformer and SwinTransformerV2": Notes(
        "the same with `features_only=True`, for dense heads",
        "SwinV2-L",
        restrictions=f"{_CONFIGURED}, others with `strict_img_size=False`; {_STAGE}",
    ),
    "torchvision VisionTransformer": Notes("ViT, SWAG", "SWAG ViT-L/16", restrictions=_CONFIGURED),
    "torchvision SwinTransformer": Notes("Swin, SwinV2", "SwinV2-B", (256, 256), _STAGE),
    "torchvision SwinTransformer3d": Notes(
        "Video Swin", "Video Swin-B, 16 frames", (224, 224), _STAGE, "in each frame"
    ),
    "transformers Dinov2Model": Notes(
        "DINOv2, Depth Anything V1 and V2, Prompt Depth Anything, DPT on DINOv2",
        "Depth Anything V2's ViT-L/14",
    ),
    "transformers Dinov2WithRegistersModel": Notes(
        "DINOv2 with registers", "DINOv2 ViT-L/14 with registers"
    ),
    "transformers DINOv3ViTModel": Notes("DINOv3, CHMv2", "DINOv3 ViT-L/16", (512, 512)),
    "transformers ViTModel": Notes("ViT, DINO", "ViT-L/16"),
    "transformers ViTMSNModel": Notes("MSN", "MSN ViT-L/16"),
    "transformers DeiTModel": Notes("DeiT", "DeiT-B/16, distilled"),
    "transformers IJepaModel": Notes("I-JEPA", "I-JEPA ViT-H/14"),
    "transformers SiglipVisionModel": Notes("SigLIP, SigLIP 2", "SigLIP so400m/14"),
    "transformers CLIPVisionModel": Notes("CLIP", "CLIP ViT-L/14"),
    "transformers CLIPSegVisionModel": Notes("CLIPSeg", "CLIPSeg, ViT-B/16"),
    "transformers OwlViTVisionTransformer and Owlv2VisionTransformer": Notes(
        "OWL-ViT, OWLv2", "OWLv2 ViT-L/14"
    ),
    "transformers PixioModel": Notes("Pixio, DPT on Pixio", "Pixio-H/16"),
    "transformers Tipsv2VisionModel": Notes("TIPSv2, TIPSv2-DPT", "TIPSv2 ViT-L/14"),
    "transformers RadioModel": Notes(
        "C-RADIO", "C-RADIOv4-H", (512, 512), "images of one size, no packed patches"
    ),
    "transformers Sapiens2Model": Notes(
        "Sapiens2: pose, segmentation, normals, pointmaps, matting", "Sapiens2-0.4B"
    ),
    "transformers DPTModel": Notes("DPT (ViT and hybrid), MiDaS", "DPT-Large"),
    "transformers VitPoseBackbone": Notes(
        "ViTPose, ViTPose++", "ViTPose-H", restrictions=_CONFIGURED
    ),
    "transformers BeitModel": Notes(
        "BEiT, DPT on BEiT, MiDaS 3.1, ZoeDepth", "BEiT-L/16 of UPerNet"
    ),
    "transformers Data2VecVisionModel": Notes("data2vec for images", "data2vec's ViT-L/16"),
    "transformers EomtForUniversalSegmentation": Notes("EoMT", "EoMT-L", restrictions=_QUERIES),
    "transformers EomtDinov3ForUniversalSegmentation": Notes(
        "EoMT on DINOv3", "EoMT-L on DINOv3", restrictions=_QUERIES
    ),
    "transformers VideomtForUniversalSegmentation": Notes(
        "VidEoMT", "VidEoMT-L, one frame", restrictions=_QUERIES
    ),
    "transformers RfDetrDinov2Backbone": Notes(
        "RF-DETR, RF-DETR-Seg",
        "RF-DETR-Base",
        (560, 560),
        "square images of whole windows",
        "each of 4x4 windows",
    ),
    "transformers YolosModel": Notes("YOLOS", "YOLOS-B"),
    "transformers SamVisionEncoder": Notes(
        "SAM, MedSAM, SlimSAM", "SAM ViT-H", restrictions=f"{_SQUARE}; {_CONFIGURED}"
    ),
    "transformers SamHQVisionEncoder": Notes(
        "SAM-HQ", "SAM-HQ ViT-L", restrictions=f"{_SQUARE}; {_CONFIGURED}"
    ),
    "transformers Sam3ViTModel": Notes("SAM 3", "SAM 3", restrictions=f"{_SQUARE}; square images"),
    "transformers VitDetModel and VitDetBackbone": Notes(
        "ViTDet, ViTMatte", "ViTDet-B", restrictions=_SQUARE
    ),
    "transformers SwinModel": Notes(
        "Mask2Former, OneFormer, UperNet, Grounding DINO, DPT on Swin",
        "Mask2Former's Swin-L",
        (1024, 1024),
        f"{_SQUARE}; {_STAGE}",
    ),
    "transformers MaskFormerSwinModel and DonutSwinModel": Notes(
        "MaskFormer, Donut", "MaskFormer's Swin-L", (640, 640), f"{_SQUARE}; {_STAGE}"
    ),
    "transformers Swinv2Model and Swinv2Backbone": Notes(
        "SwinV2, DPT on SwinV2", "DPT's SwinV2-L", restrictions=f"{_SQUARE}; {_STAGE}"
    ),
    "Segment Anything ImageEncoderViT": Notes(
        "SAM, SAM-HQ, MedSAM and other copies of the file",
        "SAM ViT-L",
        restrictions=f"{_SQUARE}; {_CONFIGURED}; not EfficientSAM's class of this name",
    ),
    "DINOv2 DinoVisionTransformer": Notes(
        "DINOv2, Depth Anything V2, and other copies of the file", "DINOv2 ViT-L/14"
    ),
    "DINOv3 DinoVisionTransformer": Notes(
        "DINOv3",
        "DINOv3 ViT-L/16",
        (512, 512),
        "grouped attention in training only without drop path",
    ),
    "Detectron2 ViT": Notes("ViTDet", "ViTDet-B", restrictions=_SQUARE),
    "Mask2Former and Detectron2 SwinTransformer": Notes(
        "Mask2Former, MaskDINO, OneFormer, detrex, and other copies of the file",
        "Mask2Former's Swin-L",
        (1024, 1024),
        f"{_SQUARE}; {_STAGE}",
    ),
    "Video-Swin-Transformer SwinTransformer3D": Notes(
        "Video Swin, and other copies of the file",
        "Video Swin-B, 16 frames",
        (224, 224),
        _STAGE,
        "in each frame",
    ),
}

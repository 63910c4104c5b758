"""Tiny random ViTs of maps: windowed and global blocks, decomposed or rotary positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from official_shaped import Detectron2ViT
from segment_anything.modeling import ImageEncoderViT
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn
from transformers import Sam3ViTConfig, Sam3ViTModel, SamVisionConfig, VitDetConfig
from transformers.models.sam.modeling_sam import SamVisionEncoder
from transformers.models.sam_hq.configuration_sam_hq import SamHQVisionConfig
from transformers.models.sam_hq.modeling_sam_hq import SamHQVisionEncoder
from transformers.models.vitdet.modeling_vitdet import VitDetBackbone, VitDetModel

from family_cases.case import Case, randomised


def with_positions(build: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A random model whose tables of positions are large enough that a wrong one shows."""
    model = randomised(build, *args, **kwargs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "rel_pos" in name:
                parameter.copy_(torch.randn(parameter.shape))
    return model


class MapCase(Case):
    """8x10 tokens in 6x6 windows: the last ones are ragged."""

    alpha, clusters = 1, (3, 3)


class Detectron2Case(MapCase):
    def run(self, model: Any, x: Tensor) -> Tensor:
        return model(x)["last_feat"]


class SamCase(MapCase):
    """It takes images of one size alone."""

    size = (32, 32)
    others: list[tuple[int, int]] = []


class TransformersCase(SamCase):
    def blocks(self, model: Any) -> list[nn.Module]:
        return list(model.layers)

    def run(self, model: Any, x: Tensor) -> Tensor:
        return model(x).last_hidden_state


class SamHQCase(TransformersCase):
    """Its decoder reads the global blocks, too."""

    def run(self, model: Any, x: Tensor) -> Tensor:
        out = model(x)
        between = [features.permute(0, 3, 1, 2) for features in out.intermediate_embeddings]
        return torch.cat([out.last_hidden_state, *between], 1)


class VitDetCase(MapCase):
    def blocks(self, model: Any) -> list[nn.Module]:
        return list(model.encoder.layer)

    def run(self, model: Any, x: Tensor) -> Tensor:
        return model(x).last_hidden_state


class VitDetBackboneCase(VitDetCase):
    """Two of its layers are read, one inside the span."""

    def run(self, model: Any, x: Tensor) -> Tensor:
        return torch.cat(model(x).feature_maps, 1)


#: Four blocks, of which the first and the last attend among all tokens.
SAM: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "mlp_ratio": 2.0,
    "window_size": 6,
    "global_attn_indexes": [0, 3],
    "output_channels": 8,
}


def sam(**changes: Any) -> Any:
    return with_positions(SamVisionEncoder, SamVisionConfig(**{**SAM, **changes}))


def sam_hq() -> Any:
    return with_positions(SamHQVisionEncoder, SamHQVisionConfig(**SAM))


def segment_anything(**changes: Any) -> Any:
    return with_positions(
        ImageEncoderViT,
        img_size=32,
        patch_size=4,
        embed_dim=16,
        depth=4,
        num_heads=2,
        mlp_ratio=2,
        out_chans=8,
        use_rel_pos=True,
        window_size=6,
        global_attn_indexes=(0, 3),
        **changes,
    )


def timm_sam(**changes: Any) -> Any:
    return with_positions(
        VisionTransformerSAM,
        img_size=32,
        patch_size=4,
        num_classes=0,
        embed_dim=16,
        depth=4,
        num_heads=2,
        mlp_ratio=2,
        neck_chans=8,
        window_size=6,
        global_attn_indexes=(0, 3),
        global_pool="",
        **{"use_rel_pos": True, **changes},
    )


def timm_sam_eager() -> Any:
    model = timm_sam()
    for block in model.blocks:
        block.attn.fused_attn = False
    return model


SAM_3: dict[str, Any] = {
    "image_size": 32,
    "pretrain_image_size": 16,
    "patch_size": 4,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "window_size": 6,
    "global_attn_indexes": [0, 3],
}


def sam_3(**changes: Any) -> Any:
    return randomised(Sam3ViTModel, Sam3ViTConfig(**{**SAM_3, **changes}))


VITDET: dict[str, Any] = {
    "image_size": 32,
    "pretrain_image_size": 16,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "mlp_ratio": 2,
    "window_size": 6,
    "window_block_indices": [1, 2],
    "residual_block_indices": [2],
    "use_relative_position_embeddings": True,
}


def vitdet(build: Callable[..., Any] = VitDetModel, **changes: Any) -> Any:
    return with_positions(build, VitDetConfig(**{**VITDET, **changes}))


CASES: dict[str, Case] = {
    "detectron2 vit": Detectron2Case(lambda: randomised(Detectron2ViT)),
    "detectron2 vit, no positions": Detectron2Case(
        lambda: randomised(Detectron2ViT, use_rel_pos=False)
    ),
    "detectron2 vit, global": Detectron2Case(
        lambda: randomised(Detectron2ViT, window_block_indexes=())
    ),
    "segment_anything": SamCase(segment_anything, compiled=False),
    "timm sam": MapCase(timm_sam, compiled=False),
    "timm sam, eager": MapCase(timm_sam_eager, compiled=False),
    "transformers sam": TransformersCase(sam, pickles=False),
    "transformers sam, eager": TransformersCase(
        lambda: sam(attn_implementation="eager"), pickles=False, compiled=False
    ),
    "transformers sam hq": SamHQCase(sam_hq, pickles=False, compiled=False),
    "transformers sam 3": TransformersCase(sam_3, pickles=False),
    "transformers vitdet": VitDetCase(vitdet),
    "transformers vitdet backbone": VitDetBackboneCase(
        lambda: vitdet(VitDetBackbone, out_features=["stage2", "stage4"]), compiled=False
    ),
}

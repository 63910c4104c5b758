"""Tiny random ViTs with rotary positions, encoders that queries join, and windows in the batch."""

from __future__ import annotations

from typing import Any

import torch
from dinov3_shaped import DinoVisionTransformer
from timm.layers.pos_embed_sincos import get_mixed_freqs
from timm.models.eva import Eva
from torch import Tensor, nn

from family_cases.case import Case, randomised
from family_cases.plain import (
    SIZE,
    DinoCase,
    Dinov2Case,
    NaFlexCase,
    TransformersCase,
    from_transformers,
    timm_naflex,
)

Grid = tuple[int, int]


class Dinov3Case(Dinov2Case):
    prefixes = 3

    def blocks(self, model: Any) -> list[nn.Module]:
        return list(model.model.layer)

    def block(self, model: Any, number: int, x: Tensor, cells: Grid | None) -> Tensor:
        # Its coordinates are shares of the image: those of cells are those of so many patches.
        rows, columns = cells or self.grid
        table = model.rope_embeddings(x.new_empty(1, 3, rows * self.patch, columns * self.patch))
        return model.model.layer[number](x, position_embeddings=table)

    def normalised(self, model: Any, x: Tensor) -> Tensor:
        return model.norm(x)


class BackboneCase(Dinov3Case):
    pickles = False  # because of the hooks by which transformers records its outputs
    compiled = False  # as the model is

    def run(self, model: Any, x: Tensor) -> Tensor:
        return model(x).feature_maps[-1]


class OfficialDinov3Case(DinoCase):
    prefixes = 3

    def blocks(self, model: Any) -> list[nn.Module]:
        return list(model.blocks)

    def embed(self, model: Any, x: Tensor) -> Tensor:
        return model.prepare_tokens_with_masks(x)[0]

    def block(self, model: Any, number: int, x: Tensor, cells: Grid | None) -> Tensor:
        rows, columns = cells or self.grid
        return model.blocks[number](x, model.rope_embed(H=rows, W=columns))


def table_of_cells(rope: Any, number: int, grid: Grid, cells: Grid | None) -> Tensor:
    """What one of timm's modules says at the centres of cells: (..., h * w, 2 d)."""
    kind = type(rope).__name__
    if kind == "RotaryEmbeddingDinoV3" or cells is None:  # places are shares of the image
        table = rope.get_embed(shape=cells or grid)
        return table[number] if kind == "RotaryEmbeddingMixed" else table
    if kind == "RotaryEmbeddingMixed":
        rows, columns = (
            (torch.arange(count) + 0.5) * tokens / count - 0.5
            for tokens, count in zip(grid, cells, strict=True)
        )
        y, x = torch.cartesian_prod(rows, columns).unbind(1)
        return get_mixed_freqs(rope.freqs, x, y)[number]
    # Row i of H is at i / H of a reference: of a grid of 2 h H rows, some are at the centres.
    assert kind == "RotaryEmbeddingCat" and rope.ref_feat_shape is not None
    fine = (2 * cells[0] * grid[0], 2 * cells[1] * grid[1])
    rows, columns = (
        2 * tokens * torch.arange(count) + tokens - count
        for tokens, count in zip(grid, cells, strict=True)
    )
    return rope.get_embed(shape=fine).unflatten(0, fine)[rows][:, columns].flatten(0, 1)


class EvaCase(Case):
    def embed(self, model: Any, x: Tensor) -> Tensor:
        return model.norm_pre(model._pos_embed(model.patch_embed(x))[0])

    def block(self, model: Any, number: int, x: Tensor, cells: Grid | None) -> Tensor:
        table = table_of_cells(model.rope, number, self.grid, cells)
        return model.blocks[number](x, rope=table)


class RotaryNaFlexCase(NaFlexCase):
    block = EvaCase.block


class EomtCase(Case):
    """Three layers, and one after the queries joined."""

    size, others = (32, 32), []
    prefixes = 3
    pickles = False  # because of the hooks by which transformers records its outputs
    compiled = False  # not even plain: it asks for the values of a buffer

    def blocks(self, model: Any) -> list[nn.Module]:
        return list(model.layers)

    def run(self, model: Any, x: Tensor) -> Tensor:
        return model(x).masks_queries_logits


class VideomtCase(EomtCase):
    def run(self, model: Any, x: Tensor) -> Tensor:
        return model(x[:, None]).masks_queries_logits


class RfDetrCase(TransformersCase):
    """Of each image, 2 x 2 windows in the batch."""

    size, others = (48, 48), [(56, 56), (40, 40)]
    pickles = False  # because of the hooks by which transformers records its outputs

    @property
    def grid(self) -> Grid:
        rows, columns = super().grid
        return rows // 2, columns // 2

    def blocks(self, model: Any) -> list[nn.Module]:
        return list(model.encoder.layer)

    def embed(self, model: Any, x: Tensor) -> Tensor:
        return model.embeddings(x)

    def block(self, model: Any, number: int, x: Tensor, cells: Grid | None) -> Tensor:
        return model.encoder.layer[number](x, None)

    def normalised(self, model: Any, x: Tensor) -> Tensor:
        maps = model.layernorm(x)[:, 1:].view(-1, 2, 2, *self.grid, 16)
        return maps.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def run(self, model: Any, x: Tensor) -> Tensor:
        return model(x).feature_maps[-1]


def transformers_dinov3(name: str = "DINOv3ViTModel", **changes: Any) -> Any:
    settings = {"num_register_tokens": 2, "pos_embed_rescale": None, **changes}
    return from_transformers(name, None, **settings)


def sapiens2(name: str = "Sapiens2Model", **changes: Any) -> Any:
    """With fewer keys than queries in two of its four blocks."""
    settings: dict[str, Any] = {
        "num_key_value_attention_heads": 1,
        "num_first_full_attention_layers": 1,
        "num_last_full_attention_layers": 1,
    }
    return transformers_dinov3(name, **{**settings, **changes})


def timm_eva(**changes: Any) -> Any:
    settings: dict[str, Any] = {
        **{"img_size": 24, "patch_size": 4, "dynamic_img_size": True, "use_rot_pos_emb": True},
        **SIZE,
        **changes,
    }
    return randomised(Eva, **settings)


def eva02(**changes: Any) -> Any:
    settings = {"ref_feat_shape": (6, 6), "swiglu_mlp": True, "scale_mlp": True, **changes}
    return timm_eva(**settings)


def eomt(name: str, **changes: Any) -> Any:
    settings = {"num_queries": 5, "num_blocks": 1, "num_register_tokens": 2, "image_size": 32}
    model = from_transformers(f"{name}ForUniversalSegmentation", None, **{**settings, **changes})
    model.attn_mask_probs.zero_()  # as of a trained model: no masks
    return model


def rf_detr(**changes: Any) -> Any:
    settings = {"num_windows": 2, "image_size": 48, "out_indices": [2, 4], **changes}
    return from_transformers("RfDetrDinov2Backbone", None, **settings)


CASES: dict[str, Case] = {
    "transformers dinov3": Dinov3Case(transformers_dinov3),
    "transformers sapiens2": Dinov3Case(sapiens2),
    "dinov3": OfficialDinov3Case(lambda: randomised(DinoVisionTransformer)),
    "timm eva02": EvaCase(eva02),
    "timm eva, dinov3": EvaCase(
        lambda: timm_eva(
            rope_type="dinov3", rope_rotate_half=True, use_abs_pos_emb=False, num_reg_tokens=2
        ),
        prefixes=3,
        compiled=False,
    ),
    "timm eva, mixed": EvaCase(
        lambda: timm_eva(rope_type="mixed", rope_grid_indexing="xy", attn_type="rope")
    ),
    "transformers rf-detr": RfDetrCase(rf_detr, clusters=(2, 3)),
    "timm naflexvit, rotary": RotaryNaFlexCase(
        lambda: timm_naflex(rope_type="axial", rope_ref_feat_shape=(6, 6)), compiled=False
    ),
}
#: Those that `Case.by_hand` cannot step through to the end.
OTHERS: dict[str, Case] = {
    "transformers dinov3 backbone": BackboneCase(
        lambda: transformers_dinov3("DINOv3ViTBackbone", out_indices=[2, 4])
    ),
    "transformers eomt": EomtCase(lambda: eomt("Eomt", mlp_ratio=2)),
    "transformers eomt dinov3": EomtCase(lambda: eomt("EomtDinov3")),
    "transformers videomt": VideomtCase(lambda: eomt("Videomt", mlp_ratio=2)),
}

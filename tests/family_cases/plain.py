"""Tiny random ViTs: their blocks take a sequence and have no positions, or tables of biases."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torchvision
import transformers
from official_shaped import DinoVisionTransformer
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from family_cases.case import Case, randomised

SIZE = {"embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 0, "global_pool": ""}
CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 4,
}


def slow_bias(table: Tensor, window: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """BEiT's bias between cells, one pair after another: (1, heads, 1 + h * w, 1 + h * w)."""
    table = table.detach()
    rows, columns = window
    maps, (to_token, from_token, itself) = table[:-3].view(2 * rows - 1, -1, 2), table[-3:]

    def read(dy: float, dx: float) -> Tensor:
        total = torch.zeros(2)
        top, left = math.floor(dy), math.floor(dx)
        for y, x in itertools.product((top, top + 1), (left, left + 1)):
            weight = (1 - abs(dy - y)) * (1 - abs(dx - x))
            if weight > 0:
                total += weight * maps[y + rows - 1, x + columns - 1]
        return total

    places = list(itertools.product(range(cells[0]), range(cells[1])))
    bias = torch.empty(2, len(places) + 1, len(places) + 1)
    bias[:, 0, :] = to_token[:, None]
    bias[:, :, 0] = from_token[:, None]
    bias[:, 0, 0] = itself
    for i, (y, x) in enumerate(places):
        for j, (v, u) in enumerate(places):
            dy, dx = (y - v) * rows / cells[0], (x - u) * columns / cells[1]
            bias[:, 1 + i, 1 + j] = read(dy, dx)
    return bias[None]


class TimmBeitCase(Case):
    def embed(self, model: Any, x: Tensor) -> Tensor:
        x = torch.cat([model.cls_token.expand(len(x), -1, -1), model.patch_embed(x)], 1)
        return x if model.pos_embed is None else x + model.pos_embed

    def block(self, model: Any, number: int, x: Tensor, cells: tuple[int, int] | None) -> Tensor:
        block, shared = model.blocks[number], model.rel_pos_bias
        if cells is None:
            return block(x, shared_rel_pos_bias=None if shared is None else shared())
        bias = None
        if shared is not None:
            bias = slow_bias(shared.relative_position_bias_table, self.grid, cells)
        if block.attn.relative_position_bias_table is None:
            return block(x, shared_rel_pos_bias=bias)
        own = slow_bias(block.attn.relative_position_bias_table, self.grid, cells)
        block.attn._get_rel_pos_bias = lambda: own
        try:
            return block(x, shared_rel_pos_bias=bias)
        finally:
            del block.attn._get_rel_pos_bias


class TransformersCase(Case):
    def blocks(self, model: Any) -> list[nn.Module]:
        return list(model.layers)

    def embed(self, model: Any, x: Tensor) -> Tensor:
        return model.embeddings(x, interpolate_pos_encoding=True)

    def block(self, model: Any, number: int, x: Tensor, cells: tuple[int, int] | None) -> Tensor:
        return model.layers[number](x, None)

    def run(self, model: Any, x: Tensor) -> Tensor:
        return model(x, interpolate_pos_encoding=True).last_hidden_state

    def normalised(self, model: Any, x: Tensor) -> Tensor:
        return model.layernorm(x)


class DPTCase(TransformersCase):
    def blocks(self, model: Any) -> list[nn.Module]:
        return list(model.encoder.layer)

    def embed(self, model: Any, x: Tensor) -> Tensor:
        return model.embeddings(x).last_hidden_states

    def block(self, model: Any, number: int, x: Tensor, cells: tuple[int, int] | None) -> Tensor:
        return model.encoder.layer[number](x)

    def run(self, model: Any, x: Tensor) -> Tensor:
        return model(x).last_hidden_state


class TransformersBeitCase(TransformersCase):
    def embed(self, model: Any, x: Tensor) -> Tensor:
        return model.embeddings(x)

    def block(self, model: Any, number: int, x: Tensor, cells: tuple[int, int] | None) -> Tensor:
        layer, shared = model.layers[number], model.shared_position_bias
        if cells is None:
            mask = None if shared is None else shared(self.grid)
            return layer(x, attention_mask=mask, resolution=self.size)
        mask = None
        if shared is not None:
            mask = slow_bias(shared.relative_position_bias_table, self.grid, cells)
        if layer.relative_position_bias is None:
            return layer(x, attention_mask=mask)
        own = slow_bias(layer.relative_position_bias.relative_position_bias_table, self.grid, cells)
        layer.relative_position_bias.forward = lambda *args, **kwargs: own
        try:
            return layer(x, attention_mask=mask, resolution=self.size)
        finally:
            del layer.relative_position_bias.forward

    def run(self, model: Any, x: Tensor) -> Tensor:
        return model(x).last_hidden_state


class Data2VecCase(DPTCase):
    def embed(self, model: Any, x: Tensor) -> Tensor:
        return model.embeddings(x)[0]

    def block(self, model: Any, number: int, x: Tensor, cells: tuple[int, int] | None) -> Tensor:
        layer = model.encoder.layer[number]
        own = layer.attention.attention.relative_position_bias
        shared = model.encoder.relative_position_bias
        if cells is None:
            return layer(x, relative_position_bias=shared(self.grid), resolution=self.size)[0]
        bias = slow_bias(shared.relative_position_bias_table, self.grid, cells)
        table = slow_bias(own.relative_position_bias_table, self.grid, cells)
        own.forward = lambda *args, **kwargs: table
        try:
            return layer(x, relative_position_bias=bias, resolution=self.size)[0]
        finally:
            del own.forward

    def normalised(self, model: Any, x: Tensor) -> Tensor:
        return model.layernorm(x)


class YolosCase(DPTCase):
    suffixes = 5

    def embed(self, model: Any, x: Tensor) -> Tensor:
        return model.embeddings(x)

    def between(self, model: Any, number: int, x: Tensor, weights: Tensor | None) -> Tensor:
        positions = model.encoder.interpolation
        if positions is None or number == len(model.encoder.layer) - 1:
            return x
        first, image, last = self.split(positions(self.size)[number].expand(len(x), -1, -1))
        return x + torch.cat([first, image if weights is None else weights @ image, last], 1)

    def normalised(self, model: Any, x: Tensor) -> Tensor:
        return model.layernorm(x)


class SiglipCase(TransformersCase):
    prefixes = 0

    def blocks(self, model: Any) -> list[nn.Module]:
        return list(model.encoder.layers)

    def block(self, model: Any, number: int, x: Tensor, cells: tuple[int, int] | None) -> Tensor:
        return model.encoder.layers[number](x, None)

    def normalised(self, model: Any, x: Tensor) -> Tensor:
        return model.post_layernorm(x)


class ClipCase(SiglipCase):
    prefixes = 1

    def embed(self, model: Any, x: Tensor) -> Tensor:
        return model.pre_layrnorm(model.embeddings(x, interpolate_pos_encoding=True))

    def normalised(self, model: Any, x: Tensor) -> Tensor:
        return x


class OwlCase(ClipCase):
    def embed(self, model: Any, x: Tensor) -> Tensor:
        return model.pre_layernorm(model.embeddings(x, interpolate_pos_encoding=True))


class PixioCase(TransformersCase):
    prefixes = 3

    def embed(self, model: Any, x: Tensor) -> Tensor:
        return model.embeddings(x)

    def run(self, model: Any, x: Tensor) -> Tensor:
        return model(x).last_hidden_state


class Dinov2Case(DPTCase):
    def embed(self, model: Any, x: Tensor) -> Tensor:
        return model.embeddings(x)


class RadioCase(Dinov2Case):
    prefixes = 3

    def embed(self, model: Any, x: Tensor) -> Tensor:
        return model.embeddings(model.input_conditioner(x))

    def normalised(self, model: Any, x: Tensor) -> Tensor:
        return x


class VitPoseCase(Dinov2Case):
    size, others, patch = (64, 80), [], 8
    prefixes = 0
    pickles = False  # because of the hooks by which transformers records its outputs

    def run(self, model: Any, x: Tensor) -> Tensor:
        return model(x).feature_maps[-1]


class TorchvisionCase(Case):
    size, others = (32, 32), []

    def blocks(self, model: Any) -> list[nn.Module]:
        return list(model.encoder.layers)

    def embed(self, model: Any, x: Tensor) -> Tensor:
        x = torch.cat([model.class_token.expand(len(x), -1, -1), model._process_input(x)], 1)
        return x + model.encoder.pos_embedding

    def block(self, model: Any, number: int, x: Tensor, cells: tuple[int, int] | None) -> Tensor:
        return model.encoder.layers[number](x)

    def normalised(self, model: Any, x: Tensor) -> Tensor:
        return model.heads(model.encoder.ln(x)[:, 0])


class NaFlexCase(Case):
    prefixes = 2

    def embed(self, model: Any, x: Tensor) -> Tensor:
        return model._forward_embeds(x, None, None, None)["patches"]


class DinoCase(Case):
    def blocks(self, model: Any) -> list[nn.Module]:
        return [m for m in model.modules() if type(m).__name__ == "DinoBlock"]

    def embed(self, model: Any, x: Tensor) -> Tensor:
        return model.prepare_tokens_with_masks(x)

    def block(self, model: Any, number: int, x: Tensor, cells: tuple[int, int] | None) -> Tensor:
        return self.blocks(model)[number](x)

    def run(self, model: Any, x: Tensor) -> Tensor:
        return model(x, is_training=True)["x_prenorm"]

    def normalised(self, model: Any, x: Tensor) -> Tensor:
        return x


def timm_vit(cls: Any = VisionTransformer, **changes: Any) -> Any:
    settings = {"img_size": 24, "patch_size": 4, "dynamic_img_size": True, **SIZE, **changes}
    return randomised(cls, **settings)


def timm_beit(**changes: Any) -> Any:
    settings = {"img_size": (24, 32), "patch_size": 4, **SIZE, "init_values": 0.5, **changes}
    return randomised(Beit, **settings)


def timm_naflex(**changes: Any) -> Any:
    config = NaFlexVitCfg(
        patch_size=4, embed_dim=16, depth=4, num_heads=2, pos_embed_grid_size=(6, 6),
        class_token=True, reg_tokens=1, global_pool="", **changes,
    )  # fmt: skip
    return randomised(NaFlexVit, config, num_classes=0)


def torchvision_vit() -> Any:
    return randomised(torchvision.models.VisionTransformer, 32, 4, 4, 2, 16, 32, num_classes=16)


def from_transformers(name: str, pooling: bool | None = False, **changes: Any) -> Any:
    """A model of transformers; `pooling` is None for those that have no such argument."""
    model = getattr(transformers, name)
    arguments = {} if pooling is None else {"add_pooling_layer": pooling}
    return randomised(model, model.config_class(**{**CONFIG, **changes}), **arguments)


def transformers_vit(**changes: Any) -> Any:
    return from_transformers("ViTModel", **changes)


def transformers_beit(**changes: Any) -> Any:
    settings = {"use_mean_pooling": False, "drop_path_rate": 0.0, **changes}
    return from_transformers("BeitModel", **settings)


def transformers_dpt(**changes: Any) -> Any:
    return from_transformers("DPTModel", **changes)


def transformers_dinov2(name: str = "Dinov2Model", **changes: Any) -> Any:
    return from_transformers(name, None, **{"mlp_ratio": 2, **changes})


def owl(name: str) -> Any:
    """The vision encoder of an OWL, which is no model with a configuration of its own."""
    return from_transformers(f"{name}VisionModel", None).vision_model


def radio(**changes: Any) -> Any:
    settings = {"max_img_size": 64, "num_cls_tokens": 2, "num_registers": 1, **changes}
    return from_transformers("RadioModel", None, **{"mlp_ratio": 2.0, **settings})


def yolos(name: str = "YolosModel", pooling: bool | None = False, **changes: Any) -> Any:
    settings = {"image_size": [24, 32], "num_detection_tokens": 5, **changes}
    return from_transformers(name, pooling, **settings)


def vitpose(**changes: Any) -> Any:
    settings = {"image_size": [64, 80], "patch_size": [8, 8], "mlp_ratio": 2, **changes}
    return from_transformers("VitPoseBackbone", None, **settings)


CASES: dict[str, Case] = {
    "timm vit": Case(timm_vit),
    "timm vit, fixed size": Case(
        lambda: timm_vit(img_size=(32, 40), dynamic_img_size=False, class_token=False),
        prefixes=0,
        others=[],
    ),
    "timm vit, registers and pre-norm": Case(
        lambda: timm_vit(reg_tokens=2, pre_norm=True, no_embed_class=True), prefixes=3
    ),
    "timm vit, distilled": Case(
        lambda: timm_vit(VisionTransformerDistilled, global_pool="token"), prefixes=2
    ),
    "timm beit, own bias": TimmBeitCase(
        lambda: timm_beit(use_rel_pos_bias=True), size=(24, 32), others=[]
    ),
    "timm beit, shared bias": TimmBeitCase(
        lambda: timm_beit(use_shared_rel_pos_bias=True, use_abs_pos_emb=False),
        size=(24, 32),
        others=[],
    ),
    "timm naflexvit": NaFlexCase(timm_naflex),
    "torchvision vit": TorchvisionCase(torchvision_vit),
    "dinov2": DinoCase(lambda: randomised(DinoVisionTransformer)),
    "dinov2, registers and chunks": DinoCase(
        lambda: randomised(DinoVisionTransformer, num_register_tokens=2, block_chunks=2),
        prefixes=3,
    ),
    "transformers vit": TransformersCase(transformers_vit),
    "transformers msn": TransformersCase(lambda: from_transformers("ViTMSNModel", None)),
    "transformers deit": TransformersCase(lambda: from_transformers("DeiTModel"), prefixes=2),
    "transformers ijepa": TransformersCase(lambda: from_transformers("IJepaModel"), prefixes=0),
    "transformers siglip": SiglipCase(lambda: from_transformers("SiglipVisionModel", None)),
    "transformers clip": ClipCase(lambda: from_transformers("CLIPVisionModel", None)),
    "transformers dinov2": Dinov2Case(transformers_dinov2),
    "transformers dinov2, registers": Dinov2Case(
        lambda: transformers_dinov2("Dinov2WithRegistersModel", num_register_tokens=2), prefixes=3
    ),
    "transformers tipsv2": Dinov2Case(
        lambda: transformers_dinov2("Tipsv2VisionModel", num_register_tokens=2), prefixes=3
    ),
    "transformers clipseg": ClipCase(lambda: from_transformers("CLIPSegVisionModel", None)),
    "transformers owl": OwlCase(lambda: owl("OwlViT")),
    "transformers owl 2": OwlCase(lambda: owl("Owlv2"), compiled=False),
    "transformers pixio": PixioCase(
        lambda: from_transformers("PixioModel", None, n_cls_tokens=3, mlp_ratio=2)
    ),
    "transformers radio": RadioCase(radio),
    "transformers vitpose": VitPoseCase(vitpose),
    "transformers dpt": DPTCase(transformers_dpt),
    "transformers yolos": YolosCase(yolos),
    "transformers beit, no bias": TransformersBeitCase(
        lambda: transformers_beit(use_absolute_position_embeddings=True)
    ),
    "transformers data2vec": Data2VecCase(
        lambda: from_transformers(
            "Data2VecVisionModel",
            use_mean_pooling=False,
            drop_path_rate=0.0,
            use_relative_position_bias=True,
            use_shared_relative_position_bias=True,
        ),
        size=(24, 24),
        others=[],
        compiled=False,
    ),
    "transformers beit, both biases": TransformersBeitCase(
        lambda: transformers_beit(
            use_relative_position_bias=True, use_shared_relative_position_bias=True
        ),
        size=(24, 24),
        others=[],
    ),
}
CASES["timm vit, distilled"].run = lambda model, x: model.forward_features(x)  # type: ignore

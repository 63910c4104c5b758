"""transformers' plain ViTs and BEiT, each on its own or inside a model for a task."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from expedite_d2.adapters.family import BlockCall, Family, Positions, Size, refuse_masks
from expedite_d2.adapters.hourglass import Hourglass
from expedite_d2.adapters.override import Gate, Override
from expedite_d2.adapters.positions import Table
from expedite_d2.adapters.registry import register_family
from expedite_d2.adapters.relative_position import relative_bias
from expedite_d2.adapters.tokens import GridFromCall, TokenSequence


def sides(size: Any) -> Size:
    """Returns rows and columns of a size in a configuration, which may be one number."""
    rows, columns = (size, size) if isinstance(size, int) else size
    return rows, columns


def is_eager(encoder: Any) -> bool:
    """Whether an encoder was told to write out the matrices of its attention."""
    return encoder.config._attn_implementation == "eager"


def _grid(encoder: Any, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Size:
    # The embeddings of DPT's hybrid, SigLIP and CLIP have no separate module for patches.
    patches = getattr(encoder.embeddings, "patch_embeddings", encoder.embeddings)
    rows, columns = sides(patches.patch_size)
    return pixel_values.shape[-2] // rows, pixel_values.shape[-1] // columns


def configured_grid(encoder: Any) -> Size:
    """Returns rows and columns of the patches of the images that an encoder is configured for."""
    height, width = sides(encoder.config.image_size)
    rows, columns = sides(encoder.config.patch_size)
    return height // rows, width // columns


def _radio_grid(encoder: Any, pixel_values: Tensor, image_grid_hw: Tensor | None = None) -> Size:
    if image_grid_hw is not None:
        raise ValueError(
            "an expedited RadioModel takes images of one size, got packed patches (image_grid_hw)"
        )
    return _grid(encoder, pixel_values)


class _CallersMask(Gate):
    """Refuses a mask from the caller, once, before the encoder makes its own mask of it.

    Whatever mask the blocks are passed then has no effect; none of them need look at its values,
    which are unknown in a trace and take a synchronisation on a GPU.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__(encoder)
        names = list(inspect.signature(type(encoder).forward).parameters)[1:]  # without self
        self.place = names.index("attention_mask") if "attention_mask" in names else len(names)

    def look(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for mask in (*args[self.place :], kwargs.get("attention_mask")):
            # A padding mask, (B, N), is zero or non-zero in any type.
            padding = isinstance(mask, Tensor) and mask.dim() == 2
            refuse_masks(mask.bool() if padding else mask)


class _BesideMasks(Positions):
    """Blocks without positions, which may be passed a mask that has no effect."""

    def overrides(self, hourglass: Hourglass) -> list[Override]:
        return [_CallersMask(hourglass.encoder)]

    def run(self, call: BlockCall) -> Tensor:
        call = call.without_masks()
        return call.block.original(call.x, *call.args, **call.kwargs)


class _NoMasks(Positions):
    """Blocks without positions that take no mask: further tensors are about whole images."""

    def run(self, call: BlockCall) -> Tensor:
        return call.block.original(call.x, *call.args, **call.kwargs)


_GRID = GridFromCall(
    # Where the image becomes a sequence.
    place=lambda encoder, span: (encoder.embeddings, "forward"),
    read=_grid,
    onto=lambda out: out if isinstance(out, Tensor) else out.last_hidden_states,
    configured=configured_grid,
)
VIT = Family(
    name="transformers ViTModel",
    library="transformers",
    classes=("ViTModel",),
    blocks=lambda encoder: list(encoder.layers),
    tokens=TokenSequence(),
    grid=_GRID,
    positions=_BesideMasks(),
    image_size=lambda encoder: sides(encoder.config.image_size),
    run=lambda encoder, images: encoder(images, interpolate_pos_encoding=True),
    attention=lambda layer: (layer.layernorm_before, layer.attention),
    eager=is_eager,
)
MSN = replace(VIT, name="transformers ViTMSNModel", classes=("ViTMSNModel",))
DEIT = replace(
    VIT,
    name="transformers DeiTModel",
    classes=("DeiTModel",),
    tokens=TokenSequence(lambda encoder: 2),
)
IJEPA = replace(
    VIT,
    name="transformers IJepaModel",
    classes=("IJepaModel",),
    tokens=TokenSequence(lambda encoder: 0),
)
SIGLIP = replace(
    IJEPA,
    name="transformers SiglipVisionModel",
    classes=("SiglipVisionModel",),
    blocks=lambda encoder: list(encoder.encoder.layers),
    attention=lambda layer: (layer.layer_norm1, layer.self_attn),
)
CLIP = replace(
    SIGLIP,
    name="transformers CLIPVisionModel",
    classes=("CLIPVisionModel",),
    tokens=TokenSequence(),
    grid=replace(_GRID, then=lambda encoder: [encoder.pre_layrnorm]),
)
CLIPSEG = replace(CLIP, name="transformers CLIPSegVisionModel", classes=("CLIPSegVisionModel",))
OWL = replace(
    CLIP,
    name="transformers OwlViTVisionTransformer and Owlv2VisionTransformer",
    classes=("OwlViTVisionTransformer", "Owlv2VisionTransformer"),
    grid=replace(_GRID, then=lambda encoder: [encoder.pre_layernorm]),
)
PIXIO = replace(
    VIT,
    name="transformers PixioModel",
    classes=("PixioModel",),
    tokens=TokenSequence(lambda encoder: encoder.config.n_cls_tokens),
    run=lambda encoder, images: encoder(images),
)
DINOV2 = replace(
    VIT,
    name="transformers Dinov2Model",
    classes=("Dinov2Model", "Dinov2Backbone"),
    blocks=lambda encoder: list(encoder.encoder.layer),
    run=lambda encoder, images: encoder(images),
    attention=lambda layer: (layer.norm1, layer.attention),
)
DINOV2_WITH_REGISTERS = replace(
    DINOV2,
    name="transformers Dinov2WithRegistersModel",
    classes=("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"),
    tokens=TokenSequence(lambda encoder: 1 + encoder.config.num_register_tokens),
)
TIPSV2 = replace(
    DINOV2_WITH_REGISTERS,
    name="transformers Tipsv2VisionModel",
    classes=("Tipsv2VisionModel", "Tipsv2VisionBackbone"),
)
RADIO = replace(
    DINOV2,
    name="transformers RadioModel",
    classes=("RadioModel",),
    tokens=TokenSequence(lambda encoder: encoder.config.num_summary_tokens),
    grid=replace(_GRID, read=_radio_grid),
)
DPT = replace(
    VIT,
    name="transformers DPTModel",
    classes=("DPTModel",),
    blocks=lambda encoder: list(encoder.encoder.layer),
    positions=Positions(),  # its blocks take no mask at all
    run=lambda encoder, images: encoder(images),
)
VITPOSE = replace(
    DPT,
    name="transformers VitPoseBackbone",
    classes=("VitPoseBackbone",),
    tokens=TokenSequence(lambda encoder: 0),
    grid=replace(
        _GRID,
        # The patches of padded images are as many as those of the images.
        read=lambda encoder, pixel_values: configured_grid(encoder),
        varies=lambda encoder: False,
    ),
    positions=_NoMasks(),
    run=lambda encoder, images: encoder(
        images, dataset_index=images.new_zeros(len(images), dtype=torch.long)
    ),
)


def bias_of_tables(owners: Iterable[Any], grid: Size, cells: Size) -> Tensor | None:
    """Returns the sum of the biases of BEiT's modules for them, or None if there are none.

    Args:
        owners: the modules with a table, or None.
        grid: rows and columns of the image's tokens.
        cells: rows and columns of the clusters, (h, w).

    Returns:
        (1, heads, 1 + h * w, 1 + h * w).
    """
    bias = None
    for owner in owners:
        if owner is None:
            continue
        rows, columns = owner.window_size
        table = owner.relative_position_bias_table
        # transformers reads the table as columns by rows; usually both are equal.
        offsets = table[:-3].view(2 * columns - 1, 2 * rows - 1, -1)
        part = relative_bias(offsets, table[-3:], grid, cells)[None]
        bias = part if bias is None else bias + part
    return bias


def _bias(encoder: Any, layer: Any, grid: Size, cells: Size) -> Tensor | None:
    """Returns the bias of the logits in one layer of BEiT."""
    owners = (layer.relative_position_bias, encoder.shared_position_bias)
    return bias_of_tables(owners, grid, cells)


def _own_bias(layer: Any) -> tuple[nn.Module, str] | None:
    bias = layer.relative_position_bias
    return None if bias is None else (bias, "forward")


class _TableBesideMasks(Table):
    """BEiT's tables, and the check for masks of the caller."""

    def overrides(self, hourglass: Hourglass) -> list[Override]:
        return [_CallersMask(hourglass.encoder), *super().overrides(hourglass)]


BEIT = replace(
    VIT,
    name="transformers BeitModel",
    classes=("BeitModel",),
    positions=_TableBesideMasks(bias=_bias, argument="attention_mask", own=_own_bias),
    run=lambda encoder, images: encoder(images),
)

_PLAIN = (VIT, MSN, DEIT, IJEPA, PIXIO, SIGLIP, CLIP, CLIPSEG, OWL, DPT, VITPOSE)
_DINOV2 = (DINOV2, DINOV2_WITH_REGISTERS, TIPSV2, RADIO)
for _family in (*_DINOV2, *_PLAIN, BEIT):
    register_family(_family)

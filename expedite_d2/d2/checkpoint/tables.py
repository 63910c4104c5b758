"""Learnt tables of positions: which setting gives each its size, and how to bring it to another."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expedite_d2.d2.modeling.backbone.swin import ExpeditedSwinTransformer
from expedite_d2.d2.modeling.backbone.swin_v2_blocks import CosineWindowAttention
from expedite_d2.d2.modeling.backbone.vit import ExpeditedViT, resize_position


class Table(NamedTuple):
    """A checkpoint's table of another size than the model's.

    Attributes:
        key: the setting that its size follows.
        value: that setting as the checkpoint was trained with it.
        resized: the table in the model's size.
    """

    key: str
    value: int
    resized: Tensor


def resize_table(model: nn.Module, name: str, theirs: Tensor, ours: Tensor) -> Table | None:
    """A table of positions in the model's size, or None for anything else.

    Swin's are resized as its authors do it, a ViT's as the model resizes them to an image.

    Args:
        model: the model; its ``backbone`` says how large a patch is.
        name: of the table in the model's state dict.
        theirs: the checkpoint's tensor of this name.
        ours: the model's, of another shape.
    """
    backbone: Any = getattr(model, "backbone", None)
    if theirs.ndim != ours.ndim or not theirs.numel():
        return None
    if name.endswith(".relative_position_bias_table"):
        return _resize_offsets(backbone, theirs, ours)
    if name.endswith(".absolute_pos_embed") and isinstance(backbone, ExpeditedSwinTransformer):
        return _resize_map(backbone, theirs, ours)
    if name.endswith(".vit.pos_embed") and isinstance(backbone, ExpeditedViT):
        return _resize_tokens(backbone, theirs, ours)
    return None


def _resize_map(backbone: ExpeditedSwinTransformer, theirs: Tensor, ours: Tensor) -> Table | None:
    """Swin's position embedding, (1, C, side, side)."""
    side = theirs.shape[2]
    if theirs.shape != (*ours.shape[:2], side, side):
        return None
    resized = F.interpolate(theirs.float(), size=ours.shape[2:], mode="bicubic")
    return Table("MODEL.SWIN.PRETRAIN_IMG_SIZE", side * backbone.patch_size, resized)


def _resize_tokens(backbone: ExpeditedViT, theirs: Tensor, ours: Tensor) -> Table | None:
    """A ViT's position embedding, (1, P + side * side, C), with P prefix tokens."""
    rows, columns = backbone.vit.patch_embed.grid_size
    prefixes = ours.shape[1] - rows * columns
    side = math.isqrt(max(theirs.shape[1] - prefixes, 0))
    if side == 0 or theirs.shape != (1, prefixes + side**2, ours.shape[2]):
        return None
    resized = resize_position(theirs, (side, side), (rows, columns), backbone.pos_interpolation)
    return Table("MODEL.VIT.IMG_SIZE", side * backbone.size_divisibility, resized)


def _resize_offsets(backbone: Any, theirs: Tensor, ours: Tensor) -> Table | None:
    """A bias of the offsets between tokens, (side * side, heads): Swin's, or BEiT's and 3 rows."""
    beit = isinstance(backbone, ExpeditedViT)
    extra = 3 if beit else 0
    old, new = _odd_root(len(theirs) - extra), _odd_root(len(ours) - extra)
    if old is None or new is None or theirs.shape[1] != ours.shape[1]:
        return None
    maps = theirs[: old**2].float().t().unflatten(1, (old, old))[None]
    maps = F.interpolate(maps, size=(new, new), mode="bilinear" if beit else "bicubic")
    resized = torch.cat([maps[0].flatten(1).t(), theirs[old**2 :].float()])
    tokens = (old + 1) // 2
    if beit:
        return Table("MODEL.VIT.IMG_SIZE", tokens * backbone.size_divisibility, resized)
    return Table("MODEL.SWIN.WINDOW_SIZE", tokens, resized)


def _odd_root(number: int) -> int | None:
    root = math.isqrt(max(number, 0))
    return root if root % 2 and root**2 == number else None


_COORDINATES = re.compile(r"layers\.(\d+)\.blocks\.\d+\.attn\.relative_coords_table$")


def pretraining_windows(model: nn.Module, source: Mapping[str, Tensor]) -> list[int] | None:
    """``MODEL.SWIN.PRETRAINED_WINDOW_SIZES`` that a SwinV2 checkpoint asks for.

    Its biases are a function of coordinates that are measured in the windows of its pre-training;
    official checkpoints keep these coordinates, at no use but this.

    Args:
        model: the model that is to run the weights.
        source: the checkpoint, under its own names.

    Returns:
        One window per stage, or None where the model has them already, or nothing tells.
    """
    stages: dict[int, int] = {}
    for name, table in source.items():
        match = _COORDINATES.search(name)
        if match is None or table.ndim != 4 or not table.numel() or table.is_complex():
            continue
        # Of windows M in coordinates of windows P it is log2(1 + 8 * (M - 1) / (P - 1)) / 3: 1.06
        # for equal windows; 10 is out of any reach.
        largest = float(table.max())
        if 0 < largest < 10:
            reach = 4 * (table.shape[1] - 1) / (2 ** (3 * largest) - 1)
            stages[int(match[1])] = round(reach) + 1
    attentions = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, CosineWindowAttention)
    }
    reaches = {
        int(match[1]): module.reach + 1
        for name, module in attentions.items()
        if (match := re.search(r"layers\.(\d+)\.blocks\.\d+\.attn$", name))
    }
    if not stages or stages.keys() != reaches.keys() or stages == reaches:
        return None
    return [stages[stage] for stage in sorted(stages)]

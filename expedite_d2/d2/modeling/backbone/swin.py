"""Swin transformer in which the last blocks of one stage may run on clusters of tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from expedite_d2.adapters.windows import relative_position_index
from expedite_d2.d2.config.keys import setting
from expedite_d2.d2.modeling.backbone.settings import (
    OutputShapes,
    check_swin,
    reduction_from_config,
)
from expedite_d2.d2.modeling.backbone.swin_blocks import (
    PatchEmbed,
    PatchMerging,
    SwinBlock,
    WindowAttention,
)
from expedite_d2.d2.modeling.backbone.swin_v2_blocks import (
    CosineWindowAttention,
    PatchMergingV2,
    SwinV2Block,
)
from expedite_d2.d2.modeling.backbone.swin_windows import Windows
from expedite_d2.d2.modeling.upcast import upcast_layers
from expedite_d2.d2.provider import BACKBONE_REGISTRY, Backbone, ShapeSpec, configurable
from expedite_d2.profiling import profiler_range
from expedite_d2.reducers import Expeditable, Reduction, reconstruct, reduce
from expedite_d2.reducers.correction import attach_correction, maps_at


class SwinStage(nn.Module):
    """Blocks of one resolution, and the patch merging that leads to the next."""

    def __init__(self, blocks: Sequence[SwinBlock], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


@BACKBONE_REGISTRY.register()
class ExpeditedSwinTransformer(Expeditable, Backbone):
    """Swin transformer, version 1 or 2, expedited when `reduction` is set.

    Parameters have the official names, and without a reduction every output equals official Swin's.
    With one, the blocks from number `alpha` to the end of its stage run on clusters: each M x M
    window of tokens becomes an m x m window.

    Attributes:
        reduction: the settings; None runs every block on all tokens. May be set at any time.
    """

    token_positions: Tensor
    cluster_positions: Tensor  # None without a reduction
    cluster_source: Tensor

    @configurable
    def __init__(
        self,
        *,
        pretrain_img_size: int = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        ape: bool = False,
        patch_norm: bool = True,
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        use_checkpoint: bool = False,
        version: int = 1,
        pretrained_window_sizes: Sequence[int] | None = None,
        reduction: Reduction | None = None,
    ) -> None:
        """Arguments are those of official Swin. These are new, different or easily mistaken:

        Args:
            pretrain_img_size: side of the pre-training images, for the absolute position embedding.
            drop_path_rate: stochastic depth of the last block, growing linearly from 0.
            ape: whether to add an absolute position embedding to the patches.
            out_features: names of the outputs, "res2" for the first stage.
            use_checkpoint: whether to recompute each block's activations in the backward pass.
            version: 1 or 2. Version 2 learns the scale of its logits: it takes no qk_scale.
            pretrained_window_sizes: version 2: for each stage the window in which coordinates are
                measured, if the weights come from smaller windows; 0 for window_size.
            reduction: settings of the expedited backbone; None for the plain one.
        """
        super().__init__()
        names = [f"res{i + 2}" for i in range(len(depths))]
        unknown = [name for name in out_features if name not in names]
        if unknown or not out_features:
            raise ValueError(f"out_features must be among {names}, got {list(out_features)}")
        if len(num_heads) != len(depths):
            raise ValueError(
                f"num_heads must have one entry per stage ({len(depths)}), got {list(num_heads)}"
            )
        self.window_size = window_size
        self.use_checkpoint = use_checkpoint
        self.patch_size = patch_size
        self._out_features = [name for name in names if name in out_features]
        self.num_features = [embed_dim * 2**i for i in range(len(depths))]

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, patch_norm)
        if ape:
            side = pretrain_img_size // patch_size
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, embed_dim, side, side))
        else:
            self.register_parameter("absolute_pos_embed", None)
        self.pos_drop = nn.Dropout(drop_rate)

        drop_path = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        parts = _version_parts(version, len(depths), qk_scale, pretrained_window_sizes)
        self.layers = nn.ModuleList()
        for i, depth in enumerate(depths):
            first = sum(depths[:i])
            blocks = [
                parts.block(
                    self.num_features[i],
                    parts.attentions[i](
                        self.num_features[i],
                        window_size,
                        num_heads[i],
                        qkv_bias=qkv_bias,
                        attn_drop=attn_drop_rate,
                        proj_drop=drop_rate,
                    ),
                    shifted=j % 2 == 1,
                    mlp_ratio=mlp_ratio,
                    drop=drop_rate,
                    drop_path=drop_path[first + j],
                )
                for j in range(depth)
            ]
            last = i == len(depths) - 1
            downsample = None if last else parts.merging(self.num_features[i])
            self.layers.append(SwinStage(blocks, downsample))
        # Shared by all blocks: for a 32x32 window it has 8 MB.
        positions = relative_position_index((window_size, window_size))
        self.register_buffer("token_positions", positions, persistent=False)
        for i, channels in enumerate(self.num_features):
            self.add_module(f"norm{i}", nn.LayerNorm(channels))
        self.apply(_init_weights)
        if ape:
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)
        upcast_layers(self)
        self.reduction = reduction

    @classmethod
    def from_config(cls, cfg: Any, input_shape: ShapeSpec | None = None) -> dict[str, Any]:
        """Returns constructor arguments from Mask2Former's MODEL.SWIN and from MODEL.EXPEDITE."""
        check_swin(cfg)
        swin = cfg.MODEL.SWIN
        return {
            "pretrain_img_size": swin.PRETRAIN_IMG_SIZE,
            "patch_size": swin.PATCH_SIZE,
            "in_chans": 3 if input_shape is None else input_shape.channels,
            "embed_dim": swin.EMBED_DIM,
            "depths": swin.DEPTHS,
            "num_heads": swin.NUM_HEADS,
            "window_size": swin.WINDOW_SIZE,
            "mlp_ratio": swin.MLP_RATIO,
            "qkv_bias": swin.QKV_BIAS,
            "qk_scale": swin.QK_SCALE,
            "drop_rate": swin.DROP_RATE,
            "attn_drop_rate": swin.ATTN_DROP_RATE,
            "drop_path_rate": swin.DROP_PATH_RATE,
            "ape": swin.APE,
            "patch_norm": swin.PATCH_NORM,
            "out_features": swin.OUT_FEATURES,
            "use_checkpoint": swin.USE_CHECKPOINT,
            "version": setting(cfg, "MODEL.SWIN.VERSION"),
            "pretrained_window_sizes": setting(cfg, "MODEL.SWIN.PRETRAINED_WINDOW_SIZES"),
            "reduction": reduction_from_config(cfg),
        }

    @property
    def reduction(self) -> Reduction | None:
        """Settings of the expedited backbone, None for the plain one."""
        return self._reduction

    @reduction.setter
    def reduction(self, reduction: Reduction | None) -> None:
        positions = source = None
        if reduction is not None:
            blocks = self.reducible_blocks()
            if reduction.alpha >= len(blocks):
                raise ValueError(
                    f"alpha must be less than the backbone's {len(blocks)} blocks, got "
                    f"{reduction.alpha}"
                )
            side = self.window_size
            rows, columns = reduction.cluster.cells(side, side)
            if rows > side or columns > side or rows * columns >= side * side:
                raise ValueError(
                    f"clusters must be smaller than the {side}x{side} window, got {rows}x{columns}"
                )
            device = self.patch_embed.proj.weight.device
            positions = relative_position_index((rows, columns)).to(device)
            attention: Any = blocks[reduction.alpha].attn
            source = attention.position_source((rows, columns)).to(device)
            if reduction.correction is not None:
                stage, end = self._stage_of(reduction.alpha)
                reduction.correction.check_places({end: self.num_features[stage]})
        # Constants of the settings, not of a forward pass; buffers follow the model to its device.
        self.register_buffer("cluster_positions", positions, persistent=False)
        self.register_buffer("cluster_source", source, persistent=False)
        attach_correction(self, None if reduction is None else reduction.correction)
        self._reduction = reduction

    def reducible_blocks(self) -> list[nn.Module]:
        """Returns all blocks, across the stages."""
        return [block for stage in self._stages() for block in stage.blocks]

    def read_outs(self) -> list[int]:
        """Returns the last block of the stage that is clustered."""
        return [] if self._reduction is None else [self._stage_of(self._reduction.alpha)[1]]

    def _stage_of(self, number: int) -> tuple[int, int]:
        """Returns the stage of a block, and the number of the stage's last block."""
        ends = list(itertools.accumulate(len(stage.blocks) for stage in self._stages()))
        stage = next(i for i, end in enumerate(ends) if number < end)
        return stage, ends[stage] - 1

    @property
    def cluster_window(self) -> tuple[int, int]:
        """Returns rows and columns of the windows of tokens that are clustered separately."""
        return self.window_size, self.window_size

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Encodes images.

        Args:
            images: (B, 3, H, W), any H and W.

        Returns:
            Maps by name, (B, C, H/4, W/4) for "res2" and half of that with each further stage,
            rounded up, channels-last in memory.
        """
        with profiler_range("expedite_d2.stem", images):
            x = self._embed(images)
        outputs = {}
        reduction, first = self._reduction, 0
        for i, stage in enumerate(self._stages()):
            blocks = list(stage.blocks)
            full = len(blocks)
            if reduction is not None:
                full = min(max(reduction.alpha - first, 0), full)
            first += len(blocks)
            with profiler_range(f"expedite_d2.stage{i + 1}", x):
                if full:
                    windows = Windows.of_map(x, self.cluster_window, self.token_positions)
                    x = self._run(blocks[:full], x, windows)
                if reduction is not None and full < len(blocks):
                    clusters = reduction.cluster.cells(*self.cluster_window)
                    low, clustering = reduce(x, reduction, self.cluster_window)
                    windows = Windows.of_map(
                        low, clusters, self.cluster_positions, self.cluster_source
                    )
                    with profiler_range("expedite_d2.low_blocks", low):
                        low = self._run(blocks[full:], low, windows)
                    details = maps_at(self, first - 1)
                    x = reconstruct(low, clustering, details[0] if details else None)
                    reduction = None
            name = f"res{i + 2}"
            if name in self._out_features:
                norm = getattr(self, f"norm{i}")
                outputs[name] = norm(x).permute(0, 3, 1, 2)
            if stage.downsample is not None:
                x = stage.downsample(x)
        return outputs

    def output_shape(self) -> OutputShapes:
        """Channels and stride of each output."""
        return OutputShapes(
            self,
            {
                name: ShapeSpec(
                    channels=self.num_features[int(name[3:]) - 2],
                    stride=self.patch_size * 2 ** (int(name[3:]) - 2),
                )
                for name in self._out_features
            },
        )

    @property
    def size_divisibility(self) -> int:
        """Multiple to which Detectron2 pads images, so that each stage halves the map exactly."""
        return 32

    @property
    def padding_constraints(self) -> dict[str, int]:
        """``size_divisibility`` in the form that Detectron2's ImageList reads."""
        return {"size_divisibility": self.size_divisibility, "square_size": 0}

    def _embed(self, images: Tensor) -> Tensor:
        if images.dim() != 4:
            raise ValueError(f"Swin expects images (B, 3, H, W), got {tuple(images.shape)}")
        x = self.patch_embed(images)
        if self.absolute_pos_embed is not None:
            position = F.interpolate(self.absolute_pos_embed, size=x.shape[1:3], mode="bicubic")
            x = x + position.permute(0, 2, 3, 1)
        return self.pos_drop(x)

    def _stages(self) -> Iterable[SwinStage]:
        return cast(Iterable[SwinStage], self.layers)

    def _run(self, blocks: Iterable[nn.Module], x: Tensor, windows: Windows) -> Tensor:
        tokens = x.flatten(1, 2)
        for block in blocks:
            if self.use_checkpoint and self.training and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, windows, use_reentrant=False)
            else:
                tokens = block(tokens, windows)
        return tokens.view(x.shape)


class _Parts(NamedTuple):
    """Classes of which a version of Swin builds its stages; one attention per stage."""

    block: type[SwinBlock]
    attentions: Sequence[Callable[..., nn.Module]]
    merging: Callable[[int], nn.Module]


def _version_parts(
    version: int, stages: int, qk_scale: float | None, pretrained: Sequence[int] | None
) -> _Parts:
    pretrained = list(pretrained) if pretrained and any(pretrained) else [0] * stages
    if version == 1:
        if any(pretrained):
            raise ValueError(
                f"pretrained_window_sizes are for version 2, got {pretrained} for version 1"
            )
        attention = partial(WindowAttention, qk_scale=qk_scale)
        return _Parts(SwinBlock, [attention] * stages, PatchMerging)
    if version != 2:
        raise ValueError(f"version must be 1 or 2, got {version!r}")
    if qk_scale is not None:
        raise ValueError(f"qk_scale must be None for version 2, which learns it, got {qk_scale}")
    if len(pretrained) != stages:
        raise ValueError(
            f"pretrained_window_sizes must have one entry per stage ({stages}), got {pretrained}"
        )
    attentions = [partial(CosineWindowAttention, pretrained_window_size=w) for w in pretrained]
    return _Parts(SwinV2Block, attentions, PatchMergingV2)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

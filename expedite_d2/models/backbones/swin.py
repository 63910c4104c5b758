"""Swin transformer whose last blocks of one stage may run on clusters of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from expedite_d2.d2 import BACKBONE_REGISTRY, Backbone, ShapeSpec, configurable
from expedite_d2.hourglass import Reduction, profiler_range, reconstruct, reduce
from expedite_d2.models.backbones.swin_blocks import (
    PatchEmbed,
    PatchMerging,
    SwinBlock,
    Windows,
    position_resampling,
    relative_position_index,
    shift_mask,
)


class SwinStage(nn.Module):
    """Blocks of one resolution, and the merging that leads to the next."""

    def __init__(
        self, blocks: Sequence[SwinBlock], window_size: int, downsample: PatchMerging | None
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def token_windows(self, x: Tensor) -> Windows:
        """Geometry of the windows on a token map (B, H, W, C)."""
        size, shift = self.window_size, self.window_size // 2
        positions = cast(SwinBlock, self.blocks[0]).attn.relative_position_index
        mask = self._mask(x, (size, size), (shift, shift))
        return Windows((size, size), (shift, shift), mask, positions)

    def cluster_windows(
        self, x: Tensor, clusters: tuple[int, int], positions: Tensor, resample: Tensor
    ) -> Windows:
        """Geometry of the windows on a map (B, h, w, C) of clusters."""
        shift = (clusters[0] // 2, clusters[1] // 2)
        return Windows(clusters, shift, self._mask(x, clusters, shift), positions, resample)

    def _mask(self, x: Tensor, size: tuple[int, int], shift: tuple[int, int]) -> Tensor | None:
        if not any(block.shifted for block in self.blocks):
            return None
        height, width = x.shape[1:3]
        grid = (height + -height % size[0], width + -width % size[1])
        return shift_mask(grid, size, shift, x.device)


@BACKBONE_REGISTRY.register()
class ExpeditedSwinTransformer(Backbone):
    """Swin transformer (v1), expedited when `reduction` is set.

    Parameters have the official names, and without a reduction every output is official Swin's.
    With one, the blocks from number `alpha` to the end of the stage that holds it run on clusters,
    each M x M window of tokens having become an m x m window.

    Attributes:
        reduction: the settings; None runs every block on all tokens. May be set at any time.
    """

    cluster_positions: Tensor  # None without a reduction
    cluster_resample: Tensor

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
        reduction: Reduction | None = None,
    ) -> None:
        """Args as in official Swin; what differs or is easily mistaken:

        Args:
            pretrain_img_size: side of the pre-training images, for the absolute position embedding.
            drop_path_rate: stochastic depth of the last block, growing linearly from 0.
            ape: whether to add an absolute position embedding to the patches.
            out_features: names of the outputs, "res2" for the first stage.
            use_checkpoint: whether to recompute each block's activations in the backward pass.
            reduction: settings of the expedited backbone; None for the plain one.
        """
        super().__init__()
        names = [f"res{i + 2}" for i in range(len(depths))]
        unknown = [name for name in out_features if name not in names]
        if unknown or not out_features:
            raise ValueError(f"out_features must be among {names}, got {list(out_features)}")
        if len(num_heads) != len(depths):
            raise ValueError(
                f"num_heads must have one entry a stage ({len(depths)}), got {list(num_heads)}"
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
        self.layers = nn.ModuleList()
        for i, depth in enumerate(depths):
            first = sum(depths[:i])
            blocks = [
                SwinBlock(
                    self.num_features[i],
                    num_heads[i],
                    window_size,
                    shifted=j % 2 == 1,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    qk_scale=qk_scale,
                    drop=drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=drop_path[first + j],
                )
                for j in range(depth)
            ]
            last = i == len(depths) - 1
            downsample = None if last else PatchMerging(self.num_features[i])
            self.layers.append(SwinStage(blocks, window_size, downsample))
        for i, channels in enumerate(self.num_features):
            self.add_module(f"norm{i}", nn.LayerNorm(channels))
        self.apply(_init_weights)
        if ape:
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)
        self.reduction = reduction

    @classmethod
    def from_config(cls, cfg: Any, input_shape: ShapeSpec | None = None) -> dict[str, Any]:
        """Constructor arguments from Mask2Former's MODEL.SWIN and from MODEL.EXPEDITE."""
        swin, expedite = cfg.MODEL.SWIN, cfg.MODEL.EXPEDITE
        reduction = None
        if expedite.ENABLED:
            reduction = Reduction(
                alpha=expedite.ALPHA,
                clusters=tuple(expedite.CLUSTERS),
                iterations=expedite.ITERATIONS,
                neighbourhood=expedite.NEIGHBOURHOOD,
                topk=expedite.TOPK,
                temperature=expedite.TEMPERATURE,
                reconstruction=expedite.RECONSTRUCTION,
            )
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
            "reduction": reduction,
        }

    @property
    def reduction(self) -> Reduction | None:
        """Settings of the expedited backbone, None for the plain one."""
        return self._reduction

    @reduction.setter
    def reduction(self, reduction: Reduction | None) -> None:
        positions = resample = None
        if reduction is not None:
            blocks = sum(len(stage.blocks) for stage in self._stages())
            if reduction.alpha >= blocks:
                raise ValueError(
                    f"alpha must be less than the backbone's {blocks} blocks, got {reduction.alpha}"
                )
            side = self.window_size
            rows, columns = reduction.grid(side, side)
            if rows > side or columns > side or rows * columns >= side * side:
                raise ValueError(
                    f"clusters must be smaller than the {side}x{side} window, got {rows}x{columns}"
                )
            device = self.patch_embed.proj.weight.device
            positions = relative_position_index((rows, columns)).to(device)
            resample = position_resampling(side, (rows, columns)).to(device)
        # Constants of the settings, not of a forward pass; buffers follow the model to its device.
        self.register_buffer("cluster_positions", positions, persistent=False)
        self.register_buffer("cluster_resample", resample, persistent=False)
        self._reduction = reduction

    @property
    def cluster_window(self) -> tuple[int, int]:
        """Rows and columns of the windows of tokens that are clustered each by itself."""
        return self.window_size, self.window_size

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Encode images.

        Args:
            images: (B, 3, H, W), any H and W.

        Returns:
            Maps by name, (B, C, H/4, W/4) for "res2" and half of that with each further stage,
            rounded up.
        """
        x = self._embed(images)
        outputs = {}
        reduction, first = self._reduction, 0
        for i, stage in enumerate(self._stages()):
            blocks = list(stage.blocks)
            full = len(blocks)
            if reduction is not None:
                full = min(max(reduction.alpha - first, 0), full)
            first += len(blocks)
            with profiler_range(f"expedite_d2.swin.stage{i + 1}", x):
                if full:
                    x = self._run(blocks[:full], x, stage.token_windows(x))
                if reduction is not None and full < len(blocks):
                    clusters = reduction.grid(*self.cluster_window)
                    low, clustering = reduce(x, reduction, self.cluster_window)
                    windows = stage.cluster_windows(
                        low, clusters, self.cluster_positions, self.cluster_resample
                    )
                    x = reconstruct(self._run(blocks[full:], low, windows), clustering)
                    reduction = None
            name = f"res{i + 2}"
            if name in self._out_features:
                norm = getattr(self, f"norm{i}")
                outputs[name] = norm(x).permute(0, 3, 1, 2).contiguous()
            if stage.downsample is not None:
                x = stage.downsample(x)
        return outputs

    def tokens_to_cluster(self, images: Tensor) -> Tensor:
        """The token map that enters the clustering: (B, 3, H, W) -> (B, H', W', C)."""
        if self._reduction is None:
            raise ValueError("tokens_to_cluster needs an expedited backbone, reduction is None")
        x, left = self._embed(images), self._reduction.alpha
        for stage in self._stages():
            blocks = list(stage.blocks)
            if left:
                x = self._run(blocks[:left], x, stage.token_windows(x))
            if left < len(blocks):
                break
            left -= len(blocks)
            if stage.downsample is not None:
                x = stage.downsample(x)
        return x

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each output."""
        return {
            name: ShapeSpec(
                channels=self.num_features[int(name[3:]) - 2],
                stride=self.patch_size * 2 ** (int(name[3:]) - 2),
            )
            for name in self._out_features
        }

    @property
    def size_divisibility(self) -> int:
        """What Detectron2 pads images to, so that each stage halves the one before."""
        return 32

    @property
    def padding_constraints(self) -> dict[str, int]:
        """The same as Detectron2's ImageList reads it."""
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
        for block in blocks:
            if self.use_checkpoint and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, windows, use_reentrant=False)
            else:
                x = block(x, windows)
        return x


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

"""timm's plain vision transformers as a backbone, for images of any size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from expedite_d2.adapters import clustering_of, restore
from expedite_d2.adapters.core import prepare
from expedite_d2.adapters.family import inherits
from expedite_d2.adapters.positions import NoBias
from expedite_d2.adapters.timm import beit_bias
from expedite_d2.d2.config.keys import check_keys, check_unset
from expedite_d2.d2.modeling.backbone.settings import OutputShapes, reduction_from_config
from expedite_d2.d2.modeling.lazy_timm import import_timm
from expedite_d2.d2.modeling.upcast import upcast_layers
from expedite_d2.d2.provider import BACKBONE_REGISTRY, Backbone, ShapeSpec, configurable
from expedite_d2.ops._checks import integer
from expedite_d2.profiling import profiler_range
from expedite_d2.reducers import Clustering, Expeditable, Reduction, State, attach

PosInterpolation = Literal["bicubic", "bilinear"]

# Epsilon of the norms in timm's transformers, except a few families.
_USUAL_NORM_EPS = 1e-6
# Keys of Detectron2's own ViT.
_DETECTRON2_KEYS = (
    "MODEL.VIT.WINDOW_SIZE",
    "MODEL.VIT.WINDOW_BLOCKS",
    "MODEL.VIT.USE_REL_POS",
    "MODEL.VIT.PRETRAIN_IMG_SIZE",
)
# Number of stages of a hybrid's convolutional stem that heads may read.
STEM_FEATURES = 2


class ViTFeatures(NamedTuple):
    """Result of an ExpeditedViT.

    Attributes:
        tokens: for each output its prefix tokens (class, distillation, register), (B, P, C), and
            its map (B, h, w, C).
        stem: maps of a hybrid's stem by name, (B, C, h, w).
        clustering: argument of `reconstruct`, if the last block's output stayed on the clusters.
    """

    tokens: dict[str, tuple[Tensor, Tensor]]
    stem: dict[str, Tensor]
    clustering: Clustering | None


@BACKBONE_REGISTRY.register()
class ExpeditedViT(Expeditable, Backbone):
    """A timm VisionTransformer (also distilled, or hybrid) or Beit, expedited by `reduction`.

    The transformer is `vit`, in which parameters have timm's names. Its position embedding, and
    BEiT's bias of relative positions, are resized to each image. With a reduction, the blocks from
    number `alpha` on run on clusters, and outputs are reconstructed.
    """

    @configurable
    def __init__(
        self,
        *,
        vit: nn.Module,
        out_blocks: Sequence[int | str] = ("last",),
        pos_interpolation: PosInterpolation = "bicubic",
        use_checkpoint: bool = False,
        keep_clusters: bool = False,
        reduction: Reduction | None = None,
    ) -> None:
        """
        Args:
            vit: timm's VisionTransformer or Beit.
            out_blocks: numbers of the blocks whose outputs are returned, as "block5" and so on, and
                "last" for the normalised output of the last one.
            pos_interpolation: how the position embedding is resized: by "bicubic" (antialiased), as
                in timm, or by "bilinear", as in DPT and Segmenter.
            use_checkpoint: whether to recompute each block's activations in the backward pass.
            keep_clusters: see the property of this name.
            reduction: settings of the expedited backbone; None for the plain one.
        """
        super().__init__()
        self._is_beit = inherits(vit, "timm", "Beit")
        if not self._is_beit and not inherits(vit, "timm", "VisionTransformer"):
            raise ValueError(
                f"ExpeditedViT needs timm's VisionTransformer or Beit, got {type(vit).__name__}"
            )
        self.vit = cast(Any, vit)
        blocks = len(self.vit.blocks)
        out_blocks = [i if (n := integer(i)) is None else n for i in out_blocks]
        numbers = [i for i in out_blocks if i != "last"]
        known = all(type(i) is int and 0 <= i < blocks for i in numbers)
        if not out_blocks or not known:
            raise ValueError(
                f"out_blocks must be 'last' or numbers of blocks, 0 to {blocks - 1}, got "
                f"{list(out_blocks)}"
            )
        if list(out_blocks) != [*sorted(set(numbers)), *["last"] * ("last" in out_blocks)]:
            raise ValueError(
                f"out_blocks must rise, each block once and 'last' at the end, got "
                f"{list(out_blocks)}"
            )
        if pos_interpolation not in get_args(PosInterpolation):
            raise ValueError(
                f"pos_interpolation must be one of {', '.join(get_args(PosInterpolation))}, got "
                f"{pos_interpolation!r}"
            )
        self.pos_interpolation = pos_interpolation
        self.use_checkpoint = use_checkpoint
        self._outputs = {i if i == "last" else f"block{i}": i for i in out_blocks}
        self._depth = blocks if "last" in out_blocks else 1 + max(cast(list[int], numbers))
        # No output depends on these; DistributedDataParallel would wait for their gradients.
        unused = list(self.vit.blocks[self._depth :])
        for module in unused if "last" in out_blocks else [*unused, self.vit.norm]:
            module.requires_grad_(False)
        if self._is_beit:
            self.vit.patch_embed.strict_img_size = False
            for block in self.vit.blocks:
                if block.attn.relative_position_bias_table is not None:
                    NoBias(block.attn, "_get_rel_pos_bias").install()
        self._keep_clusters = keep_clusters
        self.reduction = reduction

    @classmethod
    def from_config(cls, cfg: Any, input_shape: ShapeSpec | None = None) -> dict[str, Any]:
        """Returns constructor arguments from MODEL.VIT and MODEL.EXPEDITE."""
        check_keys(cfg, "MODEL.VIT")
        check_unset(cfg, _DETECTRON2_KEYS, "ExpeditedViT")
        vit = cfg.MODEL.VIT
        return {
            "vit": build_timm_vit(cfg, 3 if input_shape is None else input_shape.channels),
            "out_blocks": vit.OUT_BLOCKS,
            "pos_interpolation": vit.POS_INTERPOLATION,
            "use_checkpoint": vit.USE_CHECKPOINT,
            "reduction": reduction_from_config(cfg),
        }

    @property
    def reduction(self) -> Reduction | None:
        """Settings of the expedited backbone, None for the plain one. May be set at any time."""
        return getattr(self.vit, "reduction", None)

    @reduction.setter
    def reduction(self, reduction: Reduction | None) -> None:
        if reduction is None:
            restore(self.vit)
            return
        outputs = () if self._keep_clusters else {self._depth - 1, *self._numbers()}
        prepare(self.vit, reduction, outputs)

    def reducible_blocks(self) -> list[nn.Module]:
        """Returns the transformer's blocks up to the last whose output is used."""
        return list(self.vit.blocks[: self._depth])

    def read_outs(self) -> list[int]:
        """Returns the blocks on clusters that are features, and the last."""
        if self.reduction is None or self._keep_clusters:
            return []
        return sorted(n for n in {self._depth - 1, *self._numbers()} if n >= self.reduction.alpha)

    @property
    def keep_clusters(self) -> bool:
        """Whether outputs of the low-resolution span stay on the clusters.

        This is for heads that run on clusters and reconstruct their own result.
        """
        return self._keep_clusters

    @keep_clusters.setter
    def keep_clusters(self, keep: bool) -> None:
        self._keep_clusters = keep
        self.reduction = self.reduction

    def forward(self, images: Tensor, as_tokens: bool = False) -> Any:
        """Encodes images.

        Args:
            images: (B, 3, H, W), any H and W; the last patches are filled up with zeros.
            as_tokens: whether to return a ``ViTFeatures`` instead.

        Returns:
            Maps by name, (B, C, h, w): "stem0" and "stem1" of a hybrid, "block5" for block 5,
            "last" for the normalised output of the last.
        """
        features = self._features(images)
        if as_tokens:
            return features
        maps = {
            name: grid.permute(0, 3, 1, 2).contiguous()
            for name, (_, grid) in features.tokens.items()
        }
        return {**features.stem, **maps}

    def tokens(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Returns prefix tokens (B, P, C) and map (B, h, w, C) of each output, in order.

        Args:
            images: (B, 3, H, W).
        """
        return list(self(images, as_tokens=True).tokens.values())

    def _features(self, images: Tensor) -> ViTFeatures:
        if images.dim() != 4:
            raise ValueError(f"ViT expects images (B, 3, H, W), got {tuple(images.shape)}")
        with profiler_range("expedite_d2.stem", images):
            x, grid, stem = self._embed(images)
        reduction = self.reduction
        full = self._depth if reduction is None else min(reduction.alpha, self._depth)
        numbers = self._numbers()
        read: dict[int, Tensor] = {}
        with profiler_range("expedite_d2.full_blocks", x):
            for number in range(full):
                x = self._run(number, x, grid)
                if number in numbers:
                    read[number] = x
        with profiler_range("expedite_d2.low_blocks", x):
            for number in range(full, self._depth):
                x = self._run(number, x, None)
                if number in numbers:
                    read[number] = x
        tokens = {}
        for name, i in self._outputs.items():
            if isinstance(i, int):
                tokens[name] = self._split(read[i], read[i], grid)
            else:
                tokens[name] = self._split(self.vit.norm(x), x, grid)
        low = clustering_of(x) if self._keep_clusters else None
        return ViTFeatures(tokens, stem, None if low is None else low[1])

    def output_shape(self) -> OutputShapes:
        """Channels and stride of each output."""
        stem = {
            f"stem{i}": ShapeSpec(channels=info["num_chs"], stride=info["reduction"])
            for i, info in enumerate(self._stem_info())
        }
        shape = ShapeSpec(channels=self.vit.embed_dim, stride=self.size_divisibility)
        return OutputShapes(self, {**stem, **dict.fromkeys(self._outputs, shape)})

    @property
    def size_divisibility(self) -> int:
        """Multiple to which Detectron2 pads images: the side of a patch."""
        return self.vit.patch_embed.feat_ratio()

    @property
    def padding_constraints(self) -> dict[str, int]:
        """``size_divisibility`` in the form that Detectron2's ImageList reads."""
        return {"size_divisibility": self.size_divisibility, "square_size": 0}

    def _numbers(self) -> list[int]:
        return [i for i in self._outputs.values() if isinstance(i, int)]

    def _stem_info(self) -> list[dict[str, Any]]:
        trunk: Any = getattr(self.vit.patch_embed, "backbone", None)
        if not hasattr(trunk, "stages"):
            return []
        return trunk.feature_info[1 : 1 + STEM_FEATURES]  # the first is the first layer

    def _embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int], dict[str, Tensor]]:
        """Returns the sequence that enters the first block, its grid, and maps of the stem."""
        vit, embed = self.vit, self.vit.patch_embed
        stem: dict[str, Tensor] = {}
        x = images
        if self._stem_info():
            x = embed.backbone.stem(x)
            for i, stage in enumerate(embed.backbone.stages):
                x = stage(x)
                if i < STEM_FEATURES:
                    stem[f"stem{i}"] = x
            x = embed.backbone.norm(x)
        elif hasattr(embed, "backbone"):
            x = embed.backbone(x)
        rows, columns = embed.patch_size
        bottom, right = -x.shape[-2] % rows, -x.shape[-1] % columns
        if bottom or right:
            x = F.pad(x, (0, right, 0, bottom))
        x = embed.proj(x).permute(0, 2, 3, 1)
        grid = (x.shape[1], x.shape[2])
        x = x.flatten(1, 2)
        if hasattr(embed, "norm"):
            x = embed.norm(x)
        tokens = [getattr(vit, name, None) for name in ("cls_token", "dist_token", "reg_token")]
        prefix = [token.expand(len(x), -1, -1) for token in tokens if token is not None]
        position = self._position(grid)
        if position is None:
            x = torch.cat([*prefix, x], dim=1)
        elif getattr(vit, "no_embed_class", False):
            x = torch.cat([*prefix, x + position], dim=1)
        else:
            x = torch.cat([*prefix, x], dim=1) + position
        x = vit.pos_drop(x)
        if not self._is_beit:
            x = vit.norm_pre(vit.patch_drop(x))
        return attach(x, State.of_image(*grid)), grid, stem

    def _position(self, grid: tuple[int, int]) -> Tensor | None:
        """Returns the position embedding for a grid: (1, P + h * w, C) or (1, h * w, C)."""
        position, trained = self.vit.pos_embed, tuple(self.vit.patch_embed.grid_size)
        if position is None or grid == trained:
            return position
        return resize_position(position, trained, grid, self.pos_interpolation)

    def _run(self, number: int, x: Tensor, grid: tuple[int, int] | None) -> Tensor:
        """Runs one block. The grid is None on clusters, where the adapter passes the bias."""
        block = self.vit.blocks[number]
        kwargs: dict[str, Any] = {}
        if self._is_beit and grid is not None:
            kwargs["shared_rel_pos_bias"] = beit_bias(self.vit, block, grid, grid)
        if self.use_checkpoint and self.training and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False, **kwargs)
        return block(x, **kwargs)

    def _split(self, out: Tensor, block: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Splits an output into prefix tokens and map.

        Args:
            out: the output of a block, normalised or not.
            block: the tensor that the block returned.
            grid: rows and columns of the image's tokens.
        """
        low = clustering_of(block) if self._keep_clusters else None
        if low is not None:
            grid = (low[0].shape[1], low[0].shape[2])
        prefixes = self.vit.num_prefix_tokens
        return out[:, :prefixes], out[:, prefixes:].unflatten(1, grid)


def resize_position(
    position: Tensor, trained: tuple[int, int], grid: tuple[int, int], mode: PosInterpolation
) -> Tensor:
    """Resizes a position embedding to another grid of tokens; entries before the grid are kept.

    Args:
        position: (1, P + H * W, C).
        trained: rows and columns of the embedding, (H, W).
        grid: rows and columns of the result, (h, w).
        mode: "bicubic" (antialiased), as in timm, or "bilinear", as in DPT and Segmenter.

    Returns:
        (1, P + h * w, C), of the same type.
    """
    prefixes = position.shape[1] - trained[0] * trained[1]
    maps = position[:, prefixes:].float().unflatten(1, trained).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, size=grid, mode=mode, antialias=mode == "bicubic")
    resized = maps.flatten(2).transpose(1, 2).to(position.dtype)
    return torch.cat([position[:, :prefixes], resized], dim=1)


def build_timm_vit(cfg: Any, in_chans: int = 3) -> nn.Module:
    """Builds the transformer that ``MODEL.VIT`` describes, by its name in timm, untrained.

    Raises:
        ValueError: a name that timm does not know, or that is of another family.
    """
    vit, timm = cfg.MODEL.VIT, import_timm()
    module = timm.model_entrypoint(vit.NAME).__module__ if timm.is_model(vit.NAME) else ""
    file = module.rpartition(".")[2]
    if file not in ("vision_transformer", "vision_transformer_hybrid", "deit", "beit"):
        raise ValueError(
            "MODEL.VIT.NAME must be a VisionTransformer or Beit of timm, such as "
            f"vit_large_patch16_384, got {vit.NAME!r}"
        )
    changes = {
        "img_size": vit.IMG_SIZE,
        "patch_size": vit.PATCH_SIZE,
        "embed_dim": vit.EMBED_DIM,
        "depth": vit.DEPTH,
        "num_heads": vit.NUM_HEADS,
        "proj_drop_rate": vit.DROP_RATE,
        "attn_drop_rate": vit.ATTN_DROP_RATE,
        "drop_path_rate": vit.DROP_PATH_RATE,
    }
    changes = {name: value for name, value in changes.items() if value}
    if file != "beit":  # which has no such switch
        changes["dynamic_img_size"] = True
    if "distilled" not in vit.NAME:  # which must have a head
        changes["global_pool"] = ""
    try:
        model = timm.create_model(vit.NAME, num_classes=0, in_chans=in_chans, **changes)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:  # any failure of timm
        given = ", ".join(f"{name} {value}" for name, value in changes.items())
        raise ValueError(
            f"MODEL.VIT must be a variant of {vit.NAME} that timm can build, got {given}"
            + (f": {error}" if str(error) else "")
        ) from error
    if min(model.patch_embed.grid_size) < 1:
        raise ValueError(
            "MODEL.VIT.IMG_SIZE must be at least MODEL.VIT.PATCH_SIZE, got "
            f"{vit.IMG_SIZE} and {vit.PATCH_SIZE}"
        )
    _set_norm_eps(model, vit.NAME, vit.NORM_EPS)
    upcast_layers(model)
    return model


def _set_norm_eps(model: nn.Module, name: str, eps: float) -> None:
    """Sets an epsilon of the LayerNorms other than timm's usual one."""
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    own = {norm.eps for norm in norms}
    if eps == _USUAL_NORM_EPS or own == {eps}:
        return
    if own != {_USUAL_NORM_EPS}:
        raise ValueError(
            f"MODEL.VIT.NORM_EPS must be {_USUAL_NORM_EPS} for {name}, whose norms keep their own "
            f"epsilon, got {eps}"
        )
    for norm in norms:
        norm.eps = eps

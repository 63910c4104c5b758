"""DPT as a Detectron2 meta-architecture: an expedited ViT with transformers' neck and depth head.

"Vision Transformers for Dense Prediction", arXiv 2103.13413.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DPTConfig
from transformers.models.dpt.modeling_dpt import DPTDepthEstimationHead, DPTNeck

from expedite_d2.d2.config.keys import check_keys
from expedite_d2.d2.modeling.backbone.settings import check_reduces
from expedite_d2.d2.modeling.backbone.vit import ExpeditedViT, ViTFeatures
from expedite_d2.d2.modeling.meta_arch.dpt_loss import (
    gradient_loss,
    scale_invariant_loss,
    stack_depths,
)
from expedite_d2.d2.modeling.meta_arch.image_model import ImageModel
from expedite_d2.d2.modeling.meta_arch.resize import result_size
from expedite_d2.d2.modeling.meta_arch.sliding_window import refuse_sliding_window
from expedite_d2.d2.modeling.upcast import upcast_layers
from expedite_d2.d2.provider import META_ARCH_REGISTRY, CfgNode
from expedite_d2.profiling import profiler_range

# Least inverse depth, as in the release: greater depths are not distinguished.
_LEAST_INVERSE = 1e-8


@META_ARCH_REGISTRY.register()
class ExpeditedDPT(ImageModel):
    """Monocular depth: predicts the depth of every pixel of an image.

    Four features are fused: those of the four blocks ``MODEL.VIT.OUT_BLOCKS`` or, of a hybrid, two
    stages of its stem and two blocks. Where the head predicts inverse depth
    (``MODEL.DPT.INVERSE``), depth = 1 / (SCALE · x + SHIFT), else SCALE · x + SHIFT.

    Args:
        cfg: ``MODEL.DPT``, the backbone's keys and ``TEST.DTYPE``.

    Raises:
        ValueError: settings that do not fit each other or the backbone.
    """

    def __init__(self, cfg: CfgNode) -> None:
        check_keys(cfg, "MODEL.DPT")
        dpt = cfg.MODEL.DPT
        refuse_sliding_window(cfg)
        if cfg.TEST.AUG.ENABLED:
            raise ValueError(
                "TEST.AUG averages scores of classes, which ExpeditedDPT has none of: ENABLED must "
                "be False, got True"
            )
        super().__init__(cfg)
        if not isinstance(self.backbone, ExpeditedViT):
            raise ValueError(
                "ExpeditedDPT needs MODEL.BACKBONE.NAME ExpeditedViT, got "
                f"{type(self.backbone).__name__}"
            )
        check_reduces(self.backbone, dpt.TEST_SIZE, "MODEL.DPT.TEST_SIZE")
        config = dpt_config(cfg, self.backbone)
        self.neck = DPTNeck(config)
        self.head = DPTDepthEstimationHead(config)
        # Nothing is added to the coarsest map, so that this layer has no gradient, for which
        # DistributedDataParallel would wait.
        self.neck.fusion_stage.layers[0].residual_layer1.requires_grad_(False)
        # With PyTorch's initialisation the output may start below 0, where the ReLU has no slope
        # and nothing is learnt.
        nn.init.ones_(cast(Tensor, self.head.head[-2].bias))
        # The neck halves the map of tokens once.
        self.size_divisibility = 2 * self.backbone.size_divisibility
        self.inverse = dpt.INVERSE
        self.scale = dpt.SCALE
        self.shift = dpt.SHIFT
        self.max_depth = dpt.MAX_DEPTH
        self.silog_weight = dpt.SILOG_WEIGHT
        self.gradient_weight = dpt.GRADIENT_WEIGHT
        upcast_layers(self)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Losses in training, depth maps at evaluation, in Detectron2's formats.

        Args:
            batched_inputs: for each image ``"image"`` (3, h, w), and ``"height"``, ``"width"`` of
                its result if that is not (h, w); in training ``"depth"`` (h, w) float32 in metres,
                0 where nothing was measured.

        Returns:
            Training: a dict of scalar losses. Evaluation: for each image a dict with ``"depth"``
            (H, W) float32 in metres.
        """
        images = self.preprocess([inputs["image"] for inputs in batched_inputs])
        if self.training:
            return self._losses(images.tensor, _truths(batched_inputs))
        depths = self.depth(self.logits(images.tensor))
        with profiler_range("expedite_d2.post_processing", depths):
            return [
                {"depth": _resized(depth, size, inputs)}
                for depth, size, inputs in zip(
                    depths, images.image_sizes, batched_inputs, strict=True
                )
            ]

    def logits(self, images: Tensor) -> Tensor:
        """Returns the prediction of the head, which `depth` converts to metres.

        Args:
            images: (B, 3, H, W), normalised, H and W multiples of ``size_divisibility``.

        Returns:
            (B, H, W) float32, at least 0.
        """
        with self.eval_autocast():
            features, grid = self._features(images)
            with profiler_range("expedite_d2.neck", images):
                fused = self.neck(features, *grid)
            with profiler_range("expedite_d2.head", images):
                return self.head(fused).float()

    def depth(self, logits: Tensor) -> Tensor:
        """Converts the prediction of the head to metres."""
        scaled = self.scale * logits + self.shift
        return scaled.clamp(min=_LEAST_INVERSE).reciprocal() if self.inverse else scaled

    def _features(self, images: Tensor) -> tuple[list[Tensor], tuple[int, int]]:
        """Returns the neck's four inputs, and the rows and columns of tokens.

        Maps of the stem are (B, C, h, w), outputs of blocks (B, 1 + rows * columns, C).
        """
        with profiler_range("expedite_d2.backbone", images):
            encoded: ViTFeatures = self.backbone(images, as_tokens=True)
        features = list(encoded.stem.values())
        for prefix, tokens in encoded.tokens.values():
            features.append(torch.cat([prefix[:, :1], tokens.flatten(1, 2)], dim=1))
        return features, (tokens.shape[1], tokens.shape[2])

    def _losses(self, images: Tensor, depths: list[Tensor]) -> dict[str, Tensor]:
        prediction = self.depth(self.logits(images))
        size = (images.shape[-2], images.shape[-1])
        truth = stack_depths([d.to(images.device) for d in depths], size, self.max_depth)
        loss = scale_invariant_loss(prediction, truth, self.silog_weight)
        losses = {"loss_silog": loss}
        if self.gradient_weight > 0:
            losses["loss_gradient"] = self.gradient_weight * gradient_loss(prediction, truth)
        return losses


def dpt_config(cfg: CfgNode, backbone: ExpeditedViT) -> DPTConfig:
    """Makes transformers' configuration of the neck and head that ``MODEL.DPT`` describes.

    Raises:
        ValueError: not four features of the backbone, or settings that do not fit them.
    """
    dpt = cfg.MODEL.DPT
    shapes = backbone.output_shape()
    stem = [i for i, name in enumerate(shapes) if name.startswith("stem")]
    if len(shapes) != 4:
        raise ValueError(
            "ExpeditedDPT fuses four features: four blocks in MODEL.VIT.OUT_BLOCKS, or two with a "
            f"hybrid, got {', '.join(shapes)}"
        )
    if backbone.vit.num_prefix_tokens == 0:
        raise ValueError(f"ExpeditedDPT needs a class token, {cfg.MODEL.VIT.NAME} has none")
    for i in stem:
        channels = shapes[f"stem{i}"].channels
        if dpt.NECK_CHANNELS[i] != channels:
            raise ValueError(
                f"MODEL.DPT.NECK_CHANNELS must start with the stem's channels, which are not "
                f"reassembled, expected {channels} at {i}, got {dpt.NECK_CHANNELS}"
            )
    return DPTConfig(
        hidden_size=backbone.vit.embed_dim,
        is_hybrid=bool(stem),
        neck_ignore_stages=stem,
        readout_type=dpt.READOUT,
        neck_hidden_sizes=list(dpt.NECK_CHANNELS),
        reassemble_factors=list(dpt.REASSEMBLE_FACTORS),
        fusion_hidden_size=dpt.FUSION_CHANNELS,
    )


def _truths(batched_inputs: list[dict[str, Any]]) -> list[Tensor]:
    for inputs in batched_inputs:
        if "depth" not in inputs:
            raise ValueError(
                "training needs inputs with 'depth', as INPUT.DATASET_MAPPER_NAME 'depth' makes "
                f"them, got the keys {sorted(inputs)}"
            )
    return [inputs["depth"] for inputs in batched_inputs]


def _resized(depth: Tensor, image_size: tuple[int, int], inputs: dict[str, Any]) -> Tensor:
    """Removes the padding from the depth of one image, and resizes it to the requested size."""
    cut = depth[: image_size[0], : image_size[1]]
    size = result_size(inputs, image_size)
    if cut.shape == size:
        return cut
    # Bicubic, as in the release. It may undershoot at an edge, but depth is never negative.
    resized = F.interpolate(cut[None, None], size=size, mode="bicubic", align_corners=False)
    return resized[0, 0].clamp(min=0)

"""Mask2Former as a Detectron2 meta-architecture: an expedited backbone with transformers' heads.

"Masked-attention Mask Transformer for Universal Image Segmentation", arXiv 2112.01527.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from expedite_d2.d2.config.keys import check_keys, setting
from expedite_d2.d2.config.rules import MASK2FORMER_KEYS, check
from expedite_d2.d2.modeling.autocast import autocast_to
from expedite_d2.d2.modeling.backbone.settings import check_features
from expedite_d2.d2.modeling.meta_arch.image_model import ImageModel
from expedite_d2.d2.modeling.meta_arch.losses import semantic_loss
from expedite_d2.d2.modeling.meta_arch.mask2former_heads import (
    build_pixel_decoder,
    build_transformer_decoder,
    mask2former_config,
)
from expedite_d2.d2.modeling.meta_arch.mask2former_inference import (
    instance_inference,
    panoptic_inference,
    select_instances,
    select_panoptic,
    semantic_inference,
)
from expedite_d2.d2.modeling.meta_arch.mask2former_loss import (
    MaskClassificationLoss,
    prepare_targets,
)
from expedite_d2.d2.modeling.meta_arch.masked_decoder import predict_masks
from expedite_d2.d2.modeling.meta_arch.resize import crop_and_resize, resize, result_size
from expedite_d2.d2.modeling.meta_arch.sliding_window import SlidingWindow
from expedite_d2.d2.modeling.upcast import upcast_layers
from expedite_d2.d2.provider import META_ARCH_REGISTRY, CfgNode, MetadataCatalog
from expedite_d2.profiling import profiler_range


@META_ARCH_REGISTRY.register()
class ExpeditedMask2Former(ImageModel):
    """Mask classification for panoptic, semantic and instance segmentation.

    Args:
        cfg: Mask2Former's keys and ``TEST.DTYPE``; ``MODEL.MASK_FORMER.SEM_AUX_WEIGHT`` is the
            weight of a per-pixel cross-entropy on the mask features in training.

    Raises:
        ValueError: a key that asks for something unsupported.
    """

    def __init__(self, cfg: CfgNode) -> None:
        check_keys(cfg, "MODEL.MASK_FORMER")
        check_keys(cfg, "MODEL.SEM_SEG_HEAD")
        check(cfg, MASK2FORMER_KEYS)
        super().__init__(cfg)
        head, former = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
        shapes = self.backbone.output_shape()
        check_features("MODEL.SEM_SEG_HEAD.IN_FEATURES", head.IN_FEATURES, shapes)
        self.in_features = sorted(head.IN_FEATURES, key=lambda name: shapes[name].stride)
        in_shapes = [shapes[name] for name in self.in_features]
        config = mask2former_config(cfg, in_shapes)
        self.pixel_decoder = build_pixel_decoder(config, in_shapes)
        self.transformer_module = build_transformer_decoder(config)
        self.class_predictor = nn.Linear(former.HIDDEN_DIM, head.NUM_CLASSES + 1)
        self.criterion = MaskClassificationLoss(config)
        self.deep_supervision = former.DEEP_SUPERVISION
        self.sem_aux_weight = setting(cfg, "MODEL.MASK_FORMER.SEM_AUX_WEIGHT")
        if self.sem_aux_weight > 0:
            self.sem_aux = nn.Conv2d(head.MASK_DIM, head.NUM_CLASSES, kernel_size=1)
        self.ignore_value = head.IGNORE_VALUE

        self.size_divisibility = former.SIZE_DIVISIBILITY
        if self.size_divisibility < 0:
            self.size_divisibility = self.backbone.size_divisibility

        self.semantic_on = former.TEST.SEMANTIC_ON
        self.panoptic_on = former.TEST.PANOPTIC_ON
        self.instance_on = former.TEST.INSTANCE_ON
        self.object_mask_threshold = former.TEST.OBJECT_MASK_THRESHOLD
        self.overlap_threshold = former.TEST.OVERLAP_THRESHOLD
        self.resize_before_inference = (
            former.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE
            or self.panoptic_on
            or self.instance_on
        )
        self.sliding_window = SlidingWindow.from_config(cfg)
        if self.sliding_window and (self.panoptic_on or self.instance_on or not self.semantic_on):
            raise ValueError(
                "TEST.SLIDING_WINDOW is for semantic segmentation alone: of "
                "MODEL.MASK_FORMER.TEST, set SEMANTIC_ON True, PANOPTIC_ON and INSTANCE_ON False"
            )
        self.topk_per_image = cfg.TEST.DETECTIONS_PER_IMAGE
        upcast_layers(self)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Losses in training, results at evaluation, in Detectron2's formats.

        Args:
            batched_inputs: for each image ``"image"`` (3, h, w), and ``"height"``, ``"width"`` of
                its result if that is not (h, w); in training ``"instances"`` (``gt_classes`` (N,),
                ``gt_masks`` (N, h, w)) and, for the per-pixel loss, ``"sem_seg"`` (h, w) int64.

        Returns:
            Training: a dict of scalar losses. Evaluation: for each image a dict with ``"sem_seg"``
            (K, H, W), ``"panoptic_seg"`` (ids (H, W) int32, list of segments) and ``"instances"``,
            each if ``MODEL.MASK_FORMER.TEST`` asks for it.
        """
        if self.sliding_window and not self.training:
            return self._sliding_results(self.sliding_window, batched_inputs)
        images = self.preprocess([inputs["image"] for inputs in batched_inputs])
        size = (images.tensor.shape[-2], images.tensor.shape[-1])
        if self.training:
            return self._losses(images.tensor, batched_inputs, size)
        class_logits, mask_logits = self.logits(images.tensor)
        with profiler_range("expedite_d2.post_processing", mask_logits):
            return [
                self._results(classes, masks, size, image_size, inputs)
                for classes, masks, image_size, inputs in zip(
                    class_logits, mask_logits, images.image_sizes, batched_inputs, strict=True
                )
            ]

    def logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns class and mask logits of the last decoder layer.

        Args:
            images: (B, 3, H, W), normalised, H and W multiples of ``size_divisibility``.

        Returns:
            class logits (B, Q, K + 1) and mask logits (B, Q, H/4, W/4), float32.
        """
        with self.eval_autocast():
            hidden, embeddings, features = self._decode(images)
            classes = self.class_predictor(hidden[-1].transpose(0, 1))
            masks = predict_masks(embeddings[-1], features)
        return classes.float(), masks.float()

    def _decode(self, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
        """Returns queries (Q, B, C) and mask embeddings of all layers, and the mask features."""
        with profiler_range("expedite_d2.backbone", images):
            features = self.backbone(images)
        maps = [features[name].float() for name in self.in_features]
        # Training is always in float32 here, as in Mask2Former.
        exact = autocast_to(torch.float32, self.device)
        with (
            profiler_range("expedite_d2.pixel_decoder", images),
            exact if self.training else contextlib.nullcontext(),
        ):
            pixels = self.pixel_decoder(maps)
        with profiler_range("expedite_d2.transformer_decoder", images):
            decoded = self.transformer_module(
                multi_scale_features=pixels.multi_scale_features,
                mask_features=pixels.mask_features,
            )
        return (
            decoded.intermediate_hidden_states,
            decoded.masks_queries_logits,
            pixels.mask_features,
        )

    def _losses(
        self, images: Tensor, batched_inputs: list[dict[str, Any]], size: tuple[int, int]
    ) -> dict[str, Tensor]:
        hidden, embeddings, mask_features = self._decode(images)
        if not self.deep_supervision:
            hidden, embeddings = hidden[-1:], embeddings[-1:]
        masks = [predict_masks(layer, mask_features).float() for layer in embeddings]
        classes = [self.class_predictor(layer.transpose(0, 1)).float() for layer in hidden]
        count = classes[0].shape[-1] - 1
        targets, labels = prepare_targets(batched_inputs, size, count, images.device)
        with autocast_to(torch.float32, self.device):
            losses = self.criterion(masks, classes, targets, labels)
            if self.sem_aux_weight > 0:
                pixel_logits = self.sem_aux(mask_features.float())
                loss = semantic_loss(pixel_logits, batched_inputs, size, self.ignore_value)
                losses["loss_sem_aux"] = self.sem_aux_weight * loss
        return losses

    def _sliding_results(
        self, window: SlidingWindow, batched_inputs: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Returns semantic results, with scores averaged over the crops of each image."""
        # Every crop is padded separately.
        pictures = [inputs["image"] for inputs in batched_inputs]
        images = self.preprocess(pictures, size_divisibility=0)
        scores = window.predict(images.tensor, self._crop_scores)
        return [
            {"sem_seg": crop_and_resize(score, image_size, result_size(inputs, image_size))}
            for score, image_size, inputs in zip(
                scores, images.image_sizes, batched_inputs, strict=True
            )
        ]

    def _crop_scores(self, crops: Tensor) -> Tensor:
        """Returns class scores of each pixel: (B, 3, h, w) -> (B, K, h, w)."""
        height, width = crops.shape[-2:]
        step = max(self.size_divisibility, 1)
        padded = F.pad(crops, (0, -width % step, 0, -height % step))
        size = (padded.shape[-2], padded.shape[-1])
        scores = [
            semantic_inference(classes, resize(masks, size))
            for classes, masks in zip(*self.logits(padded), strict=True)
        ]
        return torch.stack(scores)[..., :height, :width]

    def _results(
        self,
        class_logits: Tensor,
        mask_logits: Tensor,
        size: tuple[int, int],
        image_size: tuple[int, int],
        inputs: dict[str, Any],
    ) -> dict[str, Any]:
        """Returns the results of one image: class logits (Q, K + 1), mask logits (Q, H/4, W/4)."""
        asked = result_size(inputs, image_size)
        if not self.resize_before_inference:
            scores = semantic_inference(class_logits, resize(mask_logits, size))
            return {"sem_seg": crop_and_resize(scores, image_size, asked)}

        queries = torch.arange(len(class_logits), device=class_logits.device)
        panoptic = pairs = queries[:0]
        if self.panoptic_on:
            panoptic = select_panoptic(class_logits, self.object_mask_threshold)
        if self.instance_on:
            # Beside panoptic results, only things are instances.
            things = self._thing_ids() if self.panoptic_on else None
            pairs, labels, scores = select_instances(class_logits, self.topk_per_image, things)
        # Resizing masks costs the most: only those that a result needs are resized.
        used = queries if self.semantic_on else torch.cat([panoptic, pairs]).unique()
        masks = crop_and_resize(resize(mask_logits[used], size), image_size, asked)
        place = torch.zeros_like(queries)
        place[used] = torch.arange(len(used), device=used.device)

        results: dict[str, Any] = {}
        if self.semantic_on:
            results["sem_seg"] = semantic_inference(class_logits, masks)
        if self.panoptic_on:
            results["panoptic_seg"] = panoptic_inference(
                class_logits[panoptic],
                masks[place[panoptic]],
                self._thing_ids(),
                self.overlap_threshold,
            )
        if self.instance_on:
            results["instances"] = instance_inference(labels, scores, masks[place[pairs]])
        return results

    def _thing_ids(self) -> Collection[int]:
        ids = MetadataCatalog.get(self.dataset_name).get("thing_dataset_id_to_contiguous_id")
        if ids is None:
            raise ValueError(
                "panoptic inference needs to know which classes are things: the metadata of "
                f"{self.dataset_name!r} has no thing_dataset_id_to_contiguous_id"
            )
        return set(cast(dict[int, int], ids).values())

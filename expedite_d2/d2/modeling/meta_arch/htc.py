"""Hybrid Task Cascade as a Detectron2 meta-architecture, with the additions of "HTC++".

"Hybrid Task Cascade for Instance Segmentation", arXiv 1901.07518. The "++" of Swin transformer's
authors: training at jittered scales (the data mapper's), soft suppression of overlapping boxes, and
evaluation at several scales, mirrored and not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from expedite_d2.d2.config.keys import check_keys
from expedite_d2.d2.config.rules import DETECTOR_KEYS, check, each, whole
from expedite_d2.d2.modeling.meta_arch.cascade import cascade_stages
from expedite_d2.d2.modeling.meta_arch.detection_inference import Suppression, View, augmented
from expedite_d2.d2.modeling.meta_arch.detector import PyramidDetector
from expedite_d2.d2.modeling.meta_arch.regions import RegionFeatures
from expedite_d2.d2.modeling.meta_arch.semantic_heads import SemanticBranch
from expedite_d2.d2.modeling.upcast import upcast_layers
from expedite_d2.d2.provider import META_ARCH_REGISTRY, CfgNode, ImageList


@META_ARCH_REGISTRY.register()
class ExpeditedHTC(PyramidDetector):
    """Detection and instance segmentation by a cascade of box and mask heads.

    Args:
        cfg: ``MODEL.HTC`` and Detectron2's keys of two-stage detectors; ``TEST.AUG`` for evaluation
            on several views.

    Raises:
        ValueError: a key that asks for something unsupported.
    """

    def __init__(self, cfg: CfgNode) -> None:
        check_keys(cfg, "MODEL.HTC")
        check(cfg, DETECTOR_KEYS)
        if cfg.TEST.AUG.ENABLED:
            check(cfg, {"TEST.AUG.MIN_SIZES": each(whole(1)), "TEST.AUG.MAX_SIZE": whole(1)})
        super().__init__(cfg, cascade_stages(cfg), Suppression.from_config(cfg, soft=True))
        self.semantic_branch = (
            SemanticBranch(cfg, self.shapes) if cfg.MODEL.HTC.SEMANTIC_ON else None
        )
        self.augmentation: Any = cfg.TEST.AUG if cfg.TEST.AUG.ENABLED else None
        upcast_layers(self)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Losses in training, results at evaluation, in Detectron2's formats.

        Args:
            batched_inputs: for each image ``"image"`` (3, h, w), and ``"height"``, ``"width"`` of
                its result if that is not (h, w); in training ``"instances"`` (``gt_classes`` (N,),
                ``gt_masks`` (N, h, w)) and, for the semantic branch, ``"sem_seg"`` (h, w) int64.

        Returns:
            Training: a dict of scalar losses. Evaluation: for each image a dict with
            ``"instances"``: ``pred_boxes``, ``scores``, ``pred_classes`` and ``pred_masks``
            (N, H, W) bool.
        """
        images = [inputs["image"] for inputs in batched_inputs]
        if self.training:
            return self._losses(self.preprocess(images), batched_inputs)
        if self.augmentation is None:
            batch = self.preprocess(images)
            views = [[view] for view in self._views(batch)]
        else:
            views = [self._augmented_views(image) for image in images]
        return [
            {"instances": self.instances(one, inputs, _size(inputs["image"]))}
            for one, inputs in zip(views, batched_inputs, strict=True)
        ]

    def regions(self, maps: Mapping[str, Tensor]) -> RegionFeatures:
        """Returns the maps from which regions are pooled: the pyramid and semantic features."""
        return self._semantic_regions(maps)[0]

    def _semantic_regions(self, maps: Mapping[str, Tensor]) -> tuple[RegionFeatures, Tensor | None]:
        """Returns the maps for regions, and the hidden map from which the semantic logits come."""
        regions = super().regions(maps)
        if self.semantic_branch is None:
            return regions, None
        hidden, embedding = self.semantic_branch(maps)
        stride = self.semantic_branch.stride
        return regions._replace(semantic=embedding.float(), semantic_stride=stride), hidden

    def _losses(
        self, images: ImageList, batched_inputs: Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor]:
        maps = self.pyramid(images.tensor)
        regions, hidden = self._semantic_regions(maps)
        losses = self.detection_losses(maps, regions, batched_inputs, images.image_sizes)
        if self.semantic_branch is not None:
            logits = self.semantic_branch.predictor(hidden)
            size = (images.tensor.shape[-2], images.tensor.shape[-1])
            losses["loss_sem_seg"] = self.semantic_branch.loss(logits, batched_inputs, size)
        return losses

    def _views(self, images: ImageList, flipped: bool = False) -> list[View]:
        with self.eval_autocast():
            maps = self.pyramid(images.tensor)
            return self.views(maps, self.regions(maps), images.image_sizes, flipped)

    def _augmented_views(self, image: Tensor) -> list[View]:
        aug = self.augmentation
        sizes = augmented(image, aug.MIN_SIZES, aug.MAX_SIZE, aug.FLIP)
        return [view for one, flip in sizes for view in self._views(self.preprocess([one]), flip)]


def _size(image: Tensor) -> tuple[int, int]:
    return image.shape[-2], image.shape[-1]

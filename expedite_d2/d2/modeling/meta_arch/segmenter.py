"""Segmenter as a Detectron2 meta-architecture: a plain ViT and a decoder for its tokens.

"Segmenter: Transformer for Semantic Segmentation", arXiv 2105.05633.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

from expedite_d2.d2.config.keys import check_keys
from expedite_d2.d2.modeling.backbone.settings import check_reduces
from expedite_d2.d2.modeling.meta_arch.image_model import ImageModel
from expedite_d2.d2.modeling.meta_arch.losses import semantic_loss
from expedite_d2.d2.modeling.meta_arch.resize import crop_and_resize, result_size
from expedite_d2.d2.modeling.meta_arch.segmenter_decoders import LinearDecoder, MaskDecoder
from expedite_d2.d2.modeling.meta_arch.sliding_window import SlidingWindow
from expedite_d2.d2.modeling.upcast import upcast_layers
from expedite_d2.d2.provider import META_ARCH_REGISTRY, CfgNode
from expedite_d2.profiling import profiler_range
from expedite_d2.reducers import reconstruct

#: Where an expedited Segmenter returns to full resolution.
Placement = Literal["features", "paper"]


@META_ARCH_REGISTRY.register()
class ExpeditedSegmenter(ImageModel):
    """Semantic segmentation by classifying the tokens of a ViT.

    Args:
        cfg: ``MODEL.SEGMENTER``, ``MODEL.SEM_SEG_HEAD.{NUM_CLASSES, IGNORE_VALUE}``,
            ``TEST.SLIDING_WINDOW`` and ``TEST.DTYPE``; ``MODEL.BACKBONE.NAME`` is an ExpeditedViT.

    Raises:
        ValueError: a decoder or a placement that does not exist.
    """

    def __init__(self, cfg: CfgNode) -> None:
        check_keys(cfg, "MODEL.SEGMENTER")
        super().__init__(cfg)
        shapes = self.backbone.output_shape()
        if list(shapes) != ["last"]:
            raise ValueError(
                'ExpeditedSegmenter reads nothing but the last block: MODEL.VIT.OUT_BLOCKS ["last"]'
                f" without a hybrid's stem, got {', '.join(shapes)}"
            )
        self.decoder = _build_decoder(cfg, shapes["last"].channels)
        self.ignore_value = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
        self.size_divisibility = self.backbone.size_divisibility
        self.sliding_window = SlidingWindow.from_config(cfg)
        if self.sliding_window is not None:
            check_reduces(self.backbone, self.sliding_window.crop, "TEST.SLIDING_WINDOW.CROP")
        elif cfg.INPUT.MIN_SIZE_TEST > 0:
            largest = (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
            check_reduces(self.backbone, largest, "INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST")
        self.placement: Placement = cfg.MODEL.SEGMENTER.PLACEMENT
        self.backbone.keep_clusters = self.placement == "paper"
        upcast_layers(self)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """The loss in training, class probabilities at evaluation, in Detectron2's formats.

        Args:
            batched_inputs: for each image ``"image"`` (3, h, w), and ``"height"``, ``"width"`` of
                its result if that is not (h, w); in training ``"sem_seg"`` (h, w) int64.

        Returns:
            Training: ``{"loss_sem_seg"}``. Evaluation: for each image ``{"sem_seg"}``, (K, H, W).
        """
        # `logits` pads them, or each crop of them.
        pictures = [inputs["image"] for inputs in batched_inputs]
        images = self.preprocess(pictures, size_divisibility=0)
        logits = self.logits(images.tensor)
        if self.training:
            size = (images.tensor.shape[-2], images.tensor.shape[-1])
            loss = semantic_loss(logits, batched_inputs, size, self.ignore_value)
            return {"loss_sem_seg": loss}
        results = []
        with profiler_range("expedite_d2.post_processing", logits):
            for scores, image_size, inputs in zip(
                logits, images.image_sizes, batched_inputs, strict=True
            ):
                scores = crop_and_resize(scores, image_size, result_size(inputs, image_size))
                results.append({"sem_seg": scores.softmax(0)})
        return results

    def logits(self, images: Tensor) -> Tensor:
        """Returns class logits of each pixel; at evaluation by sliding window if that is enabled.

        Args:
            images: (B, 3, H, W), normalised, of any size.

        Returns:
            (B, K, H, W) float32.
        """
        if self.training or self.sliding_window is None:
            return self._pixel_logits(images)
        return self.sliding_window.predict(images, self._pixel_logits)

    def _pixel_logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, K, H, W); images are zero-padded to whole patches."""
        height, width = images.shape[-2:]
        step = self.size_divisibility
        padded = F.pad(images, (0, -width % step, 0, -height % step))
        with self.eval_autocast():
            logits = self._token_logits(padded)
        maps = logits.permute(0, 3, 1, 2).float()
        maps = F.interpolate(maps, padded.shape[-2:], mode="bilinear", align_corners=False)
        return maps[..., :height, :width]

    def _token_logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, h, w, K), the logits of each patch."""
        with profiler_range("expedite_d2.backbone", images):
            features = self.backbone(images, as_tokens=True)
        _, tokens = features.tokens["last"]
        with profiler_range("expedite_d2.decoder", images):
            logits = self.decoder(tokens)
            if features.clustering is None:
                return logits
            # Logits have no residual: those of the clusters replace those of the tokens.
            return reconstruct(logits, features.clustering._replace(tokens=None, centres=None))


def _build_decoder(cfg: CfgNode, in_channels: int) -> LinearDecoder | MaskDecoder:
    settings, num_classes = cfg.MODEL.SEGMENTER, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    if settings.DECODER == "linear":
        return LinearDecoder(num_classes, in_channels)
    dim = settings.DIM or in_channels
    if dim % settings.NUM_HEADS:
        raise ValueError(
            "MODEL.SEGMENTER.NUM_HEADS must divide the decoder's width "
            f"{dim}, got {settings.NUM_HEADS}"
        )
    return MaskDecoder(
        num_classes,
        in_channels,
        dim,
        settings.DEPTH,
        settings.NUM_HEADS,
        settings.MLP_RATIO,
        settings.DROPOUT,
        settings.DROP_PATH_RATE,
    )

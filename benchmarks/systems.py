"""The models that are timed, and the outside baseline of one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.common import ROOT, difference
from expedite_d2.d2 import CfgNode
from expedite_d2.d2.checkpoint.to_transformers import to_transformers
from expedite_d2.d2.comparison.compare import build_models
from expedite_d2.d2.config import load_config
from expedite_d2.reducers import Correction
from expedite_d2.reducers.correction import fingerprint
from expedite_d2.tools import on_meta
from expedite_d2.tools.detail_maps import Subject

# Ours computes the same as transformers' up to the order of float32 sums.
TOLERANCE = 1e-3


class System(NamedTuple):
    """A config, the sizes at which it is timed, and what makes it tiny for tests."""

    config: str
    sizes: Sequence[tuple[int, int]]
    tiny: Sequence[Any] = ()


_SWIN_SIZES = [(1152, 1152), (1024, 1024), (640, 640)]
_TINY_SWIN = [
    *("MODEL.SWIN.EMBED_DIM", 12, "MODEL.SWIN.DEPTHS", [1, 1, 2, 1]),
    *("MODEL.SWIN.NUM_HEADS", [1, 1, 2, 2], "MODEL.SWIN.WINDOW_SIZE", 4),
    *("MODEL.EXPEDITE.ALPHA", 3, "MODEL.EXPEDITE.CLUSTERS", [2, 2]),
]
_TINY_MASK2FORMER = [
    *_TINY_SWIN,
    *("MODEL.SEM_SEG_HEAD.CONVS_DIM", 32, "MODEL.SEM_SEG_HEAD.MASK_DIM", 32),
    *("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 1, "MODEL.MASK_FORMER.DEC_LAYERS", 2),
    *("MODEL.MASK_FORMER.HIDDEN_DIM", 32, "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 5),
    *("MODEL.MASK_FORMER.NHEADS", 4, "MODEL.MASK_FORMER.DIM_FEEDFORWARD", 32),
]
_TINY_VIT = [
    *("MODEL.VIT.NAME", "vit_tiny_patch16_224", "MODEL.VIT.IMG_SIZE", 64),
    *("MODEL.VIT.EMBED_DIM", 24, "MODEL.VIT.DEPTH", 4, "MODEL.VIT.NUM_HEADS", 2),
    *("MODEL.EXPEDITE.ALPHA", 2, "MODEL.EXPEDITE.CLUSTERS", [3, 4]),
]
_TINY_SEGMENTER = [*_TINY_VIT, "MODEL.SEGMENTER.DEPTH", 1, "MODEL.SEGMENTER.NUM_HEADS", 2]
_TINY_DPT = [
    *_TINY_VIT,
    *("MODEL.VIT.OUT_BLOCKS", [0, 1, 2, 3], "MODEL.DPT.NECK_CHANNELS", [8, 16, 24, 24]),
    *("MODEL.DPT.REASSEMBLE_FACTORS", [4, 2, 1, 0.5], "MODEL.DPT.FUSION_CHANNELS", 16),
]
_MERGES = ["MODEL.EXPEDITE.MERGE_AT", [1, 2, 3], "MODEL.EXPEDITE.KEEP", 0.8]

SYSTEMS = {
    "panoptic": System(
        "configs/coco/panoptic/mask2former_swin_large_expedited.yaml",
        _SWIN_SIZES,
        _TINY_MASK2FORMER,
    ),
    "semantic": System(
        "configs/ade20k/semantic/mask2former_swin_large_expedited.yaml",
        _SWIN_SIZES,
        _TINY_MASK2FORMER,
    ),
    "instance": System(
        "configs/coco/instance/mask2former_swin_large_expedited.yaml",
        _SWIN_SIZES,
        _TINY_MASK2FORMER,
    ),
    "segmenter": System(
        "configs/ade20k/semantic/segmenter_vit_large_expedited.yaml",
        [(640, 640)],
        _TINY_SEGMENTER,
    ),
    "dpt": System("configs/kitti/depth/dpt_vit_hybrid_expedited.yaml", [(352, 1216)], _TINY_DPT),
    "panoptic_half": System(
        "configs/coco/panoptic/mask2former_swin_large_half.yaml",
        [(1024, 1024), (1152, 1152)],
        _TINY_MASK2FORMER,
    ),
    "segmenter_half": System(
        "configs/ade20k/semantic/segmenter_vit_large_half.yaml",
        [(640, 640)],
        [*_TINY_SEGMENTER, *_MERGES],
    ),
    "dpt_half": System(
        "configs/kitti/depth/dpt_vit_hybrid_half.yaml", [(352, 1216)], [*_TINY_DPT, *_MERGES]
    ),
}
TITLES = {
    "panoptic": "Mask2Former Swin-L, COCO panoptic setting",
    "semantic": "Mask2Former Swin-L, ADE20K semantic setting",
    "instance": "Mask2Former Swin-L, COCO instance setting",
    "segmenter": "Segmenter ViT-L, ADE20K setting",
    "dpt": "DPT-hybrid, KITTI setting",
    "panoptic_half": "Mask2Former Swin-L, COCO panoptic, half",
    "segmenter_half": "Segmenter ViT-L, ADE20K, half",
    "dpt_half": "DPT-hybrid, KITTI, half",
}
# What detail maps need of a config: the paper's settings replace the tokens' own detail, and its
# Segmenter keeps the clusters up to the logits.
WITH_DETAIL = [
    *("MODEL.EXPEDITE.RECONSTRUCTION", "residual", "MODEL.SEGMENTER.PLACEMENT", "features"),
]
TINY_SIZE = (64, 96)


def sizes(system: System, quick: bool) -> Sequence[tuple[int, int]]:
    """Rows and columns of the images."""
    return [TINY_SIZE] if quick else system.sizes


def config(system: System, device: str, quick: bool, opts: Sequence[Any] = ()) -> CfgNode:
    """The system's config on a device, with random weights."""
    fixed = ["MODEL.DEVICE", device, "MODEL.WEIGHTS", "", "TEST.SLIDING_WINDOW.ENABLED", False]
    tiny = system.tiny if quick else []
    return load_config(str(ROOT / system.config), [*fixed, *tiny, *opts])


def pair(cfg: CfgNode) -> dict[str, Any]:
    """The baseline and the expedited model, on one set of random weights."""
    torch.manual_seed(0)
    models = build_models(cfg)
    for model in models:
        model.requires_grad_(False)
    return dict(zip(("baseline", "expedited"), models, strict=True))


def add_detail_maps(backbone: Any, size: tuple[int, int]) -> None:
    """Give an expedited backbone small random detail maps wherever its model reads it.

    Args:
        backbone: that reconstructs by "residual"; its weights are not loaded again.
        size: of images with which the outputs that are read are found, on `meta`.
    """
    sketch = on_meta(backbone)
    subject, images = Subject(sketch), torch.empty(1, 3, *size, device="meta")
    with torch.inference_mode(), subject.outputs(subject.numbers) as outputs:
        numbers = subject.read(lambda: sketch(images))
    maps = {}
    for number in numbers:
        steps = sum(step.at <= number for step in subject.reduction.steps)
        width = outputs[number][0].shape[-1]
        maps[number] = (0.1 * width**-0.5 * torch.randn(steps, width, width), torch.zeros(width))
    subject = Subject(backbone)
    weights = fingerprint(subject.encoder)
    assert weights is not None  # they are not on `meta`
    subject.reduction = replace(subject.reduction, correction=Correction(maps, weights))


class Outside(nn.Module):
    """transformers' own Mask2Former on Swin, with the same outputs as ours."""

    def __init__(self, cfg: CfgNode, ours: nn.Module) -> None:
        super().__init__()
        self.model = to_transformers(cfg, ours)

    def logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (B, Q, K + 1) and mask logits (B, Q, H/4, W/4)."""
        outputs = self.model(pixel_values=images)
        return outputs.class_queries_logits, outputs.masks_queries_logits


def outside(cfg: CfgNode, baseline: Any) -> Outside:
    """transformers' model with the weights of our plain one, which must have the same outputs.

    Raises:
        ValueError: the weights do not fit, or the baseline's outputs differ from transformers'.
    """
    model = Outside(cfg, baseline).to(cfg.MODEL.DEVICE).requires_grad_(False)
    images = torch.randn(1, 3, 128, 192, device=cfg.MODEL.DEVICE)
    with torch.inference_mode():
        ours, theirs = baseline.logits(images), model.logits(images)
    error = max(map(difference, ours, theirs))
    if not error <= TOLERANCE:
        raise ValueError(f"the baseline differs from transformers' model by {error:.2g}")
    return model


def run(
    model: Any,
    part: str,
    dtype: torch.dtype,
    images: Tensor,
    wrap: Callable[[Any], Any] = lambda function: function,
) -> Callable[[], Any]:
    """A call of the backbone or, up to its logits, of the whole model in one arithmetic."""
    half = dtype != torch.float32
    if hasattr(model, "eval_dtype"):
        model.eval_dtype = dtype
    function = wrap(model.backbone if part == "backbone" else model.logits)

    def call() -> Any:
        # Ours enters the same in `logits`, except where it keeps float32 on purpose.
        with torch.autocast(images.device.type, dtype if half else None, enabled=half):
            return function(images)

    return call

"""Base of the meta-architectures: the backbone, batches of images, and autocast at evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from expedite_d2.adapters import is_expedited
from expedite_d2.d2.config.keys import check_keys
from expedite_d2.d2.modeling.autocast import autocast_to
from expedite_d2.d2.provider import CfgNode, ImageList, build_backbone


class ImageModel(nn.Module):
    """A model of images, on the backbone ``MODEL.BACKBONE.NAME``.

    Args:
        cfg: the config; read here are the backbone's keys, ``MODEL.PIXEL_MEAN``,
            ``MODEL.PIXEL_STD``, ``TEST.DTYPE`` and ``DATASETS``.

    Raises:
        ValueError: a key that asks for something unsupported, or a backbone that is to be expedited
            and does not know how.

    Attributes:
        backbone: the backbone.
        pixel_mean, pixel_std: (3, 1, 1), mean and deviation of each channel.
        size_divisibility: number of which the sides of a batch are multiples; set by each model.
        eval_dtype: type to which evaluation is autocast; float32 for none.
        dataset_name: first data set of the config, whose metadata describes the classes; "" for
            none.
    """

    pixel_mean: Tensor
    pixel_std: Tensor
    size_divisibility: int

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        check_keys(cfg, "TEST")
        self.backbone: Any = build_backbone(cfg)
        if cfg.MODEL.EXPEDITE.ENABLED and not is_expedited(self.backbone):
            name = cfg.MODEL.BACKBONE.NAME
            raise ValueError(
                f"MODEL.EXPEDITE.ENABLED must be False for {name}, which does not read it: make it "
                "MODEL.EXPEDITE.BACKBONE, and MODEL.BACKBONE.NAME ExpeditedBackbone, got True"
            )
        for name in ("pixel_mean", "pixel_std"):
            values = torch.tensor(cfg.MODEL[name.upper()]).view(-1, 1, 1)
            self.register_buffer(name, values, persistent=False)
        self.eval_dtype: torch.dtype = getattr(torch, cfg.TEST.DTYPE)
        datasets = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
        self.dataset_name: str = datasets[0] if datasets else ""

    @property
    def device(self) -> torch.device:
        """Device of the model and of its inputs."""
        return self.pixel_mean.device

    def preprocess(
        self, images: Sequence[Tensor], size_divisibility: int | None = None
    ) -> ImageList:
        """Normalises images and pads them to a batch.

        Args:
            images: each (3, h, w).
            size_divisibility: number of which the sides of the batch are multiples, 0 for any; None
                for the model's own.
        """
        if size_divisibility is None:
            size_divisibility = self.size_divisibility
        normalised = [
            (image.to(self.device) - self.pixel_mean) / self.pixel_std for image in images
        ]
        return ImageList.from_tensors(normalised, size_divisibility)

    def eval_autocast(self) -> contextlib.AbstractContextManager:
        """Returns autocast to `eval_dtype` at evaluation.

        In training, and where that type is float32, the caller's choice stays.
        """
        if self.training or self.eval_dtype == torch.float32:
            return contextlib.nullcontext()
        return autocast_to(self.eval_dtype, self.device)

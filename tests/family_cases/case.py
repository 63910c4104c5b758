"""A kind of encoder, and its expedited pass composed by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from expedite_d2.reducers import Reduction, reconstruct, reduce


def randomised(build: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> Any:
    """A model with weights large enough that a mistake shows, the same each time."""
    torch.manual_seed(0)
    model = build(*args, **kwargs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = 1.0 if "relative_position" in name else 0.25 if parameter.dim() > 1 else 0.1
            noise = std * torch.randn(parameter.shape)
            parameter.add_(noise) if parameter.dim() < 2 else parameter.copy_(noise)
    return model.eval()


def images(height: int, width: int, batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


class Case:
    """One kind of encoder: how to make, feed and step through it.

    Attributes:
        size: of its images.
        others: further sizes that it takes: square, and with an odd number of patches per side.
        patch: side of its patches.
        alpha, clusters: settings that fit it.
        prefixes: its class, distillation and register tokens.
        pickles: whether the plain model can be pickled once it has run.
        compiled: whether it is compiled as well, which takes seconds: not where the plain model
            cannot be, or another kind goes the same way.
    """

    size = (32, 40)
    patch = 4
    prefixes = 1
    pickles = True
    compiled = True
    alpha, clusters = 1, (4, 3)

    others: list[tuple[int, int]] = [(32, 32), (36, 52)]

    def __init__(self, make: Callable[[], nn.Module], **attributes: Any) -> None:
        self.make = make
        self.__dict__.update(attributes)

    def images(self) -> Tensor:
        return images(*self.size)

    @property
    def grid(self) -> tuple[int, int]:
        return self.size[0] // self.patch, self.size[1] // self.patch

    def blocks(self, model: Any) -> list[nn.Module]:
        return list(model.blocks)

    def embed(self, model: Any, x: Tensor) -> Tensor:
        return model.norm_pre(model._pos_embed(model.patch_embed(x)))

    def block(self, model: Any, number: int, x: Tensor, cells: tuple[int, int] | None) -> Tensor:
        return model.blocks[number](x)

    def run(self, model: Any, x: Tensor) -> Tensor:
        """The model as its users call it; the last output, unpooled."""
        return model(x)

    def normalised(self, model: Any, x: Tensor) -> Tensor:
        return model.norm(x)

    @torch.no_grad()
    def by_hand(self, model: Any, x: Tensor, reduction: Reduction) -> list[Tensor]:
        """Outputs of all blocks, those of the span reconstructed."""
        outputs, tokens = [], self.embed(model, x)
        count = len(self.blocks(model))
        for number in range(reduction.alpha):
            tokens = self.block(model, number, tokens, None)
            outputs.append(tokens)
        p = self.prefixes
        low, clustering = reduce(tokens[:, p:].unflatten(1, self.grid), reduction)
        cells = (low.shape[1], low.shape[2])
        tokens = torch.cat([tokens[:, :p], low.flatten(1, 2)], 1)
        for number in range(reduction.alpha, count):
            tokens = self.block(model, number, tokens, cells)
            low = tokens[:, p:].unflatten(1, cells)
            full = reconstruct(low, clustering).flatten(1, 2)
            outputs.append(torch.cat([tokens[:, :p], full], 1))
        return outputs

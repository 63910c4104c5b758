"""A kind of encoder, and its expedited pass composed by hand."""

from __future__ import annotations

import itertools
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


def weights_of_centres(grid: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """(h * w, H * W): how much each token has of what is read linearly at the centres of cells."""
    weights = torch.zeros(*cells, *grid)
    for place in itertools.product(*map(range, (*cells, *grid))):
        centres = ((p + 0.5) * n / c - 0.5 for p, n, c in zip(place, grid, cells, strict=False))
        inside = (min(max(y, 0), n - 1) for y, n in zip(centres, grid, strict=True))
        near = [max(1 - abs(y - p), 0) for y, p in zip(inside, place[2:], strict=True)]
        weights[place] = near[0] * near[1]
    return weights.flatten(2).flatten(0, 1)


class Case:
    """One kind of encoder: how to make, feed and step through it.

    Attributes:
        size: of its images.
        others: further sizes that it takes: square, and with an odd number of patches per side.
        patch: side of its patches.
        alpha, clusters: settings that fit it.
        prefixes: its class, distillation and register tokens.
        suffixes: its detection tokens.
        pickles: whether the plain model can be pickled once it has run.
        compiled: whether it is compiled as well, which takes seconds: not where the plain model
            cannot be, or another kind goes the same way.
    """

    size = (32, 40)
    patch = 4
    prefixes = 1
    suffixes = 0
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

    def between(self, model: Any, number: int, x: Tensor, weights: Tensor | None) -> Tensor:
        """What reaches the block after this one, from its output.

        Reduced tokens are of so much of each of the image's tokens: (n, H * W), or so for each
        image.
        """
        return x

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Prefixes, the image's tokens, suffixes."""
        p, end = self.prefixes, x.shape[1] - self.suffixes
        return x[:, :p], x[:, p:end], x[:, end:]

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
            tokens = self.between(model, number, tokens, None)
        first, image, last = self.split(tokens)
        low, clustering = reduce(image.unflatten(1, self.grid), reduction)
        cells = (low.shape[1], low.shape[2])
        weights = weights_of_centres(self.grid, cells)
        tokens = torch.cat([first, low.flatten(1, 2), last], 1)
        for number in range(reduction.alpha, count):
            tokens = self.block(model, number, tokens, cells)
            first, low, last = self.split(tokens)
            full = reconstruct(low.unflatten(1, cells), clustering).flatten(1, 2)
            outputs.append(torch.cat([first, full, last], 1))
            tokens = self.between(model, number, tokens, weights)
        return outputs

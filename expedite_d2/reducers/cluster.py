"""One-shot clustering: a map of tokens becomes a smaller map of cluster centres."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from expedite_d2.ops._checks import integer, real
from expedite_d2.ops.token_reconstruct import token_reconstruct
from expedite_d2.ops.token_reduce import token_reduce
from expedite_d2.profiling import profiler_range
from expedite_d2.reducers.correction import DetailMap
from expedite_d2.reducers.state import Grid, Points

# The automatic temperature is c / T, where T is the mean squared distance of the tokens to their
# nearest initial centre. These c kept the most accuracy: windows hold few, similar tokens and need
# sharper weights than whole images.
SHARPNESS_IN_WINDOWS = 32.0
SHARPNESS_ON_IMAGES = 8.0


@dataclass(frozen=True)
class Cluster:
    """Clusters the tokens before one block; that block and those after it run on the centres.

    Attributes:
        at: number of the block, counted from the first of the encoder, which is 0; so also the
            number of blocks that run at full resolution (alpha).
        grid: rows and columns of the cluster grid of a window or, without windows, of the image;
            or two ratios in (0, 1) of the rows and columns of tokens.
        iterations: rounds of soft k-means (kappa); 0 keeps the average-pooled centres.
        neighbourhood: side length, in cells, of the square of candidate cells around a token's home
            cell; odd (lambda).
        topk: number of centres that each token is reconstructed from.
        temperature: factor (tau) of squared distances; 0.0 measures it for each image.
    """

    at: int
    grid: tuple[int, int] | tuple[float, float]
    iterations: int = 5
    neighbourhood: int = 5
    topk: int = 4
    temperature: float = 0.0

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "at": _checked_int("at (alpha)", self.at, minimum=0),
            "grid": _checked_grid(self.grid),
            "iterations": _checked_int("iterations", self.iterations, minimum=0),
            "neighbourhood": _checked_int("neighbourhood", self.neighbourhood, minimum=1),
            "topk": _checked_int("topk", self.topk, minimum=1),
            "temperature": _checked_temperature(self.temperature),
        }
        if checked["neighbourhood"] % 2 == 0:
            raise ValueError(f"neighbourhood must be odd, got {self.neighbourhood}")
        # The class is frozen. numpy's numbers become Python's own, and lists, such as those of
        # configuration files, become tuples.
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def cells(self, height: int, width: int) -> tuple[int, int]:
        """Returns rows and columns of clusters for a window or image of height x width tokens."""
        rows, columns = self.grid
        if isinstance(rows, float) or isinstance(columns, float):
            # int(): sizes are tensors while a model is traced.
            return max(1, round(rows * int(height))), max(1, round(columns * int(width)))
        return rows, columns

    def reduced(self, height: int, width: int) -> tuple[int, int]:
        """Returns rows and columns to which an unwindowed image of height x width is reduced.

        An image with no more tokens than the cluster grid has cells keeps them.
        """
        rows, columns = self.cells(height, width)
        return (rows, columns) if rows * columns < height * width else (height, width)

    def reduce(
        self,
        tokens: Tensor,
        layout: Grid | Points,
        window: tuple[int, int] | None,
        residual: bool,
    ) -> tuple[Tensor, Grid, Clustering]:
        """Clusters a map of tokens.

        An image with no more tokens than the cluster grid has cells is left as it is, with a
        warning.

        Args:
            tokens: (B, H, W, C).
            layout: their grid.
            window: rows and columns of the windows, each of which is clustered separately; None
                clusters the image as a whole.
            residual: whether the tokens keep their own detail when they are reconstructed.

        Returns:
            The centres (B, h, w, C), their grid, and what `Clustering.reconstruct` needs.
        """
        if tokens.dim() != 4:
            raise ValueError(
                f"Cluster takes a map of tokens (B, H, W, C), got {tuple(tokens.shape)}: a step "
                "before it left no grid"
            )
        height, width = tokens.shape[1:3]
        clusters = self.cells(*(window or (height, width)))
        if window is None and self.reduced(height, width) == (height, width):
            if not torch.compiler.is_compiling():
                warnings.warn(
                    f"an image has no more tokens than the {clusters[0]}x{clusters[1]} cluster "
                    "grid and runs unreduced",
                    stacklevel=2,
                )
            return tokens, Grid(height, width), Clustering(None, None, None, None)
        with profiler_range("expedite_d2.reduce", tokens):
            automatic = self.temperature == 0
            _, centres, indices, weights = token_reduce(
                tokens,
                clusters,
                window=window,
                iterations=self.iterations,
                neighbourhood=self.neighbourhood,
                topk=self.topk,
                temperature=sharpness(window) if automatic else self.temperature,
                automatic=automatic,
            )
        before, after = (tokens, centres) if residual else (None, None)
        layout = Grid(centres.shape[1], centres.shape[2])
        return centres, layout, Clustering(before, after, indices, weights)


class Clustering(NamedTuple):
    """What is needed to reconstruct the tokens from their clusters.

    Attributes:
        tokens: (B, H, W, C) before the clustering; None for "replace".
        centres: (B, h, w, C) after the clustering; None for "replace".
        indices: (B, H, W, topk) int32, the centres that each token is reconstructed from; None if
            the map was left as it was.
        weights: (B, H, W, topk) float32, their weights; None if the map was left as it was.
    """

    tokens: Tensor | None
    centres: Tensor | None
    indices: Tensor | None
    weights: Tensor | None

    def reconstruct(self, low: Tensor, detail: DetailMap | None = None) -> Tensor:
        """Distributes the processed clusters to the tokens.

        Args:
            low: (B, h, w, C), the centres after the low-resolution blocks.
            detail: what becomes of the tokens' own detail; None: it stays as it is.

        Returns:
            (B, H, W, C).
        """
        if self.indices is None or self.weights is None:
            return low
        tokens, centres, at = self.tokens, self.centres, (self.indices, self.weights)
        with profiler_range("expedite_d2.reconstruct", low):
            out = token_reconstruct(low, *at, tokens=tokens, centres=centres)
            if detail is not None and tokens is not None and centres is not None:
                # The sum keeps the tokens' type where autocast multiplies in a half type.
                out = out + detail.of(tokens - token_reconstruct(centres, *at))
            return out


def sharpness(window: Sequence[int] | None) -> float:
    """Returns the c of the automatic temperature c / T, in windows or on whole images."""
    return SHARPNESS_ON_IMAGES if window is None else SHARPNESS_IN_WINDOWS


def _checked_int(name: str, value: object, minimum: int) -> int:
    number = integer(value)
    if number is None or number < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}, got {value!r}")
    return number


def _checked_temperature(value: object) -> float:
    number = real(value)
    if number is None or not (math.isfinite(number) and number >= 0):
        raise ValueError(
            f"temperature must be a finite number >= 0 (0 is automatic), got {value!r}"
        )
    return number


def _checked_grid(grid: Any) -> tuple[Any, Any]:
    # Arrays and tensors of two numbers are accepted like lists.
    given = grid.tolist() if hasattr(grid, "tolist") else grid
    sides = given if isinstance(given, (tuple, list)) else (given,)
    sizes = [size for size in map(integer, sides) if size is not None and size >= 1]
    ratios = [ratio for ratio in map(real, sides) if ratio is not None and 0 < ratio < 1]
    for numbers in (sizes, ratios):
        if len(numbers) == len(sides) == 2:
            return numbers[0], numbers[1]
    raise ValueError(
        "grid (clusters) must be two sizes >= 1, such as (8, 8), or two ratios between 0 and 1, "
        f"such as (0.5, 0.5), got {grid!r}"
    )

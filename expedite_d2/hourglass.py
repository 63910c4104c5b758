"""The U shape of an expedited encoder: many tokens -> few clusters -> many tokens.

`reduce` clusters a token map, the following blocks run on the clusters, `reconstruct` spreads what
they did over the tokens again. What belongs to the second half travels in a `Clustering` beside the
data; nothing is stored on a module.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from expedite_d2.ops._checks import integer, real
from expedite_d2.ops.token_reconstruct import token_reconstruct
from expedite_d2.ops.token_reduce import Reduced, token_reduce

Reconstruction = Literal["residual", "replace"]

# The automatic temperature is c / T, T the mean squared distance of the tokens to their nearest
# initial centre. These c kept the most accuracy: windows hold few, similar tokens and want sharper
# weights than whole images.
SHARPNESS_IN_WINDOWS = 32.0
SHARPNESS_ON_IMAGES = 8.0


@dataclass(frozen=True)
class Reduction:
    """How, and from which block on, an encoder runs on clusters of its tokens.

    Attributes:
        alpha: blocks that run at full resolution before the clustering, counted from the first of
            the encoder.
        clusters: rows and columns of the cluster grid of a window or, without windows, of the
            image; or two ratios in (0, 1) of the rows and columns of tokens.
        iterations: rounds of soft k-means (kappa); 0 keeps the average-pooled centres.
        neighbourhood: odd side of the square of cells that a token may belong to (lambda).
        topk: centres that each token is reconstructed from.
        temperature: factor (tau) of squared distances; 0.0 measures it for each image.
        reconstruction: "residual" adds to each token what its clusters gained, "replace" (the
            paper) puts the clusters' values in its place.
    """

    alpha: int
    clusters: tuple[int, int] | tuple[float, float]
    iterations: int = 5
    neighbourhood: int = 5
    topk: int = 4
    temperature: float = 0.0
    reconstruction: Reconstruction = "residual"

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "alpha": _checked_int("alpha", self.alpha, minimum=0),
            "clusters": _checked_clusters(self.clusters),
            "iterations": _checked_int("iterations", self.iterations, minimum=0),
            "neighbourhood": _checked_int("neighbourhood", self.neighbourhood, minimum=1),
            "topk": _checked_int("topk", self.topk, minimum=1),
            "temperature": _checked_temperature(self.temperature),
        }
        if checked["neighbourhood"] % 2 == 0:
            raise ValueError(f"neighbourhood must be odd, got {self.neighbourhood}")
        if self.reconstruction not in get_args(Reconstruction):
            expected = " or ".join(repr(mode) for mode in get_args(Reconstruction))
            raise ValueError(f"reconstruction must be {expected}, got {self.reconstruction!r}")
        # Frozen: numpy's numbers become Python's own, and a list, as configuration files give it,
        # the tuple that it stands for.
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of clusters for a window or an image of height x width tokens."""
        rows, columns = self.clusters
        if isinstance(rows, float) or isinstance(columns, float):
            # int(): sizes are tensors while a model is traced.
            return max(1, round(rows * int(height))), max(1, round(columns * int(width)))
        return rows, columns

    def reduced(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns that are left of an image of height x width tokens, without windows.

        An image with no more tokens than the cluster grid has cells keeps them.
        """
        rows, columns = self.grid(height, width)
        return (rows, columns) if rows * columns < height * width else (height, width)


class Clustering(NamedTuple):
    """What `reconstruct` needs to know of the reduction before it.

    Attributes:
        tokens: (B, H, W, C) before the clustering; None for "replace".
        centres: (B, h, w, C) after the clustering; None for "replace".
        indices: (B, H, W, topk) int32, the centres that each token is rebuilt from; None if the map
            was left as it was.
        weights: (B, H, W, topk) float32, their weights; None if the map was left as it was.
    """

    tokens: Tensor | None
    centres: Tensor | None
    indices: Tensor | None
    weights: Tensor | None


def reduce(
    tokens: Tensor, reduction: Reduction, window: tuple[int, int] | None = None
) -> tuple[Tensor, Clustering]:
    """Cluster a token map.

    An image with no more tokens than the cluster grid has cells is left as it is, with a warning.

    Args:
        tokens: (B, H, W, C).
        reduction: the settings.
        window: rows and columns of the windows that are clustered each by itself; None clusters the
            image as a whole.

    Returns:
        The centres, (B, h, w, C), and what `reconstruct` needs.
    """
    height, width = tokens.shape[1:3]
    clusters = reduction.grid(*(window or (height, width)))
    if window is None and reduction.reduced(height, width) == (height, width):
        if not torch.compiler.is_compiling():
            warnings.warn(
                f"an image has no more tokens than the {clusters[0]}x{clusters[1]} cluster grid "
                "and runs unreduced",
                stacklevel=2,
            )
        return tokens, Clustering(None, None, None, None)
    with profiler_range("expedite_d2.reduce", tokens):
        automatic = reduction.temperature == 0
        reduced = token_reduce(
            tokens,
            clusters,
            window=window,
            iterations=reduction.iterations,
            neighbourhood=reduction.neighbourhood,
            topk=reduction.topk,
            temperature=_sharpness(window) if automatic else reduction.temperature,
            automatic=automatic,
        )
    if reduction.reconstruction == "replace":
        return reduced.centres, Clustering(None, None, reduced.indices, reduced.weights)
    clustering = Clustering(tokens, reduced.centres, reduced.indices, reduced.weights)
    return reduced.centres, clustering


def reconstruct(low: Tensor, clustering: Clustering) -> Tensor:
    """Spread what the clusters have become over the tokens.

    Args:
        low: (B, h, w, C), the centres after the low-resolution blocks.
        clustering: what `reduce` gave beside them.

    Returns:
        (B, H, W, C).
    """
    if clustering.indices is None or clustering.weights is None:
        return low
    with profiler_range("expedite_d2.reconstruct", low):
        return token_reconstruct(
            low,
            clustering.indices,
            clustering.weights,
            tokens=clustering.tokens,
            centres=clustering.centres,
        )


class ObservedOperator(TorchFunctionMode):
    """While entered, keeps something of each call of one operator in this thread.

    Attributes:
        kept: what was kept, in the order of the calls.
    """

    def __init__(
        self, operator: torch._ops.OpOverload, keep: Callable[[dict[str, Any], Any], Any]
    ) -> None:
        """
        Args:
            operator: such as `torch.ops.expedite_d2.token_reduce.default`.
            keep: picks it from a call's arguments, by their names in the schema, and its result.
        """
        super().__init__()
        self.operator = operator
        self.keep = keep
        self.kept: list[Any] = []
        self._names = [argument.name for argument in operator._schema.arguments]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is self.operator:
            named = dict(zip(self._names, args, strict=False)) | (kwargs or {})
            self.kept.append(self.keep(named, result))
        return result


@torch.no_grad()
def calibrate(model: nn.Module, images: Iterable[Any]) -> float:
    """Measure the temperature on a few images and store it in the backbone's settings.

    The images pass through the model with the automatic temperature, and the spread that each
    clustering measures is observed on the way.

    Args:
        model: holds one expedited encoder, a module whose attribute `reduction` is a `Reduction`:
            a backbone of this package, or what `expedite` was given.
        images: inputs of the model, each of them one call.

    Returns:
        The temperature c / T with T averaged over all images.

    Raises:
        ValueError: no expedited encoder or several, no images, or none that was clustered.
    """
    encoder = _expedited_encoder(model)
    reduction: Reduction = encoder.reduction
    training = {module: module.training for module in model.modules()}
    calls = 0
    observed = ObservedOperator(
        torch.ops.expedite_d2.token_reduce.default,
        lambda arguments, result: (_sharpness(arguments["window"]), Reduced(*result).spread),
    )
    try:
        model.eval()
        encoder.reduction = replace(reduction, temperature=0.0)
        # torch.compile refuses to run under a dispatch mode.
        with torch.compiler.set_stance("force_eager"), observed:
            for image in images:
                model(image)
                calls += 1
    finally:
        encoder.reduction = reduction
        for module, mode in training.items():
            module.training = mode
    if not calls:
        raise ValueError("calibrate needs at least one image, got none")
    if not observed.kept:
        raise ValueError(
            f"calibrate needs an image with more tokens than clusters, got none among {calls}"
        )
    sharpness = observed.kept[0][0]
    spreads = torch.cat([spread for _, spread in observed.kept])
    temperature = sharpness / spreads.double().mean().item()
    encoder.reduction = replace(reduction, temperature=temperature)
    return temperature


def _expedited_encoder(model: nn.Module) -> Any:
    """The outermost module with settings: a backbone of ours may hold what `expedite` was given."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer in found)
        if not inside and isinstance(getattr(module, "reduction", None), Reduction):
            found[name] = module
    if len(found) != 1:
        raise ValueError(
            f"calibrate expects a model with one expedited encoder, got {len(found)} in "
            f"{type(model).__name__}"
        )
    return next(iter(found.values()))


def _sharpness(window: Sequence[int] | None) -> float:
    return SHARPNESS_ON_IMAGES if window is None else SHARPNESS_IN_WINDOWS


def profiler_range(name: str, tensor: Tensor) -> AbstractContextManager[None]:
    """Names a span of work: for torch.profiler where it runs, else for Nsight on a GPU.

    Nothing while a model is compiled, whose spans are the compiler's own.

    Args:
        name: "expedite_d2." and the part of the model.
        tensor: what the work is about, on its device.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    if torch.autograd._profiler_enabled():
        return torch.profiler.record_function(name)
    return torch.cuda.nvtx.range(name) if tensor.is_cuda else nullcontext()


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


def _checked_clusters(clusters: Any) -> tuple[Any, Any]:
    # An array or a tensor of two numbers is as good as a list.
    given = clusters.tolist() if hasattr(clusters, "tolist") else clusters
    sides = given if isinstance(given, (tuple, list)) else (given,)
    sizes = [size for size in map(integer, sides) if size is not None and size >= 1]
    ratios = [ratio for ratio in map(real, sides) if ratio is not None and 0 < ratio < 1]
    for numbers in (sizes, ratios):
        if len(numbers) == len(sides) == 2:
            return numbers[0], numbers[1]
    raise ValueError(
        "clusters must be two sizes >= 1, such as (8, 8), or two ratios between 0 and 1, such "
        f"as (0.5, 0.5), got {clusters!r}"
    )

"""`expedite` and `restore`."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar

from torch import nn

from expedite_d2.hourglass import Reconstruction, Reduction
from expedite_d2.ops._checks import integer
from expedite_d2.patch.adapter import Adapter
from expedite_d2.patch.detectron2_vit import Detectron2ViT
from expedite_d2.patch.override import Override, PassOn
from expedite_d2.patch.span import SpanBlock
from expedite_d2.patch.swin import OfficialSwin
from expedite_d2.patch.timm_vit import TimmBeit, TimmVisionTransformer
from expedite_d2.patch.transformers_vit import TransformersBeit, TransformersDPT, TransformersViT

ADAPTERS: list[Adapter] = [
    TimmVisionTransformer(),
    TimmBeit(),
    TransformersViT(),
    TransformersBeit(),
    TransformersDPT(),
    Detectron2ViT(),
    OfficialSwin(),
]

Model = TypeVar("Model", bound=nn.Module)


def expedite(
    model: Model,
    alpha: int,
    clusters: tuple[int, int] | tuple[float, float],
    *,
    iterations: int = 5,
    neighbourhood: int = 5,
    topk: int = 4,
    temperature: float = 0.0,
    reconstruction: Reconstruction = "residual",
    outputs: Collection[int] | None = None,
) -> Model:
    """Let the last blocks of a model's encoder run on clusters of its tokens, in place.

    No parameter or buffer comes, goes or changes. Expediting again replaces the settings, which
    are found on the encoder as `reduction`.

    Args:
        model: the encoder, or a model that holds it.
        alpha: blocks that run at full resolution before the clustering.
        clusters: rows and columns of clusters, or ratios of them; see `Reduction`, also for the
            settings that follow.
        iterations: rounds of soft k-means.
        neighbourhood: odd side of the square of cells that a token may belong to.
        topk: centres that each token is reconstructed from.
        temperature: factor of squared distances; 0.0 measures it for each image.
        reconstruction: "residual" or "replace".
        outputs: numbers of the blocks whose outputs somebody reads. These and the last come out at
            full resolution; with none, `()`, even the last stays on the clusters, see
            `clustering_of`. None for whatever the model may read.

    Returns:
        The model.

    Raises:
        ValueError: no encoder of a known family, several, or settings that do not fit it.
    """
    reduction = Reduction(
        alpha, clusters, iterations, neighbourhood, topk, temperature, reconstruction
    )
    adapter, encoder = _find(model)
    blocks = adapter.blocks(encoder)
    _check(adapter, encoder, reduction, len(blocks))
    adapter.check(encoder, reduction, outputs)
    alpha = reduction.alpha
    span = range(alpha, adapter.stop(encoder, alpha))
    full = _full_outputs(adapter, encoder, span, outputs, len(blocks))
    restore(encoder)
    overrides: list[Override] = [PassOn(block, "forward") for block in blocks[:alpha]]
    overrides += [
        SpanBlock(blocks[number], encoder, adapter, number == alpha, number in full)
        for number in span
    ]
    for override in [*overrides, *adapter.overrides(encoder, span)]:
        override.install()
    encoder.reduction = reduction  # type: ignore[assignment]
    return model


def restore(model: Model) -> Model:
    """Undo `expedite`, in place; a model that is not expedited is left alone.

    Returns:
        The model.
    """
    for module in model.modules():
        attributes = vars(module)
        overrides = [value for value in attributes.values() if isinstance(value, Override)]
        for override in overrides:
            override.remove()
        # Our own backbones keep their settings elsewhere and show them as a property.
        if isinstance(attributes.get("reduction"), Reduction):
            del module.reduction
    return model


def _find(model: nn.Module) -> tuple[Adapter, nn.Module]:
    found: dict[str, tuple[Adapter, nn.Module]] = {}
    for name, module in model.named_modules():
        if any(not outer or name.startswith(f"{outer}.") for outer in found):
            continue
        for adapter in ADAPTERS:
            if adapter.matches(module):
                found[name] = adapter, module
                break
    if not found:
        families = ", ".join(adapter.family for adapter in ADAPTERS)
        raise ValueError(
            f"{type(model).__name__} holds no encoder that can be expedited, known are: {families}"
        )
    if len(found) > 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(found)} encoders, expedite one of them: "
            f"{', '.join(found)}"
        )
    return next(iter(found.values()))


def _check(adapter: Adapter, encoder: nn.Module, reduction: Reduction, blocks: int) -> None:
    if reduction.alpha >= blocks:
        raise ValueError(
            f"alpha must be less than the {blocks} blocks of {type(encoder).__name__}, got "
            f"{reduction.alpha}"
        )
    window, grid = adapter.window(encoder), adapter.fixed_grid(encoder)
    if window is not None:
        rows, columns = reduction.grid(*window)
        if rows > window[0] or columns > window[1] or (rows, columns) == window:
            raise ValueError(
                f"clusters must be smaller than the {window[0]}x{window[1]} window, got "
                f"{rows}x{columns}"
            )
    elif grid is not None and reduction.reduced(*grid) == grid:
        rows, columns = reduction.grid(*grid)
        raise ValueError(
            f"clusters must be fewer than the {grid[0]}x{grid[1]} tokens of the encoder's images, "
            f"got {rows}x{columns}"
        )


def _full_outputs(
    adapter: Adapter,
    encoder: nn.Module,
    span: range,
    outputs: Collection[int] | None,
    blocks: int,
) -> Collection[int]:
    """Blocks of the span whose outputs are reconstructed."""
    if outputs is None:
        read = adapter.read(encoder)
        return span if read is None else {*read, span[-1]}
    numbers = [integer(number) for number in outputs]
    if not all(number is not None and 0 <= number < blocks for number in numbers):
        raise ValueError(
            f"outputs must be numbers of blocks, 0 to {blocks - 1}, got {list(outputs)}"
        )
    return {*numbers, span[-1]} if numbers else ()  # type: ignore[arg-type]

"""Whether settings fit an encoder, and the changes to it that they need."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable

from torch import nn

from expedite_d2.adapters.family import Family, to_encoder_end
from expedite_d2.adapters.hourglass import Hourglass
from expedite_d2.ops._checks import integer
from expedite_d2.reducers import Cluster, Merge, Reduction

# Settings that save less than this share of the blocks' work cause a warning.
LEAST_GAIN = 0.05


def fit(
    family: Family, encoder: nn.Module, reduction: Reduction, outputs: Collection[int] | None
) -> Hourglass:
    """Checks settings, and returns the changes that they need, which are not yet made.

    Args:
        family: the encoder's family.
        encoder: the encoder.
        reduction: the settings.
        outputs: see `expedite`.

    Raises:
        ValueError: settings that do not fit the encoder.
    """
    name, blocks = type(encoder).__name__, family.blocks(encoder)
    if reduction.alpha >= len(blocks):
        raise ValueError(
            f"alpha must be less than the {len(blocks)} blocks of {name}, got {reduction.alpha}"
        )
    span = range(reduction.alpha, family.span(encoder, blocks, reduction.alpha))
    late = [step.at for step in reduction.steps if step.at not in span]
    if late:
        raise ValueError(
            f"steps must stand before blocks {span.start} to {span[-1]} of {name}, where the "
            f"reduced span ends, got one before block {late[0]}"
        )
    if family.positions.needs_grid and not isinstance(reduction.steps[0], Cluster):
        raise ValueError(
            f"{name} takes a Cluster alone, got {type(reduction.steps[0]).__name__}: its relative "
            "positions are read between the cells of a grid"
        )
    _check_clusters(family, encoder, reduction, span)
    _check_merges(family, encoder, reduction, len(blocks))
    family.positions.check(encoder, reduction)
    full = _full(family, encoder, span, outputs, len(blocks))
    if reduction.correction is not None:
        reduction.correction.check_places(
            {number: last_linear(blocks[number]).out_features for number in full}
        )
    return Hourglass(encoder, family, reduction, span, full)


def _check_clusters(family: Family, encoder: nn.Module, reduction: Reduction, span: range) -> None:
    """Refuses clusters that are no fewer than the tokens; warns if they hardly save any work."""
    (step, *others) = reduction.steps
    if others or not isinstance(step, Cluster):
        return
    name, window = type(encoder).__name__, family.window(encoder, span.start)
    size = family.grid.configured(encoder) if window is None else window
    if size is None:
        return
    rows, columns = step.cells(*size)
    fewer = rows <= size[0] and columns <= size[1] and rows * columns < size[0] * size[1]
    tokens = f"{size[0]}x{size[1]}"
    if not fewer and window is not None:
        raise ValueError(f"clusters must be smaller than the {tokens} window, got {rows}x{columns}")
    if not fewer and not family.grid.varies(encoder):
        raise ValueError(
            f"clusters must be fewer than the {tokens} tokens of the encoder's images, in rows "
            f"and in columns, got {rows}x{columns}"
        )
    if not fewer:
        warnings.warn(
            f"{rows}x{columns} clusters are no fewer, in rows and in columns, than the {tokens} "
            f"tokens of the images that {name} was made for: only larger ones run faster",
            stacklevel=6,
        )
        return
    share = len(span) / len(family.blocks(encoder))
    spared = share * (1 - rows * columns / (size[0] * size[1]))
    _warn_of_little_gain(name, spared, "begin at an earlier block (alpha), or with fewer clusters")


def _check_merges(family: Family, encoder: nn.Module, reduction: Reduction, blocks: int) -> None:
    """Refuses merges of no token at all, and warns if they hardly save any work.

    Args:
        blocks: how many the encoder has.
    """
    size, name = family.grid.configured(encoder), type(encoder).__name__
    merges = [step for step in reduction.steps if isinstance(step, Merge)]
    if size is None or not merges:
        return
    count, spared = size[0] * size[1], 0.0
    for step in merges:
        merged = step.merged(count)
        if merged == 0:
            raise ValueError(
                f"keep must leave fewer than the {count} tokens that reach block {step.at} of "
                f"{name}, got {step.keep}"
            )
        count -= merged
        spared += (1 - step.at / blocks) * merged / (size[0] * size[1])
    if not any(step.rounds for step in merges):  # attention alone sees far fewer
        _warn_of_little_gain(name, spared, "merge before earlier blocks, or keep fewer tokens")


def _warn_of_little_gain(name: str, spared: float, advice: str) -> None:
    if spared < LEAST_GAIN:
        warnings.warn(
            f"these settings spare {name} {100 * spared:.1f} % of what its blocks do: {advice}",
            stacklevel=7,
        )


def _full(
    family: Family,
    encoder: nn.Module,
    span: range,
    outputs: Collection[int] | None,
    blocks: int,
) -> Collection[int]:
    """Returns the blocks of the span whose outputs are reconstructed."""
    if outputs is None:
        return span if family.inside else (span[-1],)
    if not isinstance(outputs, Iterable):
        raise ValueError(f"outputs must be a collection of numbers of blocks, got {outputs!r}")
    numbers = [integer(number) for number in outputs]
    if not all(number is not None and 0 <= number < blocks for number in numbers):
        raise ValueError(
            f"outputs must be numbers of blocks, 0 to {blocks - 1}, got {list(outputs)}"
        )
    if not numbers and family.span is not to_encoder_end:
        raise ValueError(
            f"outputs must not be empty: a stage of {type(encoder).__name__} ends at full "
            "resolution"
        )
    return frozenset({*numbers, span[-1]}) if numbers else ()  # type: ignore[arg-type]


def last_linear(block: nn.Module) -> nn.Linear:
    """Returns the last layer of a block's MLP.

    Raises:
        ValueError: the block has no linear layer.
    """
    layers = [module for module in block.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError(
            f"blocks must hold layers torch.nn.Linear, got a {type(block).__name__} without: "
            "expedite a model before it is quantized"
        )
    return layers[-1]

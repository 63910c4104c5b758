"""Tokens and multiply-adds of an encoder's blocks, plain and expedited."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from expedite_d2.adapters.core import expedited_encoders, restore
from expedite_d2.adapters.family import Family
from expedite_d2.adapters.fit import last_linear
from expedite_d2.adapters.registry import find_encoder
from expedite_d2.ops._checks import integer
from expedite_d2.reducers import Reduction
from expedite_d2.tools.cost import count_multiply_adds, on_meta

# Side of the images in pixels, for encoders without a configured size.
SIDE = 512


@dataclass(frozen=True)
class Block:
    """One block of an encoder, and its numbers for one image.

    Attributes:
        name: name of the module in the encoder.
        tokens: number of tokens in the plain encoder, including prefix tokens.
        reduced_tokens: number of tokens with the settings.
        multiply_adds: multiply-adds in the plain encoder.
        reduced_multiply_adds: multiply-adds with the settings.
    """

    name: str
    tokens: int
    reduced_tokens: int
    multiply_adds: int
    reduced_multiply_adds: int


@dataclass(frozen=True)
class Description:
    """An encoder, block by block; its text is a table.

    Attributes:
        encoder: name of its class.
        family: name of its family, as `families()` lists it; "" for this project's own encoders.
        size: height and width of the image in pixels.
        reduction: the settings; None for a plain encoder, whose two columns are equal.
        blocks: the blocks in the order in which they run.
        multiply_adds: multiply-adds of the whole plain encoder, also outside of its blocks.
        reduced_multiply_adds: the same with the settings.
        notes: what else there is to know, each a sentence.
    """

    encoder: str
    family: str
    size: tuple[int, int]
    reduction: Reduction | None
    blocks: tuple[Block, ...]
    multiply_adds: int
    reduced_multiply_adds: int
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """The share of the encoder's multiply-adds that is left, which a budget bounds."""
        return self.reduced_multiply_adds / max(self.multiply_adds, 1)

    @property
    def share_of_blocks(self) -> float:
        """The share of the blocks' multiply-adds that is left, with what the reduction costs."""
        blocks = sum(block.multiply_adds for block in self.blocks)
        return 1 - (self.multiply_adds - self.reduced_multiply_adds) / max(blocks, 1)

    def __str__(self) -> str:
        height, width = self.size
        of = f" ({self.family})" if self.family else ""
        lines = [f"{self.encoder}{of}, one image of {height}x{width}"]
        if self.reduction is not None:
            lines += [f"settings: {step}" for step in self.reduction.steps]
        names = [block.name for block in self.blocks]
        wide = max(map(len, ["the encoder", *names]))
        lines.append(
            f"{'block':<{wide}}  {'tokens':>7} {'reduced':>8}  {'G mult.-adds':>12} {'reduced':>8}"
        )
        for block in self.blocks:
            lines.append(
                f"{block.name:<{wide}}  {block.tokens:>7} {block.reduced_tokens:>8}  "
                f"{block.multiply_adds / 1e9:>12.3f} {block.reduced_multiply_adds / 1e9:>8.3f}"
            )
        lines.append(
            f"{'the encoder':<{wide}}  {'':>7} {'':>8}  {self.multiply_adds / 1e9:>12.3f} "
            f"{self.reduced_multiply_adds / 1e9:>8.3f}  ({100 * self.share:.1f} %)"
        )
        if self.reduction is not None:
            lines[-1] += f", of its blocks alone {100 * self.share_of_blocks:.1f} %"
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def describe(model: nn.Module, size: tuple[int, int] | None = None) -> Description:
    """Lists the blocks of a model's encoder: tokens and multiply-adds, plain and expedited.

    Nothing is computed: a copy of the encoder runs on the `meta` device.

    Args:
        model: the encoder, or a model that holds it, expedited or not.
        size: height and width of the image in pixels; by default those that the encoder is
            configured for, or 512x512.

    Returns:
        The description, whose text is a table.

    Raises:
        ValueError: no encoder of a known family, several, or an invalid size.
    """
    expedited = list(expedited_encoders(model).values())
    family, encoder = find_encoder(expedited[0] if len(expedited) == 1 else model)
    if size is None:
        size = (family.image_size(encoder) if family is not None else None) or (SIDE, SIDE)
    sides = [integer(side) for side in size] if isinstance(size, (tuple, list)) else []
    if len(sides) != 2 or not all(side is not None and side >= 1 for side in sides):
        raise ValueError(f"size must be two numbers of pixels, got {size!r}")
    height, width = size
    reduction: Reduction | None = encoder.reduction if expedited else None
    try:
        plain, total = count_blocks(encoder, family, size, plain=True)
    except (RuntimeError, AssertionError) as error:  # from the library: too small, or not its own
        raise ValueError(
            f"size must be one that {type(encoder).__name__} takes, got {height}x{width}: {error}"
        ) from error
    fewer, reduced_total = (
        (plain, total) if reduction is None else count_blocks(encoder, family, size)
    )
    blocks = tuple(
        Block(name, tokens, fewer[name][0], cost, fewer[name][1])
        for name, (tokens, cost) in plain.items()
    )
    return Description(
        type(encoder).__name__,
        "" if family is None else family.name,
        (height, width),
        reduction,
        blocks,
        total,
        reduced_total,
        tuple(_notes(family, encoder)),
    )


def _notes(family: Family | None, encoder: nn.Module) -> Iterator[str]:
    if family is not None and family.eager(encoder):
        yield (
            "the encoder's own attention writes out its matrix of pairs of tokens, which a fused "
            "kernel does not: a speed-up over it is not due to fewer tokens alone"
        )
        config = getattr(encoder, "config", None)
        if getattr(config, "_attn_implementation", "") == "eager" and getattr(
            encoder, "_supports_sdpa", False
        ):
            yield "attn_implementation='sdpa' gives the plain model a fused one as well"


def count_blocks(
    encoder: nn.Module, family: Family | None, size: Sequence[int], plain: bool = False
) -> tuple[dict[str, tuple[int, int]], int]:
    """Counts tokens and multiply-adds of an encoder, on a copy without memory.

    Args:
        encoder: the encoder.
        family: its family; None for one of this project's own.
        size: height and width of the image in pixels.
        plain: whether to count it without its settings.

    Returns:
        (tokens, multiply-adds) of each block by name, and the multiply-adds of the whole encoder.
    """
    copied: Any = on_meta(encoder)
    copied.eval()  # returns nothing in official Swin
    if plain:
        restore(copied)
    blocks = copied.reducible_blocks() if family is None else family.blocks(copied)
    names = {id(module): name for name, module in copied.named_modules()}
    tokens: dict[str, int] = {}

    def note(name: str) -> Any:
        def hook(linear: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            tokens[name] = args[0].shape[:-1].numel()

        return hook

    for block in blocks:
        # The last layer of the MLP: the block's own input and output may be at full resolution.
        last_linear(block).register_forward_pre_hook(note(names[id(block)]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an image that is too small shows in the table
        counts = count_multiply_adds(
            copied,
            torch.empty(1, 3, *size, device="meta", dtype=_dtype(copied)),
            call=None if family is None else partial(family.run, copied),
        )
    return {name: (tokens[name], counts.total(name)) for name in tokens}, counts.total()


def _dtype(encoder: nn.Module) -> torch.dtype:
    """Returns the type of an encoder's parameters, and so of the images that it takes."""
    types = (parameter.dtype for parameter in encoder.parameters())
    return next((dtype for dtype in types if dtype.is_floating_point), torch.float32)

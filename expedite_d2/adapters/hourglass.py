"""An expedited encoder: its settings, its changed methods, and the blocks of its span."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from expedite_d2.adapters.family import BlockCall, Family
from expedite_d2.adapters.grouped import group_attention
from expedite_d2.adapters.override import (
    REPLICATE,
    Override,
    Propagate,
    Replicate,
    first_of,
    refuse_tracing,
    with_first,
)
from expedite_d2.reducers import Merge, Points, Reduction, State, attach
from expedite_d2.reducers.correction import attach_correction, maps_at

#: Attribute of an encoder that holds its Hourglass.
ATTRIBUTE = "_hourglass"


class Hourglass:
    """The changes that `expedite` made to one encoder.

    Attributes:
        encoder: the encoder; its `reduction` holds the settings.
        family: the encoder's family.
        span: numbers of the blocks that run on fewer tokens.
        full: numbers of those whose outputs are reconstructed.
        overrides: the changed methods.
    """

    def __init__(
        self,
        encoder: nn.Module,
        family: Family,
        reduction: Reduction,
        span: range,
        full: Collection[int],
    ) -> None:
        self.encoder: Any = encoder
        self.family = family
        self.span = span
        self.full = full
        blocks = family.blocks(encoder)
        rounds = [step.at for step in reduction.steps if isinstance(step, Merge) and step.rounds]
        grouped = range(min(rounds), span.stop) if rounds else ()
        self.overrides: list[Override] = [
            *(Propagate(block, "forward") for block in blocks[: span.start]),
            *(_SpanBlock(blocks[number], self, number) for number in span),
            *(change for number in grouped for change in group_attention(family, blocks, number)),
            *family.grid.overrides(self),
            *family.positions.overrides(self),
        ]
        self._replicate = Replicate(encoder)

    def install(self, reduction: Reduction) -> None:
        """Changes the encoder."""
        setattr(self.encoder, ATTRIBUTE, self)
        setattr(self.encoder, REPLICATE, self._replicate)
        self.encoder.reduction = reduction
        attach_correction(self.encoder, reduction.correction)
        for override in self.overrides:
            override.install()

    def remove(self) -> None:
        """Undoes `install`, also under what has wrapped a changed method in the meantime."""
        for override in reversed(self.overrides):
            override.remove()
        attach_correction(self.encoder, None)
        for name in (ATTRIBUTE, REPLICATE, "reduction"):
            vars(self.encoder).pop(name, None)

    def encoder_of(self, block: nn.Module) -> Any:
        """Returns the encoder that a block belongs to: the expedited one, or a replica of it."""
        if getattr(block, "_is_replica", False):
            for replica in list(self._replicate.replicas):
                if any(other is block for other in self.family.blocks(replica)):
                    return replica
        return self.encoder


class _SpanBlock(Override):
    """The forward of a block that runs on fewer tokens."""

    def __init__(self, block: nn.Module, hourglass: Hourglass, number: int) -> None:
        super().__init__(block, "forward")
        self.hourglass = hourglass
        self.number = number

    def call(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        hourglass = self.hourglass
        family, encoder = hourglass.family, hourglass.encoder_of(self.owner)
        x, state = self._enter(refuse_tracing(x), encoder)
        if isinstance(state.layout, Points) and state.layout.groups:
            # For the norm and the attention of the block: the layout alone, as the rest may hold x.
            attach(x, State(state.grid, state.layout))
        call = BlockCall(hourglass, encoder, self, x, state, args, kwargs)
        call = family.positions.prepare(call)
        out, state = family.positions.run(call), call.state
        low = first_of(out)
        if self.number not in hourglass.full:
            attach(low, state._replace(low=None))
            return out
        aside, tokens = family.tokens.split(encoder, low, state.layout)
        full = family.tokens.join(aside, state.reconstruct(tokens, maps_at(encoder, self.number)))
        return with_first(out, attach(full, state._replace(low=low)))

    def _enter(self, x: Tensor, encoder: Any) -> tuple[Tensor, State]:
        """Returns the tokens that the block runs on, and their state."""
        family = self.hourglass.family
        first = self.number == self.hourglass.span.start
        state = family.grid.state(x)
        if state is None or bool(state.steps) == first:
            raise self._lost("grid" if first else "reduced tokens", encoder)
        if state.low is not None:
            x = state.low
        reduction: Reduction = encoder.reduction
        if self.number in (step.at for step in reduction.steps):
            aside, tokens = family.tokens.split(encoder, x, state.layout)
            window = family.window(encoder, self.hourglass.span.start)
            tokens, state = reduction.enter(tokens, state, self.number, window)
            x = family.tokens.join(aside, tokens)
            state = state._replace(aside=tuple(part.shape[1] for part in aside))
            layout = state.layout
            if isinstance(layout, Points) and layout.groups:
                groups = layout.groups.between(*state.aside)
                state = state._replace(layout=layout._replace(groups=groups))
        return x, state

    def _lost(self, what: str, encoder: nn.Module) -> RuntimeError:
        name = type(encoder).__name__
        blocks = self.hourglass.family.blocks(self.hourglass.encoder)
        ours = {id(override.owner) for override in self.hourglass.overrides}
        replaced = [number for number, block in enumerate(blocks) if id(block) not in ours]
        if replaced:
            listed = ", ".join(map(str, replaced))
            reason = f"its blocks {listed} were replaced or wrapped since: expedite it again"
        else:
            reason = (
                "something replaced them on their way between the encoder's own modules (dropped "
                "patches, or gradient checkpointing, which must have use_reentrant=False)"
            )
        return RuntimeError(
            f"tokens reached block {self.number} of an expedited {name} without their {what}: "
            f"{reason}"
        )

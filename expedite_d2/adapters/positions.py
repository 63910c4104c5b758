"""Blocks that know relative positions by learnt tables, read at the offsets between clusters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from expedite_d2.adapters.family import BlockCall, NoPositions, Size, refuse_masks
from expedite_d2.adapters.hourglass import Hourglass
from expedite_d2.adapters.override import Override


@dataclass(frozen=True)
class Table(NoPositions):
    """Biases of the logits for each pair of tokens: of each block, of all blocks, or both (BEiT).

    Attributes:
        bias: what is added to the logits of one block on a grid of clusters, from the encoder, the
            block, rows and columns of the image's tokens, and those of the clusters; None for
            nothing.
        argument: name of the block's argument that takes it.
        own: of a block, the module and the name of its method that give the bias of the block's own
            table, which is held back on clusters; None where it has none.
        refuses: raises for masks among a call's arguments.
    """

    bias: Callable[[Any, Any, Size, Size], Tensor | None]
    argument: str
    own: Callable[[Any], tuple[nn.Module, str] | None]
    refuses: Callable[[BlockCall], None] = lambda call: refuse_masks(*call.args)

    def overrides(self, hourglass: Hourglass) -> list[Override]:
        """The blocks' own tables are silenced."""
        blocks = hourglass.family.blocks(hourglass.encoder)
        own = [self.own(blocks[number]) for number in hourglass.span]
        return [_NoBias(*place) for place in own if place is not None]

    def run(self, call: BlockCall) -> Tensor:
        """Gives the block what the tables say of clusters."""
        self.refuses(call)
        bias = self.bias(call.encoder, call.block.owner, call.state.grid, call.cells)
        return call.block.original(call.x, **{**call.kwargs, self.argument: bias})


class _NoBias(Override):
    """No bias from a block's own table: the block is given what that says of clusters."""

    def call(self, *args: Any, **kwargs: Any) -> Tensor:
        owner: Any = self.owner
        return owner.relative_position_bias_table.new_zeros(1)

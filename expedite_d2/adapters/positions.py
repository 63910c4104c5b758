"""Relative positions from learnt tables, which are read at the offsets between clusters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from expedite_d2.adapters.family import BlockCall, Positions, Size, refuse_masks
from expedite_d2.adapters.hourglass import Hourglass
from expedite_d2.adapters.override import Override


@dataclass(frozen=True)
class Table(Positions):
    """Biases of the logits for each pair of tokens: per block, shared by all, or both (BEiT).

    Attributes:
        bias: the bias of one block on a grid of clusters, or None; from the encoder, the block,
            rows and columns of the image's tokens, and those of the clusters.
        argument: name of the block's argument for a bias.
        own: the module in a block, and the name of its method, that return the bias of the block's
            own table, which is left out on clusters; None if the block has no table.
    """

    bias: Callable[[Any, Any, Size, Size], Tensor | None]
    argument: str
    own: Callable[[Any], tuple[nn.Module, str] | None]

    kind = "relative, from tables"
    needs_grid = True

    def overrides(self, hourglass: Hourglass) -> list[Override]:
        """Replaces the biases of the blocks' own tables by none."""
        blocks = hourglass.family.blocks(hourglass.encoder)
        own = [self.own(blocks[number]) for number in hourglass.span]
        return [NoBias(*place) for place in own if place is not None]

    def run(self, call: BlockCall) -> Tensor:
        """Runs the block with the bias between clusters."""
        refuse_masks(*call.args)
        bias = self.bias(call.encoder, call.block.owner, call.state.grid, call.cells)
        return call.block.original(call.x, **{**call.kwargs, self.argument: bias})


class NoBias(Override):
    """Leaves out the bias of a block's own table; the argument of the block includes it."""

    def call(self, *args: Any, **kwargs: Any) -> Tensor:
        owner: Any = self.owner
        return owner.relative_position_bias_table.new_zeros(1)

"""transformers' YOLOS: detection tokens behind the patches, and positions between the layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from expedite_d2.adapters.family import Positions
from expedite_d2.adapters.hourglass import Hourglass
from expedite_d2.adapters.override import Override
from expedite_d2.adapters.registry import register_family
from expedite_d2.adapters.tokens import TokenSequence
from expedite_d2.adapters.transformers import DPT
from expedite_d2.reducers import Points, State
from expedite_d2.reducers.merge import means_of_members
from expedite_d2.reducers.state import attach, state_of

# For a loop over the layers that adds no positions by itself.
_NO_POSITIONS = SimpleNamespace(use_mid_position_embeddings=False)


class _Between(Positions):
    """Positions that are added to the tokens between the layers, in a model that has such.

    As with rotary positions, a cluster has those of the centre of its cell, read linearly between
    the tokens, and a merged token has the mean of its members'.
    """

    kind = "absolute, also between layers"

    def overrides(self, hourglass: Hourglass) -> list[Override]:
        encoder = hourglass.encoder.encoder
        return [] if encoder.interpolation is None else [_Layers(encoder, hourglass)]


class _Layers(Override):
    """The loop over the layers: it gives each a table, to be added before the layer runs.

    The loop itself adds them after the layer before, to tokens of the image's grid, and the sum is
    without the state of these.
    """

    def __init__(self, owner: nn.Module, hourglass: Hourglass) -> None:
        super().__init__(owner, "forward")
        self.hourglass = hourglass

    def call(self, x: Tensor, height: int, width: int, *args: Any, **kwargs: Any) -> Any:
        owner: Any = self.owner
        first, *others = owner.layer
        tables = owner.interpolation((height, width))  # (layers - 1, 1, N, C)
        layers = [first, *map(self._after, tables, others)]
        changes = {"layer": layers, "config": _NO_POSITIONS}
        return self.original_with(changes, x, height, width, *args, **kwargs)

    def _after(self, table: Tensor, layer: nn.Module) -> Callable[..., Any]:
        """Returns what adds a table (1, N, C) to the tokens, and then runs a layer."""

        def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            return layer(self._sum(x, table.to(x.device)), *args, **kwargs)

        return run

    def _sum(self, x: Tensor, table: Tensor) -> Tensor:
        """Adds a table to tokens in any layout, and to the reduced ones behind them."""
        state = state_of(x)
        if state is None:  # which the layer will miss
            return x + table
        added = self._reduced(table.expand(x.shape[0], -1, -1), state) if state.steps else table
        if state.low is None:
            return attach(x + added, state)
        return attach(x + table, state._replace(low=state.low + added))

    def _reduced(self, table: Tensor, state: State) -> Tensor:
        """Returns the rows of reduced tokens, from those of the image's, each (B, N, C)."""
        encoder, form = self.hourglass.encoder, self.hourglass.family.tokens
        aside, rows = form.split(encoder, table, state.grid)
        if isinstance(state.layout, Points):
            rows = means_of_members(rows.flatten(1, 2), state)
        else:
            maps = F.interpolate(rows.permute(0, 3, 1, 2), state.layout, mode="bilinear")
            rows = maps.permute(0, 2, 3, 1)
        return form.join(aside, rows)


YOLOS = register_family(
    replace(
        DPT,
        name="transformers YolosModel",
        classes=("YolosModel",),
        tokens=TokenSequence(suffixes=lambda encoder: encoder.config.num_detection_tokens),
        positions=_Between(),
    )
)

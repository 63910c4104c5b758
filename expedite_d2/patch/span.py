"""The blocks of the low-resolution span."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from expedite_d2.hourglass import reconstruct, reduce
from expedite_d2.patch.adapter import Adapter, BlockCall
from expedite_d2.patch.override import Override
from expedite_d2.patch.travel import Travel, attach, travel_of


class SpanBlock(Override):
    """The forward of a block that runs on clusters.

    Attributes:
        encoder: the encoder, whose `reduction` holds the settings.
        first: whether the span begins here.
        full: whether the output is reconstructed to all tokens.
    """

    def __init__(
        self, block: nn.Module, encoder: nn.Module, adapter: Adapter, first: bool, full: bool
    ) -> None:
        super().__init__(block, "forward")
        self.encoder: Any = encoder
        self.adapter = adapter
        self.first = first
        self.full = full

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        low, travel = self._enter(x) if self.first else self._go_on(x)
        assert travel.cells is not None and travel.clustering is not None
        adapter, encoder = self.adapter, self.encoder
        call = BlockCall(encoder, self, low, travel.grid, travel.cells, args, kwargs)
        low = adapter.run(call)
        if not self.full:
            return attach(low, travel._replace(low=None))
        prefix, low_map = adapter.to_map(encoder, low, travel.cells)
        out = adapter.from_map(prefix, reconstruct(low_map, travel.clustering))
        return attach(out, travel._replace(low=low))

    def _enter(self, x: Tensor) -> tuple[Tensor, Travel]:
        adapter, encoder = self.adapter, self.encoder
        grid = adapter.grid(self.owner, x)
        if grid is None:
            raise self._lost("grid")
        prefix, tokens = adapter.to_map(encoder, x, grid)
        low, clustering = reduce(tokens, encoder.reduction, adapter.window(encoder))
        cells = (low.shape[1], low.shape[2])
        return adapter.from_map(prefix, low), Travel(grid, cells, clustering)

    def _go_on(self, x: Tensor) -> tuple[Tensor, Travel]:
        travel = travel_of(x)
        if travel is None or travel.clustering is None:
            raise self._lost("clusters")
        return (x if travel.low is None else travel.low), travel

    def _lost(self, what: str) -> RuntimeError:
        return RuntimeError(
            f"tokens reached an expedited block of {type(self.encoder).__name__} without their "
            f"{what}: something replaced them on their way between the encoder's own modules "
            "(dropped patches, or gradient checkpointing, which must have use_reentrant=False)"
        )

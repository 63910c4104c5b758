"""Official Swin: those of Mask2Former and Detectron2, and their copies in other projects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from expedite_d2.adapters.family import BlockCall, Family, NoPositions, refuse_oblong
from expedite_d2.adapters.hourglass import Hourglass
from expedite_d2.adapters.override import Override
from expedite_d2.adapters.registry import register_family
from expedite_d2.adapters.relative_position import read_table
from expedite_d2.adapters.tokens import GridFromCall, TokenSequence
from expedite_d2.adapters.windows import relative_position_index, shift_mask
from expedite_d2.reducers import Reduction


class WindowTable(NoPositions):
    """Windows of clusters instead of tokens, and their table of relative positions.

    A block that shifts its windows now does so by half of the new side, with the mask of the new
    windows; the table is read at the offsets between clusters.
    """

    needs_grid = True

    def check(self, encoder: Any, reduction: Reduction) -> None:
        """Refuses oblong grids of clusters."""
        side = encoder.layers[0].window_size
        refuse_oblong(reduction.cluster.cells(side, side), encoder)

    def overrides(self, hourglass: Hourglass) -> list[Override]:
        """Changes the attentions, which can then be told another side of the window."""
        blocks: Sequence[Any] = hourglass.family.blocks(hourglass.encoder)
        return [_Attention(blocks[number].attn, "forward") for number in hourglass.span]

    def run(self, call: BlockCall) -> Tensor:
        """Runs the block in windows of clusters."""
        owner: Any = call.block.owner
        rows, columns = call.cells
        cluster = call.encoder.reduction.cluster
        side = cluster.cells(owner.window_size, owner.window_size)[0]
        shift = side // 2 if owner.shift_size else 0
        mask = None
        if shift:
            padded = (rows + -rows % side, columns + -columns % side)
            mask = shift_mask(padded, (side, side), (shift, shift), call.x.device).squeeze(1)
            mask = mask.to(call.x.dtype)
        changes = {
            "H": rows,
            "W": columns,
            "window_size": side,
            "shift_size": shift,
            "attn": partial(owner.attn, side=side),
        }
        # Instead of the stage's mask, which is for tokens.
        return call.block.original_with(changes, call.x, mask)


class _Attention(Override):
    """Attends in windows of clusters, if it is given their side."""

    def call(self, x: Tensor, mask: Tensor | None = None, side: int | None = None) -> Tensor:
        if side is None:
            return self.original(x, mask)
        owner: Any = self.owner
        rows, columns = owner.window_size
        table: Tensor = owner.relative_position_bias_table
        table = table.view(2 * rows - 1, 2 * columns - 1, -1)
        table = read_table(table, (rows, columns), (side, side))
        changes = {
            "window_size": (side, side),
            "relative_position_bias_table": table.flatten(0, 1),
            "relative_position_index": relative_position_index((side, side), x.device),
        }
        return self.original_with(changes, x, mask)


def _is_stage(module: Any) -> bool:
    return type(module).__name__ == "BasicLayer" and all(hasattr(b, "H") for b in module.blocks)


def _is_official(encoder: nn.Module) -> bool:
    # The file was copied to many projects, so the library is not known. timm, torchvision and
    # transformers have a class of this name, too, but blocks that are not told the map's size.
    stages = getattr(encoder, "layers", None)
    return isinstance(stages, nn.ModuleList) and all(map(_is_stage, stages))


def _stages(encoder: Any) -> Iterator[tuple[nn.Module, int]]:
    """Yields each stage, and the number of the block after its last."""
    end = 0
    for stage in encoder.layers:
        end += len(stage.blocks)
        yield stage, end


def _to_stage_end(encoder: Any, blocks: Sequence[nn.Module], first: int) -> int:
    """Ends the span with the stage in which it begins, before its norm and patch merging."""
    return next(end for _, end in _stages(encoder) if end > first)


def _stage_call(encoder: Any, span: range) -> tuple[nn.Module, str]:
    (stage,) = (stage for stage, end in _stages(encoder) if end == span.stop)
    return stage, "forward"


def _window(encoder: Any) -> tuple[int, int]:
    side = encoder.layers[0].window_size
    return side, side


SWIN = register_family(
    Family(
        name="Mask2Former and Detectron2 SwinTransformer",
        library="",
        classes=("SwinTransformer",),
        matches=_is_official,
        blocks=lambda encoder: [block for stage in encoder.layers for block in stage.blocks],
        tokens=TokenSequence(lambda encoder: 0),
        grid=GridFromCall(
            # The size of the map is an argument of the stage.
            place=_stage_call,
            read=lambda encoder, x, H, W: (H, W),
            onto_input=True,
        ),
        positions=WindowTable(),
        span=_to_stage_end,
        window=_window,
        inside=False,
        attention=lambda block: (block.norm1, block.attn),
    )
)

"""Official Swin: Mask2Former's, Detectron2's and their copies in other projects."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from expedite_d2.hourglass import Reduction
from expedite_d2.patch.adapter import BlockCall, SequenceAdapter, refuse_oblong
from expedite_d2.patch.override import Override
from expedite_d2.patch.relative_position import read_offsets
from expedite_d2.patch.travel import Travel, attach
from expedite_d2.patch.windows import relative_position_index, shift_mask


class OfficialSwin(SequenceAdapter):
    """The span ends with the stage that it begins in, before its norm and patch merging."""

    family = "Mask2Former and Detectron2 SwinTransformer"

    def matches(self, module: nn.Module) -> bool:
        # The file was copied to many projects, so the library does not tell. timm, torchvision and
        # transformers have a class of this name, too, but blocks that are not told the map's size.
        if not any(kind.__name__ == "SwinTransformer" for kind in type(module).__mro__):
            return False
        stages = getattr(module, "layers", None)
        return isinstance(stages, nn.ModuleList) and all(map(_is_stage, stages))

    def blocks(self, encoder: Any) -> Sequence[nn.Module]:
        return [block for stage in encoder.layers for block in stage.blocks]

    def stop(self, encoder: Any, alpha: int) -> int:
        return next(end for _, end in _stages(encoder) if end > alpha)

    def read(self, encoder: Any) -> Collection[int] | None:
        return ()

    def window(self, encoder: Any) -> tuple[int, int] | None:
        side = encoder.layers[0].window_size
        return side, side

    def check(self, encoder: Any, reduction: Reduction, outputs: Collection[int] | None) -> None:
        side = encoder.layers[0].window_size
        refuse_oblong(reduction.grid(side, side), encoder)
        if outputs is not None and not outputs:
            raise ValueError(
                f"outputs must not be empty: a stage of {type(encoder).__name__} ends at full "
                "resolution"
            )

    def prefixes(self, encoder: Any) -> int:
        return 0

    def overrides(self, encoder: Any, span: range) -> list[Override]:
        (stage,) = (stage for stage, end in _stages(encoder) if end == span.stop)
        blocks: Sequence[Any] = self.blocks(encoder)
        attentions = [_Attention(blocks[number].attn, "forward") for number in span]
        return [_Stage(stage, "forward"), *attentions]

    def run(self, call: BlockCall) -> Tensor:
        owner: Any = call.block.owner
        rows, columns = call.cells
        side = call.encoder.reduction.grid(owner.window_size, owner.window_size)[0]
        shift = side // 2 if owner.shift_size else 0
        mask = None
        if shift:
            padded = (rows + -rows % side, columns + -columns % side)
            mask = shift_mask(padded, (side, side), (shift, shift), call.x.device).squeeze(1)
        changes = {
            "H": rows,
            "W": columns,
            "window_size": side,
            "shift_size": shift,
            "attn": partial(owner.attn, side=side),
        }
        # In the place of the stage's mask, which is for its tokens.
        return call.block.original_seeing(changes, call.x, mask)


class _Stage(Override):
    """Sends the map's size along, which the stage is given."""

    def __call__(self, x: Tensor, H: int, W: int) -> Any:
        return self.original(attach(x, Travel((H, W))), H, W)


class _Attention(Override):
    """Attends in windows of another side, where it is told of it: those of clusters."""

    def __call__(self, x: Tensor, mask: Tensor | None = None, side: int | None = None) -> Tensor:
        if side is None:
            return self.original(x, mask)
        owner: Any = self.owner
        rows, columns = owner.window_size
        table: Tensor = owner.relative_position_bias_table
        table = table.view(2 * rows - 1, 2 * columns - 1, -1)
        table = read_offsets(table, rows, side).transpose(0, 1)
        table = read_offsets(table, columns, side).transpose(0, 1)
        changes = {
            "window_size": (side, side),
            "relative_position_bias_table": table.flatten(0, 1),
            "relative_position_index": relative_position_index((side, side), x.device),
        }
        return self.original_seeing(changes, x, mask)


def _is_stage(module: Any) -> bool:
    return type(module).__name__ == "BasicLayer" and all(hasattr(b, "H") for b in module.blocks)


def _stages(encoder: Any) -> Iterator[tuple[nn.Module, int]]:
    """Each stage, and the number of the block after its last."""
    end = 0
    for stage in encoder.layers:
        end += len(stage.blocks)
        yield stage, end

"""Tiny random ViTs of maps: windowed and global blocks, decomposed relative positions."""

from __future__ import annotations

from typing import Any

from official_shaped import Detectron2ViT
from torch import Tensor

from family_cases.case import Case, randomised


class Detectron2Case(Case):
    alpha, clusters = 1, (3, 3)

    def run(self, model: Any, x: Tensor) -> Tensor:
        return model(x)["last_feat"]


CASES: dict[str, Case] = {
    "detectron2 vit": Detectron2Case(lambda: randomised(Detectron2ViT)),
    "detectron2 vit, no positions": Detectron2Case(
        lambda: randomised(Detectron2ViT, use_rel_pos=False)
    ),
    "detectron2 vit, global": Detectron2Case(
        lambda: randomised(Detectron2ViT, window_block_indexes=())
    ),
}

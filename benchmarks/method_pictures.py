"""Draws docs/accuracy/methods.png: what each method does to the tokens of one image.

    python -m benchmarks.method_pictures

The model is the Segmenter of the embedded scenes, and every method leaves half of its blocks'
multiply-adds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from torch import Tensor

from benchmarks.accuracy import CALIBRATED, CHOSEN, budget_of
from benchmarks.common import ROOT
from expedite_d2 import calibrate, expedite
from expedite_d2.d2.config import load_config
from expedite_d2.d2.data import build_test_loader
from expedite_d2.d2.engine import build_trained_model
from expedite_d2.d2.visualize import draw_clusters
from expedite_d2.errors import cli
from expedite_d2.files import replacing
from expedite_d2.reducers import Clustering, Merging, Points, State, state_of
from expedite_d2.tools.budget import Costs

CONFIG = ROOT / "configs/scenes/semantic/segmenter_vit_mini.yaml"
IMAGE = 35
BUDGET = 0.5


def groups(state: State, attention: bool) -> Tensor:
    """The number of what stands for each token of an image, (H, W).

    Args:
        state: that of the last block's output.
        attention: whether that is what its attention sees.
    """
    places = torch.arange(state.grid.rows * state.grid.columns)
    for step in state.steps:
        if isinstance(step, Clustering):
            assert step.indices is not None
            places = step.indices[0, ..., 0].flatten()[places]
        elif isinstance(step, Merging) and step.places is not None:
            places = step.places[0].long()[places]
    if attention and isinstance(state.layout, Points) and state.layout.groups is not None:
        seen = state.layout.groups.places[0].long()
        prefixes = len(seen) - state.layout.sizes.shape[1]
        places = seen[prefixes:][places]
    return places.view(state.grid.rows, state.grid.columns)


def last_block(model: Any, batch: Any) -> tuple[Tensor, State | None]:
    """What the last block of the encoder puts out for an image, (N, C), and its state."""
    kept: list[Tensor] = []
    block = model.backbone.reducible_blocks()[-1]
    hook = block.register_forward_hook(lambda module, args, out: kept.append(out))
    with torch.inference_mode():
        model(batch)
    hook.remove()
    prefixes = model.backbone.vit.num_prefix_tokens
    return kept[0][0, prefixes:], state_of(kept[0])


@cli
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = ROOT / "docs" / "accuracy" / "methods.png"
    parser.add_argument("--output", type=Path, default=default, metavar="FILE")
    args = parser.parse_args(argv)
    cfg = load_config(str(CONFIG), ["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0])
    model = build_trained_model(cfg).eval()
    batch = list(build_test_loader(cfg, "scenes_val"))[IMAGE]
    image = batch[0]["image"].permute(1, 2, 0).numpy().astype(np.uint8)
    size = image.shape[:2]
    exact, _ = last_block(model, batch)
    budget = budget_of(model, BUDGET, size)
    recipes = {method: CHOSEN["sequence"][method][BUDGET] for method in CHOSEN["sequence"]}

    def reduced(method: str, maps: bool = False) -> tuple[Tensor, State]:
        expedite(model, Costs(model, size).meet(recipes[method], budget))
        if maps:
            calibrate(model, list(build_test_loader(cfg, "scenes_tune"))[:CALIBRATED])
        out, state = last_block(model, batch)
        assert state is not None
        return (out - exact).norm(dim=1) / exact.norm(dim=1).mean(), state

    figure, panels = plt.subplots(1, 5, figsize=(16, 3.6), layout="constrained")
    error, state = reduced("clustering")
    corrected, _ = reduced("clustering", maps=True)
    _, grouped = reduced("grouped attention")
    stride = (size[0] / state.grid.rows, size[1] / state.grid.columns)
    drawn = {
        "clustering: blocks see these": groups(state, False),
        "merging: MLPs see these": groups(grouped, False),
        "grouped: attention sees these": groups(grouped, True),
    }
    for panel, (title, numbers) in zip(panels, drawn.items(), strict=False):
        panel.imshow(draw_clusters(image, numbers.numpy(), stride))
        count = len(numbers.unique())
        panel.set_title(f"{title}\n{count} of {numbers.numel()} tokens", fontsize=10)
    for panel, (title, errors) in zip(
        panels[3:], {"without a detail map": error, "with one": corrected}.items(), strict=True
    ):
        shown = panel.imshow(
            errors.view(state.grid.rows, state.grid.columns),
            vmin=0,
            vmax=float(error.quantile(0.98)),
        )
        panel.set_title(f"clustering's error {title}\nmean {errors.mean():.3f}", fontsize=10)
    figure.colorbar(shown, ax=panels[3:], shrink=0.8, label="distance to the plain token")
    for panel in panels:
        panel.set_axis_off()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(args.output) as partial:
        figure.savefig(partial, dpi=100)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()

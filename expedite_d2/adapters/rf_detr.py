"""transformers' RF-DETR, whose windows lie side by side in the batch, each with its class token.

To the reduction each window is an image. Layers of global attention join the windows of an image
for their attention, whatever the number of tokens in each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from expedite_d2.adapters.family import Family, Positions, Size
from expedite_d2.adapters.hourglass import Hourglass
from expedite_d2.adapters.override import Override
from expedite_d2.adapters.registry import register_family
from expedite_d2.adapters.tokens import GridFromCall, TokenSequence
from expedite_d2.adapters.transformers import is_eager, sides
from expedite_d2.reducers import Groups, Points, State, attach, state_of


def _window(encoder: Any, height: int, width: int) -> Size:
    """Returns rows and columns of patches in a window of an image."""
    (rows, columns), windows = sides(encoder.config.patch_size), encoder.config.num_windows
    return height // rows // windows, width // columns // windows


def _grid(encoder: Any, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Size:
    return _window(encoder, *pixel_values.shape[-2:])


def _configured(encoder: Any) -> Size:
    return _window(encoder, *sides(encoder.config.image_size))


def _image_size(encoder: Any) -> Size:
    # The configured one is of pre-training, and need not consist of whole windows.
    height, width = _configured(encoder)
    (rows, columns), windows = sides(encoder.config.patch_size), encoder.config.num_windows
    return height * windows * rows, width * windows * columns


class _JoinGroups(Override):
    """Joins the groups of an image's windows, where a layer joins the windows' tokens."""

    def call(self, x: Tensor) -> Tensor:
        out, state = self.original(x), state_of(x)
        if state is None or not isinstance(state.layout, Points) or state.layout.groups is None:
            return out
        (places, total), windows = state.layout.groups, x.shape[0] // out.shape[0]
        first = total * torch.arange(windows, dtype=places.dtype, device=places.device)
        joined = (places.unflatten(0, (-1, windows)) + first[:, None]).flatten(1)
        groups = Groups(joined, windows * total)
        return attach(out, State(state.grid, state.layout._replace(groups=groups)))


class _Windows(Positions):
    def overrides(self, hourglass: Hourglass) -> list[Override]:
        layers: Any = hourglass.family.blocks(hourglass.encoder)
        joining = [layers[n] for n in hourglass.span if layers[n].global_attention]
        return [_JoinGroups(layer, "window_unpartition_before_attention") for layer in joining]


RF_DETR = register_family(
    Family(
        name="transformers RfDetrDinov2Backbone",
        library="transformers",
        classes=("RfDetrDinov2Backbone",),
        blocks=lambda encoder: list(encoder.encoder.layer),
        tokens=TokenSequence(),
        grid=GridFromCall(
            # Where the image becomes sequences.
            place=lambda encoder, span: (encoder.embeddings, "forward"),
            read=_grid,
            configured=_configured,
        ),
        positions=_Windows(),
        image_size=_image_size,
        attention=lambda layer: (layer.norm1, layer.attention),
        eager=is_eager,
    )
)

"""Windowed ViTs of maps against slow loops over pairs of cells; one model in three libraries."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from family_cases.case import images
from family_cases.decomposed import (
    sam,
    sam_3,
    segment_anything,
    timm_sam,
)
from settings_cases import clustered
from torch import Tensor, nn
from windows_by_hand import in_windows, slow_attention

from expedite_d2 import expedite
from expedite_d2.reducers import Reduction, reconstruct, reduce

WINDOW = 6

# ---- by hand ------------------------------------------------------------------------------------


def sam_attention(
    layer: Any, x: Tensor, tokens: tuple[int, int], steps: tuple[float, float], unit: float
) -> Tensor:
    return slow_attention(layer.attn, layer.attn.num_attention_heads, x, tokens, steps)


def sam_3_attention(
    layer: Any, x: Tensor, tokens: tuple[int, int], steps: tuple[float, float], unit: float
) -> Tensor:
    """Each pair of channels is a complex number, turned by where its cell has its centre.

    The first half of the pairs tells the column, the second half the row, in units.
    """
    attn, (rows, columns, channels) = layer.attention, x.shape[1:]
    heads = attn.num_attention_heads
    quarter = channels // heads // 4
    speeds = [10_000 ** (-i / quarter) for i in range(quarter)]
    turned = x.new_empty(rows, columns, 2 * quarter, dtype=torch.complex128)
    for row, column in itertools.product(range(rows), range(columns)):
        at_row, at_column = ((i + 0.5) * s - 0.5 for i, s in zip((row, column), steps, strict=True))
        angles = [at * unit * speed for at in (at_column, at_row) for speed in speeds]
        turned[row, column] = torch.polar(x.new_ones(2 * quarter), x.new_tensor(angles))
    q, k, v = (
        project(x).flatten(1, 2).unflatten(2, (heads, -1)).transpose(1, 2)
        for project in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    q, k = (
        torch.view_as_complex(part.unflatten(3, (-1, 2)).contiguous()) * turned.flatten(0, 1)
        for part in (q, k)
    )
    logits = (q @ k.mH).real * (channels // heads) ** -0.5
    out = (logits.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
    return attn.o_proj(out)


@torch.no_grad()
def by_hand(
    model: Any, x: Tensor, reduction: Reduction, attention: Callable[..., Tensor]
) -> Tensor:
    """The map after the last layer, (B, H, W, C)."""
    for layer in model.layers[: reduction.alpha]:
        x = layer(x)
    grid = (x.shape[1], x.shape[2])
    window = max(layer.window_size for layer in model.layers)
    low, clustering = reduce(x, reduction, (window, window) if window else None)
    side = reduction.cluster.cells(window, window)[0] if window else 0
    steps = (grid[0] / low.shape[1], grid[1] / low.shape[2])
    if window:
        steps = (window / side, window / side)
    for layer in model.layers[reduction.alpha :]:
        normed = layer.layer_norm1(low)
        if layer.window_size:
            inside = partial(attention, layer, tokens=(window, window), steps=steps, unit=1.0)
            low = low + in_windows(inside, normed, side)
        else:
            # SAM 3 counts as many steps along a whole image as along a window.
            low = low + attention(layer, normed, grid, steps, WINDOW / grid[0])
        low = low + layer.mlp(layer.layer_norm2(low))
    return reconstruct(low, clustering)


SETTINGS = [
    clustered(1, (4, 4)),
    clustered(0, (3, 3), iterations=1, mode="replace", temperature=0.1),
    clustered(2, (0.5, 0.5), neighbourhood=3, topk=2),
]
# Whole windows, ragged ones, less than one; then without windows.
KINDS: list[tuple[dict[str, Any], Reduction]] = [
    *(({"image_size": side}, reduction) for side in (48, 32, 20) for reduction in SETTINGS),
    ({"image_size": 32, "global_attn_indexes": [0, 1, 2, 3]}, clustered(1, (5, 3))),
]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("changes", "reduction"), KINDS)
def test_sam_equals_hand_composition(
    changes: dict[str, Any], reduction: Reduction, attention: str
) -> None:
    model = sam(**changes, attn_implementation=attention).double()
    x = images(changes["image_size"], changes["image_size"], batch=2).double()
    with torch.no_grad():
        tokens = model.patch_embed(x) + model.pos_embed
        expected = model.neck(by_hand(copy.deepcopy(model), tokens, reduction, sam_attention))
        out = expedite(model, reduction)(x).last_hidden_state
    # transformers' eager softmax is in float32.
    tolerance = 1e-10 if attention == "sdpa" else 1e-5
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("changes", "reduction"), KINDS)
def test_sam_3_equals_hand_composition(changes: dict[str, Any], reduction: Reduction) -> None:
    model, side = sam_3(**changes).double(), changes["image_size"]
    x = images(side, side, batch=2).double()
    with torch.no_grad():
        tokens = model.embeddings(x).unflatten(1, (side // 4, side // 4))
        tokens = model.layer_norm(tokens)
        expected = by_hand(copy.deepcopy(model), tokens, reduction, sam_3_attention).flatten(1, 2)
        out = expedite(model, reduction)(x).last_hidden_state
    # transformers rotates in float32.
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


# ---- one model in three libraries ---------------------------------------------------------------


def in_timm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("mlp.lin", "mlp.fc"): tensor for name, tensor in weights.items()}


def in_transformers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "blocks.": "layers.",
        ".norm": ".layer_norm",
        "patch_embed.proj.": "patch_embed.projection.",
        "neck.0": "neck.conv1",
        "neck.1": "neck.layer_norm1",
        "neck.2": "neck.conv2",
        "neck.3": "neck.layer_norm2",
    }
    converted = {}
    for name, tensor in weights.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        converted[name] = tensor
    return converted


@pytest.mark.parametrize("reduction", SETTINGS)
def test_one_sam_is_the_same_in_three_libraries(reduction: Reduction) -> None:
    norm = partial(nn.LayerNorm, eps=1e-6)
    official = segment_anything(norm_layer=norm).double()
    weights = official.state_dict()
    timms, theirs, eager = timm_sam(norm_layer=norm), sam(), sam(attn_implementation="eager")
    timms.load_state_dict(in_timm(weights))
    theirs.load_state_dict(in_transformers(weights))
    eager.load_state_dict(in_transformers(weights))
    others = [timms.double(), theirs.double(), eager.double()]
    x = images(32, 32).double()

    def outputs() -> list[Tensor]:
        with torch.no_grad():
            out = [official(x), *(other(x) for other in others)]
        return [part if isinstance(part, Tensor) else part.last_hidden_state for part in out]

    plain = outputs()
    for model in (official, *others):
        expedite(model, reduction)
    fast = outputs()
    assert not torch.allclose(fast[0], plain[0], rtol=1e-2, atol=1e-2)
    for expected, *rest in (plain, fast):
        for got, tolerance in zip(rest, (1e-10, 1e-10, 1e-5), strict=True):
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)

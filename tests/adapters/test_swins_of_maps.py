"""Expediting Swins whose blocks take maps or clips: torchvision's, timm's, official for videos.

Against this package's own Swin with the same weights, and against the libraries' own functions and
blocks on clusters, with biases computed pair by pair.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torchvision
import video_swin_shaped
from family_cases import CASES
from family_cases.case import images, randomised
from family_cases.swin import timm_swin, torchvision_swin
from settings_cases import clustered
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from torch import Tensor, nn
from torchvision.models import swin_transformer as maps
from torchvision.models.video import swin_transformer as clips

from expedite_d2 import expedite
from expedite_d2.d2.modeling.backbone.swin import ExpeditedSwinTransformer
from expedite_d2.reducers import Reduction, clustering_of, reconstruct, reduce

SIZE: dict[str, Any] = {"embed_dim": 16, "depths": [1, 1, 6, 1], "num_heads": [1, 2, 2, 4]}
TV_SIZE = {**SIZE, "patch_size": [4, 4], "stochastic_depth_prob": 0.0}


def ours(version: int) -> ExpeditedSwinTransformer:
    model = randomised(ExpeditedSwinTransformer, **SIZE, window_size=6, version=version)
    for name, parameter in model.named_parameters():
        if "logit_scale" in name:
            nn.init.uniform_(parameter, 1.0, 5.0)  # of which the last is cut off
    return model.double()


def torchvision_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in state.items():
        first, *rest = name.split(".")
        if first == "patch_embed":
            name = ".".join(["features.0", {"proj": "0", "norm": "2"}[rest[0]], *rest[1:]])
        elif first == "layers":
            stage = 2 * int(rest[0]) + 1
            after = rest[1:] if rest[1] == "blocks" else ["downsample", *rest[2:]]
            stage += rest[1] != "blocks"
            name = ".".join(["features", str(stage), *after[1:]])
        name = name.replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.3").replace("norm3", "norm")
        if name.endswith("q_bias"):
            other = state[".".join([first, *rest[:-1], "v_bias"])]
            name = name.replace("q_bias", "qkv.bias")
            value = torch.cat([value, torch.zeros_like(value), other])
        elif name.endswith("v_bias"):
            continue
        renamed[name] = value
    return renamed


def timm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in state.items():
        if ".downsample." in name:  # before a stage, not after it
            number = int(name.split(".")[1])
            name = name.replace(f"layers.{number}", f"layers.{number + 1}")
        renamed[name.replace("norm3.", "norm.")] = value
    return renamed


def torchvision_model(version: int) -> Any:
    parts: dict[str, Any] = {}
    if version == 2:
        parts = {
            "block": maps.SwinTransformerBlockV2,
            "downsample_layer": maps.PatchMergingV2,
        }
    model = maps.SwinTransformer(**TV_SIZE, window_size=[6, 6], **parts)
    model.avgpool = model.flatten = model.head = nn.Identity()
    return model, torchvision_names


def timm_model(version: int) -> Any:
    kind = SwinTransformer if version == 1 else SwinTransformerV2
    model = kind(
        **SIZE, window_size=6, num_classes=0, global_pool="", dynamic_img_size=True,
        always_partition=True,
    )  # fmt: skip
    return model, timm_names


REDUCTIONS = {
    "odd block": clustered(4, (4, 4)),
    "whole stage": clustered(2, (3, 3), mode="replace", temperature=0.2),
    "oblong, first stage": clustered(0, (4, 5), iterations=2, neighbourhood=3),
    "last of a stage": clustered(7, (0.5, 0.5)),
    "one cell": clustered(3, (1, 1), topk=1),
    "last stage": clustered(8, (5, 5)),
}
reductions = pytest.mark.parametrize("reduction", REDUCTIONS.values(), ids=REDUCTIONS)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("make", [torchvision_model, timm_model])
@reductions
def test_same_weights_give_the_same_as_ours(
    make: Callable[[int], Any], version: int, reduction: Reduction
) -> None:
    reference = ours(version)
    theirs, renamed = make(version)
    found = theirs.load_state_dict(renamed(reference.state_dict()), strict=False)
    assert all("relative_" in name for name in found.missing_keys)
    assert all(name.startswith("norm") for name in found.unexpected_keys)  # of other outputs
    expedite(theirs.double().eval(), reduction)
    reference.reduction = reduction
    # torchvision's pads first and rolls then, as ours does; timm's the other way around.
    for size in [(192, 192), (200, 272)] if make is torchvision_model else [(192, 192), (96, 288)]:
        x = images(*size, batch=2).double()
        with torch.no_grad():
            out, expected = theirs(x), reference(x)["res5"]
        out = out if make is torchvision_model else out.permute(0, 3, 1, 2)
        # Ours keeps what it reads a table by, and coordinates, in float32.
        tolerance = 1e-6 if version == 1 else 2e-5
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


# ---- the libraries' own functions and blocks on clusters --------------------------------------


def read(table: Tensor, place: Sequence[float]) -> Tensor:
    """The value of a table of offsets between its entries, one axis after the other."""
    for offset in place:
        position = offset + len(table) // 2
        below = math.floor(position)
        above = min(below + 1, len(table) - 1)
        table = table[below] + (position - below) * (table[above] - table[below])
    return table


def bias_by_pairs(attention: Any, cells: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """(heads, N, N) in windows of `lengths` cells, of which `cells` lie over a window of tokens."""
    window = attention.window_size
    places = list(itertools.product(*map(range, lengths)))
    rows = []
    for one, other in itertools.product(places, places):
        place = [(a - b) * m / c for a, b, m, c in zip(one, other, window, cells, strict=True)]
        if hasattr(attention, "cpb_mlp"):
            scaled = torch.tensor([8 * d / (m - 1) for d, m in zip(place, window, strict=True)])
            coordinates = scaled.sign() * (1 + scaled.abs()).log2() / 3
            rows.append(16 * attention.cpb_mlp(coordinates.double()).sigmoid())
        else:
            table = attention.relative_position_bias_table
            rows.append(read(table.view(*(2 * m - 1 for m in window), -1), place))
    return torch.stack(rows, -1).unflatten(-1, (len(places), len(places)))


def torchvision_block(block: Any, x: Tensor, cells: tuple[int, int], shifted: bool) -> Tensor:
    """One block on clusters, by the library's own function, which writes out its matrix."""
    attention: Any = block.attn
    shift = [side // 2 * shifted for side in cells]
    function, window = maps.shifted_window_attention, list(cells)
    if x.dim() == 5:
        function = clips.shifted_window_attention_3d
        frames = attention.window_size[0]
        window, shift = [frames, *cells], [frames // 2 * shifted, *shift]
        window, shift = clips._get_window_and_shift_size(shift, list(x.shape[1:4]), window)
    extra = {"logit_scale": attention.logit_scale} if hasattr(attention, "logit_scale") else {}
    whole, length = [*attention.window_size[:-2], *cells], math.prod(window)
    # The official one for videos reads the biases of a cut window in the rows of a whole one.
    official = isinstance(block, video_swin_shaped.SwinTransformerBlock3D)
    pairs = bias_by_pairs(attention, whole, whole if official else window)[:, :length, :length]

    def attend(x: Tensor) -> Tensor:
        return function(
            x, attention.qkv.weight, attention.proj.weight, pairs, window, attention.num_heads,
            shift, qkv_bias=attention.qkv.bias, proj_bias=attention.proj.bias, training=False,
            **extra,
        )  # fmt: skip

    if extra:
        x = x + block.norm1(attend(x))
        return x + block.norm2(block.mlp(x))
    x = x + attend(block.norm1(x))
    return x + block.mlp(block.norm2(x))


def timm_block(block: Any, x: Tensor, cells: tuple[int, int], shifted: bool) -> Tensor:
    """One block on clusters, by another block that was made for these windows."""
    settings: dict[str, Any] = {
        "dim": x.shape[3], "input_resolution": x.shape[1:3], "num_heads": block.attn.num_heads,
        "window_size": cells, "shift_size": [side // 2 * shifted for side in cells],
        "always_partition": True,
    }  # fmt: skip
    if isinstance(block, SwinTransformerV2Block):
        # Offsets of the cells' windows are measured in their own unit.
        reach = block.attn.pretrained_window_size
        reach = reach if all(reach) else block.attn.window_size
        scaled = [
            (r - 1) * c / m + 1
            for r, c, m in zip(reach, cells, block.attn.window_size, strict=True)
        ]
        other = SwinTransformerV2Block(**settings, pretrained_window_size=tuple(scaled)).double()
        other.attn._init_buffers()
        other.load_state_dict(block.state_dict())
    else:
        other = SwinTransformerBlock(**settings).double()
        name = "attn.relative_position_bias_table"
        pairs = bias_by_pairs(block.attn, cells, cells).flatten(1)
        table = torch.zeros_like(other.attn.relative_position_bias_table)
        table[other.attn.relative_position_index.flatten()] = pairs.t()
        other.load_state_dict({**block.state_dict(), name: table})
    return other.eval()(x)


def by_hand(
    run: Any, blocks: Sequence[Any], tokens: Tensor, window: Any, reduction: Reduction
) -> Tensor:
    """Blocks of one stage, of which the first runs on tokens, and the next one shifts."""
    tokens = blocks[0](tokens)
    lead = tokens.shape[:-3]
    low, clustering = reduce(tokens.flatten(0, -4), reduction, window)
    low = low.unflatten(0, lead)
    for number, block in enumerate(blocks[1:], 1):
        low = run(block, low, reduction.cluster.cells(*window), number % 2 == 1)
    return reconstruct(low.flatten(0, -4), clustering).unflatten(0, lead)


# Whole windows, ragged ones, and a map of less than a window along one axis or both.
SIZES = [(12, 12), (13, 17), (5, 9), (4, 5)]
stage_sizes = pytest.mark.parametrize("size", SIZES, ids=str)


@pytest.mark.parametrize("name", ["torchvision swin", "torchvision swin v2"])
@stage_sizes
def test_torchvision_equals_its_own_function(name: str, size: tuple[int, int]) -> None:
    case = CASES[name]
    model, reduction = case.make().double(), clustered(3, case.clusters)
    for block in case.blocks(model):
        if hasattr(block.attn, "logit_scale"):
            nn.init.uniform_(block.attn.logit_scale, 1.0, 5.0)
    (stage,) = model.features[5:]
    tokens = torch.randn(2, *size, 64, dtype=torch.float64)
    with torch.no_grad():
        window = tuple(stage[0].attn.window_size)
        expected = by_hand(torchvision_block, list(stage), tokens, window, reduction)
        out = expedite(model, reduction).features[5](tokens)
    # The second version computes coordinates in float32.
    tolerance = 1e-10 if name == "torchvision swin" else 1e-5
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


def official_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of torchvision's Swin for videos, in official ones."""
    renamed = {}
    for name, value in state.items():
        first, number, *rest = name.split(".")
        if first == "features":
            stage, merges = divmod(int(number), 2)
            name = ".".join(["layers", str(stage), "downsample" if merges else "blocks", *rest])
        renamed[name.replace("mlp.0", "mlp.fc1").replace("mlp.3", "mlp.fc2")] = value
    return renamed


@pytest.mark.parametrize(
    "reduction",
    [None, clustered(3, (4, 3)), clustered(0, (3, 5), mode="replace"), clustered(2, (0.5, 0.5))],
    ids=["plain", "odd block", "first stage", "whole stage"],
)
@pytest.mark.parametrize("size", [(6, 96, 128), (5, 101, 130), (2, 104, 150)], ids=str)
def test_official_clips_are_those_of_torchvision(size: Any, reduction: Reduction | None) -> None:
    theirs = torchvision_swin(torchvision.models.video.SwinTransformer3d, [2, 6, 6]).double()
    model = video_swin_shaped.SwinTransformer3D().double().eval()
    model.load_state_dict(official_names(theirs.state_dict()))
    if reduction is not None:
        expedite(theirs, reduction)
        expedite(model, reduction)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x).flatten(1), theirs(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("frames", [3, 2, 1])
@stage_sizes
def test_official_clips_equal_torchvisions_function(frames: int, size: tuple[int, int]) -> None:
    model = randomised(video_swin_shaped.SwinTransformer3D, depths=[1, 1, 3]).double()
    reduction, stage = clustered(3, (3, 4)), model.layers[2]
    tokens = torch.randn(2, frames, *size, 64, dtype=torch.float64)
    first = partial(stage.blocks[0], mask_matrix=None)  # does not shift
    with torch.no_grad():
        blocks = [first, *stage.blocks[1:]]
        expected = by_hand(torchvision_block, blocks, tokens, (6, 6), reduction)
        out = expedite(model, reduction).layers[2](tokens.permute(0, 4, 1, 2, 3))
    out = out.permute(0, 2, 3, 4, 1)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("frames", [3, 2, 1])
@stage_sizes
def test_clips_equal_the_own_function(frames: int, size: tuple[int, int]) -> None:
    kind = torchvision.models.video.SwinTransformer3d
    model = torchvision_swin(kind, [2, 6, 6], depths=[1, 1, 3]).double()
    reduction = clustered(3, (3, 4))
    tokens = torch.randn(2, frames, *size, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = by_hand(torchvision_block, list(model.features[4]), tokens, (6, 6), reduction)
        out = expedite(model, reduction).features[4](tokens)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    low, clustering = clustering_of(out)
    assert low.shape[0] == 2 * frames
    torch.testing.assert_close(reconstruct(low, clustering).unflatten(0, (2, frames)), out)


@pytest.mark.parametrize("kind", [SwinTransformer, SwinTransformerV2])
@pytest.mark.parametrize("dynamic", [True, False])
@stage_sizes
def test_timm_equals_a_block_for_clusters(kind: Any, dynamic: bool, size: tuple[int, int]) -> None:
    changes = {"pretrained_window_sizes": (0, 0, 4)} if kind is SwinTransformerV2 else {}
    model = timm_swin(
        kind, img_size=[16 * side for side in size], window_size=(6, 4), always_partition=True,
        dynamic_img_size=dynamic, **changes,
    ).double()  # fmt: skip
    for block in model.layers[2].blocks:  # masks of a fixed size were made for float32
        block._init_buffers()
    reduction = clustered(3, (4, 3))
    tokens = torch.randn(2, *size, 64, dtype=torch.float64)
    stage: Any = model.layers[2]
    stage.downsample = nn.Identity()
    with torch.no_grad():
        expected = by_hand(timm_block, list(stage.blocks), tokens, (6, 4), reduction)
        out = expedite(model, reduction).layers[2](tokens)
    tolerance = 1e-10 if kind is SwinTransformer else 1e-5
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)

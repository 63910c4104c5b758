"""Expediting Detectron2's ViT against its blocks in slow loops over clusters and windows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import official_shaped
import pytest
import torch
from settings_cases import clustered
from torch import Tensor, nn
from windows_by_hand import in_windows, slow_attention

from expedite_d2 import expedite, restore
from expedite_d2.reducers import Reduction, clustering_of, reconstruct, reduce
from expedite_d2.tools.calibrate import calibrate

Make = Callable[..., Any]


@pytest.fixture(params=["shaped", pytest.param("detectron2", marks=pytest.mark.detectron2)])
def vit(request: pytest.FixtureRequest) -> Make:
    """Four blocks, of which 1 and 2 attend in 6x6 windows; made for images of 8x8 tokens."""
    settings: dict[str, Any] = {
        "img_size": 32, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2,
        "use_rel_pos": True, "window_size": 6, "window_block_indexes": (1, 2),
    }  # fmt: skip
    kind: Any = official_shaped.Detectron2ViT
    if request.param == "detectron2":
        reason = "needs the real Detectron2"
        module = pytest.importorskip("detectron2.modeling.backbone.vit", reason=reason)
        kind = module.ViT
        settings |= {"residual_block_indexes": (2,), "pretrain_img_size": 16}

    def make(**changes: Any) -> Any:
        return randomised(kind(**{**settings, **changes}))

    return make


def randomised(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "rel_pos" in name:
                parameter.copy_(noise)  # large enough that a wrong position shows
            elif parameter.dim() > 1:
                parameter.copy_(0.25 * noise)
            else:
                parameter.add_(0.1 * noise)
    return model.eval()


def images(height: int, width: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


# Maps of 12x12, 8x10 (ragged windows) and 9x5 (less than one) tokens.
SIZES = [(48, 48), (32, 40), (36, 20)]


# ---- by hand ----------------------------------------------------------------------------------


def slow_block(
    block: Any, x: Tensor, grid: tuple[int, int], steps: tuple[float, float], side: int
) -> Tensor:
    """One block on clusters; `side` is that of their windows."""
    normed = block.norm1(x)
    heads = block.attn.num_heads
    if block.window_size:
        tokens = (block.window_size, block.window_size)
        attend = partial(slow_attention, block.attn, heads, tokens=tokens, steps=steps)
        x = x + in_windows(attend, normed, side)
    else:
        x = x + slow_attention(block.attn, heads, normed, grid, steps)
    x = x + block.mlp(block.norm2(x))
    if block.use_residual_block:
        x = block.residual(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return x


@torch.no_grad()
def by_hand(model: Any, x: Tensor, reduction: Reduction, window: int) -> Tensor:
    x = model.patch_embed(x)
    x = x if x.shape[-1] == 16 else x.permute(0, 2, 3, 1)  # ours gives channels first
    grid = (x.shape[1], x.shape[2])
    if hasattr(model, "pos_embed"):
        from detectron2.modeling.backbone.utils import get_abs_pos

        x = x + get_abs_pos(model.pos_embed, True, grid)
    for block in model.blocks[: reduction.alpha]:
        x = block(x)
    low, clustering = reduce(x, reduction, (window, window) if window else None)
    side = 0
    steps = (grid[0] / low.shape[1], grid[1] / low.shape[2])
    if window:
        side = reduction.cluster.cells(window, window)[0]
        steps = (window / side, window / side)
    for block in model.blocks[reduction.alpha :]:
        low = slow_block(block, low, grid, steps, side)
    return reconstruct(low, clustering).permute(0, 3, 1, 2)


WINDOWED = [
    clustered(1, (4, 4)),
    clustered(0, (3, 3), iterations=1, mode="replace", temperature=0.1),
    clustered(3, (0.5, 0.5), neighbourhood=3, topk=2),
]
GLOBAL = [clustered(1, (5, 3)), clustered(2, (0.75, 0.5), mode="replace")]


@pytest.mark.parametrize(
    ("changes", "window", "reduction"),
    [
        *(({}, 6, reduction) for reduction in WINDOWED),
        *(({"window_block_indexes": ()}, 0, reduction) for reduction in GLOBAL),
    ],
)
def test_vit_equals_hand_composition(
    vit: Make, changes: dict[str, Any], window: int, reduction: Reduction
) -> None:
    model = vit(**changes)
    assert expedite(model, reduction) is model
    hand = restore(copy.deepcopy(model))
    for size in SIZES:
        x = images(*size)
        with torch.no_grad():
            out = model(x)["last_feat"]
        torch.testing.assert_close(out, by_hand(hand, x, reduction, window), rtol=1e-5, atol=1e-5)


# ---- use ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"use_rel_pos": False}, {"window_block_indexes": ()}], ids=str
)
def test_vit_is_restored_copied_and_compiled(vit: Make, changes: dict[str, Any]) -> None:
    torch.compiler.reset()
    model, x = vit(**changes), images(32, 40)
    with torch.no_grad():
        plain = model(x)["last_feat"]
        expected = expedite(model, alpha=1, clusters=(4, 4))(x)["last_feat"]
        assert not torch.equal(expected, plain)
        other = copy.deepcopy(model)
        assert torch.equal(other(x)["last_feat"], expected)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x)["last_feat"], expected)
        for restored in (restore(other), restore(model)):
            assert torch.equal(restored(x)["last_feat"], plain)


def test_vit_leaves_small_images_alone(vit: Make) -> None:
    model, x = vit(window_block_indexes=()), images(32, 40)
    with torch.no_grad():
        plain = model(x)["last_feat"]
        with pytest.warns(UserWarning, match="no more tokens than the 8x10 cluster grid"):
            assert torch.equal(expedite(model, alpha=1, clusters=(8, 10))(x)["last_feat"], plain)


def test_vit_may_stay_on_its_clusters(vit: Make) -> None:
    model, x = expedite(vit(), alpha=1, clusters=(4, 4), outputs=()), images(32, 40)
    with torch.no_grad():
        seen: list[Tensor] = []
        model.blocks[3].register_forward_hook(lambda _, args, out: seen.append(out))
        assert model(x)["last_feat"].shape == (2, 16, 6, 7)
        found = clustering_of(seen[0])
        assert found is not None
        expected = expedite(model, alpha=1, clusters=(4, 4))(x)["last_feat"]
        assert torch.equal(reconstruct(*found).permute(0, 3, 1, 2), expected)


def test_vit_is_found_and_calibrated(vit: Make) -> None:
    pyramid, x = nn.ModuleDict({"net": vit()}), images(32, 40)
    expedite(pyramid, alpha=1, clusters=(4, 4))
    pyramid.forward = lambda x: pyramid["net"](x)  # type: ignore[method-assign]
    found = calibrate(pyramid, [x])
    assert pyramid["net"].reduction == found and found.cluster.temperature > 0


@pytest.mark.detectron2
def test_pyramid_on_vit_is_differentiable() -> None:
    reason = "needs the real Detectron2"
    module = pytest.importorskip("detectron2.modeling.backbone.vit", reason=reason)
    net = randomised(module.ViT(img_size=32, patch_size=4, embed_dim=16, depth=4, num_heads=2))
    pyramid = module.SimpleFeaturePyramid(net, "last_feat", 16, (2.0, 1.0), norm="LN").eval()
    x = images(32, 40)
    plain = pyramid(x)
    expedite(pyramid, alpha=1, clusters=(4, 4))
    outputs = pyramid(x)
    assert {n: out.shape for n, out in outputs.items()} == {n: p.shape for n, p in plain.items()}
    sum(out.square().sum() for out in outputs.values()).backward()
    gradients = [parameter.grad for parameter in pyramid.net.blocks.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 4}, "alpha must be less than the 4 blocks of .*ViT, got 4"),
        ({"clusters": (6, 6)}, "clusters must be smaller than the 6x6 window, got 6x6"),
        ({"clusters": (4, 3)}, "as many rows as columns in the square windows of .*ViT, got 4x3"),
    ],
)
def test_vit_refuses(vit: Make, settings: dict[str, Any], message: str) -> None:
    model = vit()
    with pytest.raises(ValueError, match=message):
        expedite(model, **{"alpha": 1, "clusters": (4, 4), **settings})
    assert not hasattr(model, "reduction")

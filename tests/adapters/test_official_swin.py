"""Expediting official Swin, Mask2Former's and Detectron2's, against this package's own."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import official_shaped
import pytest
import torch
from settings_cases import clustered
from torch import Tensor, nn

from expedite_d2 import expedite, restore
from expedite_d2.d2.modeling.backbone.swin import ExpeditedSwinTransformer
from expedite_d2.reducers import Reduction
from expedite_d2.tools.calibrate import calibrate

SIZE: dict[str, Any] = {
    "embed_dim": 16,
    "depths": [1, 1, 6, 1],
    "num_heads": [1, 2, 2, 4],
    "window_size": 6,
}
# Maps of 12x12, 13x17 and 5x9 tokens in the third stage: whole, ragged and less than a window.
SIZES = [(192, 192), (201, 270), (70, 134)]


def randomise(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "relative_position_bias_table" in name:
                parameter.copy_(noise)  # large enough that a wrong bias shows
            elif parameter.dim() > 1:
                parameter.copy_(0.15 * noise)
            else:
                parameter.add_(0.1 * noise)
    model.eval()  # returns nothing in Mask2Former
    return model


@pytest.fixture(
    params=[
        "shaped",
        pytest.param("mask2former", marks=pytest.mark.detectron2),
        pytest.param("detectron2", marks=pytest.mark.detectron2),
    ]
)
def official(request: pytest.FixtureRequest) -> Any:
    """Official-shaped modules of our own, and the official ones where they are."""
    if request.param == "shaped":
        return randomise(official_shaped.SwinTransformer(**SIZE))
    mask2former_swin: ModuleType = request.getfixturevalue("mask2former_swin")
    if request.param == "mask2former":
        return randomise(mask2former_swin.SwinTransformer(**SIZE))
    from detectron2.modeling.backbone import SwinTransformer

    return randomise(SwinTransformer(**SIZE))


def ours(official: Any, reduction: Reduction | None = None) -> ExpeditedSwinTransformer:
    model = ExpeditedSwinTransformer(**SIZE, reduction=reduction).eval()
    model.to(official.patch_embed.proj.weight.dtype).load_state_dict(official.state_dict())
    return model


def images(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(model(x).values())


@pytest.mark.parametrize(
    "reduction",
    [
        clustered(4, (4, 4)),
        clustered(2, (3, 3), mode="replace", temperature=0.2),
        clustered(0, (4, 4), iterations=2, neighbourhood=3),
        clustered(7, (0.5, 0.5)),
        clustered(3, (1, 1), topk=1),
        clustered(8, (5, 5)),
    ],
    ids=["odd block", "whole stage", "first stage", "last of a stage", "one cell", "last stage"],
)
def test_official_swin_equals_ours(official: Any, reduction: Reduction) -> None:
    # In float32 the two round differently, and a token's nearest centres may then be others.
    model = ours(official.double(), reduction)
    assert expedite(official, reduction) is official
    assert official.reduction == reduction
    for size in SIZES:
        x = images(*size).double()
        for theirs, expected in zip(run(official, x), run(model, x), strict=True):
            torch.testing.assert_close(theirs, expected, rtol=1e-6, atol=1e-6)


def test_official_swin_is_restored_and_copied(official: Any) -> None:
    x = images(*SIZES[1])
    plain = run(official, x)
    expected = run(expedite(official, alpha=4, clusters=(4, 4)), x)
    assert torch.equal(expected[1], plain[1]) and not torch.equal(expected[2], plain[2])
    other = copy.deepcopy(official)
    assert all(map(torch.equal, run(other, x), expected))
    assert all(map(torch.equal, run(restore(other), x), plain))
    assert all(map(torch.equal, run(official, x), expected))
    assert all(map(torch.equal, run(restore(official), x), plain))


def test_official_swin_is_found_and_calibrated(official: Any) -> None:
    model = nn.Sequential(official)
    expedite(model, alpha=4, clusters=(4, 4))
    reference = ours(official, clustered(4, (4, 4)))
    x = images(*SIZES[1])
    found, expected = (calibrate(m, [x]).cluster.temperature for m in (model, reference))
    assert found == pytest.approx(expected, rel=1e-4)


def test_official_swin_passes_gradients(official: Any) -> None:
    model = ours(official.double(), clustered(4, (4, 4))).train()
    expedite(official, alpha=4, clusters=(4, 4)).train()
    for module in official.modules():
        if type(module).__name__ == "DropPath":
            module.drop_prob = 0.0
    for module in model.modules():
        if type(module).__name__ == "StochasticDepth":
            module.p = 0.0
    x = images(*SIZES[1]).double()
    for module in (official, model):
        sum(out.square().mean() for out in module(x).values()).backward()
    expected = dict(model.named_parameters())
    for name, parameter in official.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 9}, "alpha must be less than the 9 blocks of SwinTransformer, got 9"),
        ({"clusters": (6, 6)}, "clusters must be smaller than the 6x6 window, got 6x6"),
        ({"clusters": (4, 3)}, "as many rows as columns in the square windows .*, got 4x3"),
        ({"outputs": ()}, "outputs must not be empty: a stage of SwinTransformer ends"),
    ],
)
def test_official_swin_refuses(official: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expedite(official, **{"alpha": 1, "clusters": (4, 4), **settings})
    assert not hasattr(official, "reduction")

"""The fit of detail maps."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from family_cases import CASES
from family_cases.case import Case, images
from family_cases.plain import timm_vit
from family_cases.rotary import transformers_dinov3
from settings_cases import clustered
from torch import Tensor, nn

from expedite_d2 import expedite, restore
from expedite_d2.reducers import Merge, Reduction
from expedite_d2.reducers.correction import maps_at
from expedite_d2.tools.calibrate import calibrate
from expedite_d2.tools.detail_maps import DetailMaps, Regression, Subject
from expedite_d2.tools.outputs import distance


def test_regression_is_ridge_without_a_penalty_on_the_constant() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=generator)
    matrix, constant = torch.randn(2, 3, generator=generator), torch.tensor([5.0, -7.0])
    y = x @ matrix.T + constant
    sums = Regression()
    for part in (slice(0, 50), slice(50, 200)):
        sums.add(x[part], y[part])
    found, offset = sums.solve()
    # By hand: (X'X + l I) w = X'y over centred columns, since nothing is asked of the constant.
    centred = (x - x.mean(0)).double()
    gram = centred.T @ centred
    penalty = 0.01 * (x.double().square().sum(0)).mean()
    expected = torch.linalg.solve(
        gram + penalty * torch.eye(3), centred.T @ (y - y.mean(0)).double()
    ).T
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        offset, y.mean(0).double() - expected @ x.mean(0).double(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "reduction", [clustered(1, (3, 3)), Reduction(Merge((1, 2), 0.7))], ids=str
)
@pytest.mark.parametrize("name", ["timm vit", "transformers vit", "transformers dpt"])
def test_calibrated_maps_bring_the_encoder_nearer_to_the_plain_one(
    name: str, reduction: Reduction
) -> None:
    case = CASES[name]
    model, x = case.make(), images(*case.size, batch=12)
    state = list(model.state_dict())
    with torch.no_grad():
        plain = case.run(model, x)
        expedite(model, reduction)
        before = distance([case.run(model, x)], [plain])
        seen = calibrate(Called(case, model), [image[None] for image in x], temperature=False)
        assert seen.correction is not None and seen == model.reduction
        assert seen.steps == reduction.steps
        after = distance([case.run(model, x)], [plain])
        assert after < 0.9 * before
        assert list(model.state_dict()) == state
        other = expedite(case.make(), seen)
        assert torch.equal(case.run(other, x), case.run(model, x))
        assert torch.equal(case.run(copy.deepcopy(model), x), case.run(model, x))
        with torch.autocast("cpu", torch.bfloat16):
            mixed = case.run(model, x)
        assert distance([mixed], [case.run(model, x)]) < 0.1
        half = case.run(copy.deepcopy(model).bfloat16(), x.bfloat16())
        assert distance([half], [case.run(model, x)]) < 0.1
        restore(model)
        assert torch.equal(case.run(model, x), plain) and not list(model.buffers())


class Called(nn.Module):
    """A model around an encoder, whose output is the encoder's last."""

    def __init__(self, case: Case, encoder: Any) -> None:
        super().__init__()
        self.case, self.encoder = case, encoder

    def forward(self, x: Tensor) -> Tensor:
        return self.case.run(self.encoder, x)


def test_maps_are_fitted_where_somebody_reads() -> None:
    model = timm_vit()
    expedite(model, clustered(1, (3, 3)))
    x = images(24, 24, batch=1)
    with torch.no_grad():
        assert Subject(model).read(lambda: model(x)) == [3]
        read = Subject(model).read(lambda: model.forward_intermediates(x, indices=[0, 2]))
    assert read == [2, 3]


class InHalves(nn.Module):
    """A model that runs its encoder twice on an image, on its upper and its lower half."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.encoder(half) for half in x.chunk(2, dim=2)])


def test_every_pass_over_an_image_is_fitted_to() -> None:
    whole = [image[None] for image in images(64, 40, batch=8)]
    halves = [half for image in whole for half in image.chunk(2, dim=2)]
    model, other = (expedite(timm_vit(), clustered(1, (3, 3))) for _ in range(2))
    found, expected = DetailMaps(Subject(model), [3]), DetailMaps(Subject(other), [3])
    twice = InHalves(model)
    with torch.no_grad():
        for image in whole:
            found.add(partial(twice, image))
        for half in halves:
            expected.add(partial(other, half))
    assert (found.images, expected.images) == (8, 16)
    torch.testing.assert_close(found.solve().maps[3], expected.solve().maps[3])


@pytest.mark.parametrize("assign", [False, True])
def test_maps_follow_weights_that_are_loaded_after_them(assign: bool) -> None:
    model, x = expedite(timm_vit(), clustered(1, (3, 3))), images(32, 40, batch=8)
    settings = calibrate(model, list(x.split(1)))
    assert settings.correction is not None
    other = expedite(timm_vit().to("meta"), settings)
    if not assign:
        other.to_empty(device="cpu")
    other.load_state_dict(model.state_dict(), assign=assign)
    with torch.no_grad():
        assert torch.equal(other(x), model(x))


def test_settings_know_weights_that_are_empty() -> None:
    model = transformers_dinov3(num_register_tokens=0)
    settings = calibrate(
        expedite(model, clustered(1, (3, 3))),
        [image[None] for image in images(32, 40, batch=8)],
        outputs=lambda out: out.last_hidden_state,
    )
    assert settings.correction is not None
    assert expedite(model, settings).reduction == settings


def test_regression_of_one_block_finds_what_it_does_to_the_detail() -> None:
    """A block that is linear in each token: B is its matrix, but for the ridge."""
    model = timm_vit(depth=1)
    torch.manual_seed(0)
    linear = nn.Linear(16, 16, bias=False)
    model.blocks[0].attn.forward = lambda x, **_: torch.zeros_like(x)
    model.blocks[0].norm2 = nn.Identity()
    model.blocks[0].mlp = linear
    expedite(model, clustered(0, (3, 3)))
    found = calibrate(model, [images(32, 32, batch=1) for _ in range(4)], temperature=False)
    assert found.correction is not None
    ((weights, _),) = found.correction.maps.values()
    error = (weights[0] - linear.weight).norm() / linear.weight.norm()
    assert error < 0.2
    (detail,) = maps_at(model, 0) or []
    torch.testing.assert_close(detail.weight, weights[0])


def test_no_map_where_none_helps() -> None:
    model = timm_vit()
    x = [image[None] for image in images(24, 24, batch=8)]
    for reduction in (clustered(1, (3, 3), "replace"), Reduction(Merge(1, 0.7, rounds=1))):
        expedite(model, reduction)
        assert calibrate(model, x, temperature=False) == reduction
    expedite(model, clustered(1, (3, 3)))
    with pytest.warns(UserWarning, match="need at least 4 images, got 3: none is fitted") as told:
        assert calibrate(model, x[:3], temperature=False).correction is None  # none is held out
    assert told[0].filename == __file__
    assert calibrate(model, x, correction=False).correction is None


def test_settings_of_other_weights_leave_the_model_as_it_was() -> None:
    model, other = timm_vit(), timm_vit(depth=3)
    x = [image[None] for image in images(32, 40, batch=8)]
    expedite(model, clustered(1, (3, 3)))
    settings = calibrate(model, x)
    assert settings.correction is not None
    before = clustered(1, (4, 4))
    expedite(other, before)
    with pytest.raises(ValueError, match="fitted to other weights"):
        expedite(other, settings)
    assert other.reduction == before

"""Detail maps: their arithmetic, how they are kept on an encoder, checked, and filed."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from settings_cases import clustered
from torch import Tensor, nn

from expedite_d2.reducers import Correction, Merge, Reduction, State, reconstruct, reduce
from expedite_d2.reducers.correction import attach_correction, fingerprint, maps_at


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correction(
    numbers: tuple[int, ...] = (3,), steps: int = 1, width: int = 4, seed: int = 0
) -> Correction:
    maps = {
        n: (tokens(steps, width, width, seed=seed), tokens(width, seed=seed + 1)) for n in numbers
    }
    return Correction(maps, torch.ones(2))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.reduction: Any = None


def held(of: Correction) -> Any:
    encoder = Encoder()
    attach_correction(encoder, of)
    return encoder


@pytest.mark.parametrize("window", [None, (4, 4)])
def test_map_of_a_clustering(window: Any) -> None:
    z, of = tokens(2, 8, 8, 4), correction()
    low, clustering = reduce(z, clustered(3, (2, 2)), window)
    y = low.sin()
    (detail,) = maps_at(held(of), 3) or []
    matrix, constant = of.maps[3]
    own = z - reconstruct(low, clustering._replace(tokens=None, centres=None))
    expected = reconstruct(y, clustering) + own @ matrix[0].T + constant
    torch.testing.assert_close(reconstruct(y, clustering, detail), expected, rtol=1e-4, atol=1e-4)


def test_maps_of_merges() -> None:
    z, of = tokens(2, 4, 6, 4), correction(steps=2)
    reduction = Reduction(Merge((0, 1), 0.75))
    x1, state = reduction.enter(z, State.of_image(4, 6), 0, None)
    before2 = x1.sin()
    s2, state = reduction.enter(before2, state, 1, None)
    y = s2.cos()
    weights, constant = of.maps[3]
    place1, place2 = (undo.places.long() for undo in state.steps)  # type: ignore[attr-defined]

    def at(values: Tensor, places: Tensor) -> Tensor:
        return torch.stack([image[place] for image, place in zip(values, places, strict=True)])

    u1 = before2 + at(y - s2, place2) + (before2 - at(s2, place2)) @ weights[1].T
    flat = z.flatten(1, 2)
    u0 = flat + at(u1 - x1, place1) + (flat - at(x1, place1)) @ weights[0].T + constant
    torch.testing.assert_close(state.reconstruct(y, maps_at(held(of), 3)), u0, rtol=1e-4, atol=1e-4)


def test_no_change_is_residual_and_minus_identity_is_replace() -> None:
    z = tokens(1, 8, 8, 4)
    low, clustering = reduce(z, clustered(3, (2, 2)))
    for scale, expected in (
        (0.0, reconstruct(low.sin(), clustering)),
        (-1.0, reconstruct(low.sin(), clustering._replace(tokens=None, centres=None))),
    ):
        of = Correction({3: (scale * torch.eye(4)[None], torch.zeros(4))}, torch.ones(2))
        (detail,) = maps_at(held(of), 3) or []
        torch.testing.assert_close(reconstruct(low.sin(), clustering, detail), expected)


def test_encoder_holds_the_maps_outside_of_its_state_dict() -> None:
    encoder, of = held(correction((2, 3))), correction((2, 3))
    assert list(encoder.state_dict()) == ["layer.weight", "layer.bias"]
    assert maps_at(encoder, 1) is None
    half = copy.deepcopy(encoder).to(torch.bfloat16)
    assert [d.weight.dtype for d in maps_at(half, 2) or []] == [torch.bfloat16]
    other = pickle.loads(pickle.dumps(encoder))
    assert torch.equal((maps_at(other, 3) or [])[0].weight, of.maps[3][0][0])
    attach_correction(encoder, correction((5,)))
    assert maps_at(encoder, 3) is None and maps_at(encoder, 5)
    attach_correction(encoder, None)
    assert not list(encoder.buffers()) and not encoder._load_state_dict_post_hooks


def test_corrections_compare_by_content() -> None:
    assert correction() == correction() and hash(correction()) == hash(correction())
    assert correction() != correction(seed=5) and correction() != correction((4,))
    settings = clustered(2, (2, 2))
    first, second = (Reduction(settings.steps, correction=correction()) for _ in range(2))
    assert first == second and hash(first) == hash(second) and first != settings


def test_other_weights_are_refused_at_once_and_when_they_are_loaded() -> None:
    torch.manual_seed(0)
    encoder, other = Encoder(), Encoder()
    of = Correction(correction().maps, fingerprint(encoder))  # type: ignore[arg-type]
    of.check(encoder)
    of.check(copy.deepcopy(encoder).half())
    of.check(Encoder().to("meta"))
    with pytest.raises(ValueError, match="fitted to other weights .* Encoder: calibrate again"):
        of.check(other)
    attach_correction(other, of)
    other.reduction = Reduction(clustered(2, (2, 2)).steps, correction=of)
    other.load_state_dict(encoder.state_dict())
    with pytest.raises(ValueError, match="calibrate again"):
        nn.Sequential(other).load_state_dict(nn.Sequential(Encoder()).state_dict())


@pytest.mark.parametrize(
    ("mode", "of", "message"),
    [
        ("replace", correction(), "correction must be None with reconstruction 'replace'"),
        ("residual", correction(steps=2), "a map of each step before block 3, of which there"),
        ("residual", correction((1,)), "before block 1, of which there are 0, got 1"),
        ("residual", 3, "correction must be a Correction, got 3"),
    ],
)
def test_reduction_refuses_a_correction_that_does_not_fit(mode: Any, of: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reduction(clustered(2, (2, 2)).steps, mode, of)


def test_places_and_widths_are_checked() -> None:
    correction().check_places({2: 4, 3: 4})
    with pytest.raises(ValueError, match="are reconstructed, 2, got one for block 3: calibrate"):
        correction().check_places({2: 4})
    with pytest.raises(ValueError, match="must have the 8 channels of block 3, got 4: calibrate"):
        correction().check_places({3: 8})


def test_file_keeps_the_tensors_beside_it(tmp_path: Path) -> None:
    settings = Reduction(clustered(2, (2, 2)).steps, correction=correction((2, 3)))
    path = tmp_path / "settings.yaml"
    settings.save(path)
    (tensors,) = tmp_path.glob("*.safetensors")
    assert tensors.name in path.read_text() and len(list(tmp_path.iterdir())) == 2
    assert tensors.stat().st_mode == path.stat().st_mode  # whoever reads the one reads the other
    assert Reduction.load(path) == settings
    with pytest.raises(ValueError, match="does not fit into a text"):
        settings.to_yaml()
    tensors.write_bytes(tensors.read_bytes()[:-8])
    with pytest.raises(ValueError, match=f"settings.yaml: correction {tensors.name} cannot be"):
        Reduction.load(path)
    tensors.unlink()
    with pytest.raises(FileNotFoundError, match="the correction of the settings, .* does not"):
        Reduction.load(path)


def test_other_tensors_are_no_correction() -> None:
    for named in (
        {},
        {"a": torch.ones(2)},
        correction().tensors() | {"block3.bias": torch.ones(9)},
    ):
        with pytest.raises(ValueError, match="these are no detail maps"):
            Correction.from_tensors(named)

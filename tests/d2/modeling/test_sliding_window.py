"""Crops of a large image: where they lie, and that their predictions are averaged exactly."""

from __future__ import annotations

import pytest
import torch

from expedite_d2.d2.config import load_config
from expedite_d2.d2.modeling.meta_arch.sliding_window import SlidingWindow, offsets

MINI = "scenes/panoptic/mask2former_swin_mini.yaml"


@pytest.mark.parametrize(
    ("length", "crop", "stride", "expected"),
    [
        (10, 4, 3, [0, 3, 6]),  # the last one ends with the image by itself
        (9, 4, 4, [0, 4, 5]),  # the last one is moved back
        (8, 4, 4, [0, 4]),
        (4, 4, 2, [0]),
        (3, 4, 2, [0]),  # smaller than the crop
        (1025, 768, 512, [0, 257]),
    ],
)
def test_offsets(length: int, crop: int, stride: int, expected: list[int]) -> None:
    assert offsets(length, crop, stride) == expected


@pytest.mark.parametrize("size", [(10, 7), (4, 9), (3, 9), (3, 2), (4, 4)])
def test_a_pointwise_model_gives_what_it_gives_at_once(size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size, dtype=torch.float64)
    window = SlidingWindow((4, 4), (3, 2))
    torch.testing.assert_close(window.predict(images, lambda x: 2 * x[:, :2]), 2 * images[:, :2])


def test_overlapping_crops_are_averaged() -> None:
    calls = iter([1.0, 4.0, 10.0])

    def model(crop: torch.Tensor) -> torch.Tensor:
        assert crop.shape == (1, 3, 2, 4)
        return torch.full((1, 1, 2, 4), next(calls))

    scores = SlidingWindow((4, 4), (4, 3)).predict(torch.zeros(1, 3, 2, 9), model)
    # Crops at columns 0, 3 and 5.
    expected = [1.0, 1.0, 1.0, 2.5, 4.0, 7.0, 7.0, 10.0, 10.0]
    assert scores[0, 0].tolist() == [expected, expected]


def test_every_crop_has_the_full_size() -> None:
    seen = []

    def model(crop: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(crop.shape[-2:]))
        return crop

    SlidingWindow((4, 6), (3, 6)).predict(torch.zeros(1, 3, 11, 13), model)
    assert seen == [(4, 6)] * 4 * 3


@pytest.mark.parametrize(
    ("crop", "stride"), [("[4]", "[4]"), ("[4, 4]", "[4, 5]"), ("[4, 0]", "[4, 0]")]
)
def test_bad_settings_are_named(crop: str, stride: str) -> None:
    key = "TEST.SLIDING_WINDOW."
    opts = [key + "ENABLED", "True", key + "CROP", crop, key + "STRIDE", stride]
    with pytest.raises(ValueError, match="TEST.SLIDING_WINDOW needs CROP and STRIDE"):
        SlidingWindow.from_config(load_config(MINI, opts))
    assert SlidingWindow.from_config(load_config(MINI, opts[2:])) is None

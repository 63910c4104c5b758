"""What the meta-architectures share: batches of normalised images, autocast at evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from expedite_d2.d2 import META_ARCH_REGISTRY
from expedite_d2.d2.config import load_config
from expedite_d2.d2.modeling import meta_arch
from expedite_d2.d2.modeling.meta_arch.image_model import ImageModel

TINY = Path(__file__).parent / "segmenter_tiny.yaml"


def build(*opts: object) -> ImageModel:
    model = ImageModel(load_config(TINY, opts))
    model.size_divisibility = 16
    return model


def test_every_meta_architecture_is_an_image_model() -> None:
    for name in meta_arch.__all__:
        assert issubclass(META_ARCH_REGISTRY.get(name), ImageModel)


def test_batch_is_normalised_and_padded() -> None:
    means, deviations = [10.0, 20.0, 30.0], [2.0, 4.0, 8.0]
    model = build("MODEL.PIXEL_MEAN", means, "MODEL.PIXEL_STD", deviations)
    low, wide = (torch.full((3, *size), 50, dtype=torch.uint8) for size in ((20, 17), (5, 33)))
    batch = model.preprocess([low, wide])
    assert batch.tensor.shape == (2, 3, 32, 48) and batch.image_sizes == [(20, 17), (5, 33)]
    assert batch.tensor[0, :, 0, 0].tolist() == [20.0, 7.5, 2.5]  # (50 - 10) / 2 ...
    assert batch.tensor[0, :, :20, :17].unique().numel() == 3
    assert batch.tensor[0, :, 20:].count_nonzero() == batch.tensor[1, :, 5:].count_nonzero() == 0
    assert model.preprocess([low, wide], size_divisibility=0).tensor.shape == (2, 3, 20, 33)


def test_pixel_statistics_are_no_part_of_the_state() -> None:
    model = build()
    assert not any("pixel" in name for name in model.state_dict())
    assert model.double().pixel_mean.dtype == torch.float64


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_evaluation_is_autocast_and_training_is_not(dtype: str) -> None:
    model = build("TEST.DTYPE", dtype)
    for training in (True, False):
        with model.train(training).eval_autocast():
            assert torch.is_autocast_enabled("cpu") == (not training and dtype == "bfloat16")
    with torch.autocast("cpu", torch.float16), build().eval().eval_autocast():
        assert torch.get_autocast_dtype("cpu") == torch.float16  # the caller's choice


def test_data_set_of_the_classes_is_the_first() -> None:
    both = ("DATASETS.TRAIN", "('train', 'more')", "DATASETS.TEST", "('test',)")
    assert build(*both).dataset_name == "train"
    assert build("DATASETS.TRAIN", "()", "DATASETS.TEST", "('test',)").dataset_name == "test"
    assert build("DATASETS.TRAIN", "()", "DATASETS.TEST", "()").dataset_name == ""

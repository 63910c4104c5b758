"""This project's own models through the verbs that take any model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from settings_cases import clustered
from torch import nn

from expedite_d2 import expedite, is_expedited, restore
from expedite_d2.d2 import build_model
from expedite_d2.d2.config import load_config
from expedite_d2.d2.modeling.backbone import ExpeditedSwinTransformer, ExpeditedViT
from expedite_d2.tools import calibrate, describe

HERE = Path(__file__).parent
FPN = ["MODEL.SEM_SEG_HEAD.COMMON_STRIDE", "4"]
# A config, and changes of it.
MODELS: dict[str, tuple[str, list[str]]] = {
    "mask2former": (
        "mask2former_tiny.yaml",
        ["MODEL.MASK_FORMER.TEST.PANOPTIC_ON", "False"],  # its data set is none
    ),
    "segmenter": ("segmenter_tiny.yaml", []),
    "segmenter, decoder on clusters": (
        "segmenter_tiny.yaml",
        ["MODEL.SEGMENTER.PLACEMENT", "paper"],
    ),
    "dpt": ("dpt_tiny.yaml", []),
    "htc": ("detector_tiny.yaml", ["MODEL.META_ARCHITECTURE", "ExpeditedHTC"]),
    "panoptic fpn": (
        "detector_tiny.yaml",
        ["MODEL.META_ARCHITECTURE", "ExpeditedPanopticFPN", *FPN],
    ),
}


def make(name: str) -> tuple[nn.Module, Any]:
    """A model in evaluation mode, and an input of it."""
    torch.manual_seed(0)
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    if name == "swin":
        swin = ExpeditedSwinTransformer(
            embed_dim=16, depths=(1, 1, 4, 1), num_heads=(1, 2, 4, 8), window_size=4
        )
        return swin.eval(), image[None].float()
    config, words = MODELS[name]
    off = ["MODEL.EXPEDITE.ENABLED", "False", "MODEL.DEVICE", "cpu"]
    model = build_model(load_config(HERE / config, [*words, *off])).eval()
    return model, [{"image": image, "height": 64, "width": 96}]


@pytest.mark.parametrize("name", ["swin", *MODELS])
def test_own_models_are_expedited_and_restored(name: str) -> None:
    model, x = make(name)
    (backbone,) = (
        m for m in model.modules() if isinstance(m, (ExpeditedSwinTransformer, ExpeditedViT))
    )
    swin = isinstance(backbone, ExpeditedSwinTransformer)
    window = backbone.window_size if swin else 0
    settings = clustered(1 if not swin else 2, (window // 2, window // 2) if swin else (0.5, 0.5))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    features = backbone(torch.rand(1, 3, 64, 96))
    assert not is_expedited(model)

    assert expedite(model, settings) is model and is_expedited(model)
    assert backbone.reduction == settings
    changed = backbone(torch.rand(1, 3, 64, 96))
    on_clusters = getattr(backbone, "keep_clusters", False)
    for output, feature in features.items():
        assert (changed[output].shape == feature.shape) is not on_clusters
    found = describe(model, (64, 96))
    assert found.reduction == settings and found.encoder == type(backbone).__name__
    assert found.reduced_multiply_adds < found.multiply_adds

    assert calibrate(model, [x]) == backbone.reduction
    assert backbone.reduction.cluster.temperature > 0
    assert restore(model) is model and not is_expedited(model) and backbone.reduction is None
    torch.manual_seed(1)
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        again, plain = backbone(images), make(name)[0]
        (other,) = (m for m in plain.modules() if type(m) is type(backbone))
        assert all(torch.equal(again[key], value) for key, value in other(images).items())
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

"""transformers' models for a task: what their heads read of a reduced encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from family_cases.case import images, randomised
from family_cases.plain import CONFIG, radio
from settings_cases import clustered
from torch import Tensor

from expedite_d2 import expedite, restore
from expedite_d2.reducers import Merge, Reduction

SETTINGS = [clustered(1, (3, 4)), Reduction(Merge((1, 2), 0.7)), Reduction(Merge(1, 0.8, rounds=2))]
settings = pytest.mark.parametrize("reduction", SETTINGS, ids=["cluster", "merge", "grouped"])
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 16,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "pad_token_id": 1,
}
WORDS = torch.tensor([[2, 5, 3], [2, 7, 3]])

Task = Callable[[Any, Tensor], tuple[Tensor, ...]]


def owl(name: str) -> Any:
    kind = getattr(transformers, f"{name}ForObjectDetection")
    config = kind.config_class(text_config=TEXT, vision_config=CONFIG, projection_dim=16)
    return randomised(kind, config)


def clipseg() -> Any:
    config = transformers.CLIPSegConfig(
        text_config=TEXT, vision_config=CONFIG, projection_dim=8, extract_layers=[0, 1, 2],
        reduce_dim=8, decoder_num_attention_heads=2, decoder_intermediate_size=16,
    )  # fmt: skip
    return randomised(transformers.CLIPSegForImageSegmentation, config)


def tipsv2(name: str) -> Any:
    backbone = transformers.Tipsv2VisionConfig(
        **CONFIG, mlp_ratio=2, out_indices=[1, 2, 3, 4], reshape_hidden_states=False
    )
    config = transformers.Tipsv2DptConfig(
        backbone_config=backbone, neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8
    )
    return randomised(getattr(transformers, f"Tipsv2DptFor{name}"), config)


def sapiens2(name: str) -> Any:
    head = {"upsample_out_channels": [8, 8], "conv_out_channels": [8], "conv_kernel_sizes": [1]}
    config = transformers.Sapiens2Config(**CONFIG, num_labels=3, head_config=head)
    return randomised(getattr(transformers, f"Sapiens2For{name}"), config)


def detect(model: Any, x: Tensor) -> tuple[Tensor, ...]:
    words = WORDS.repeat(len(x), 1)
    found = model(words, x, torch.ones_like(words), interpolate_pos_encoding=True)
    return found.logits, found.pred_boxes


def segment(model: Any, x: Tensor) -> tuple[Tensor, ...]:
    return (model(WORDS[: len(x)], x).logits,)


def head(name: str) -> Task:
    return lambda model, x: (getattr(model(x), name),)


TASKS: dict[str, tuple[Callable[[], Any], Task, tuple[int, int]]] = {
    "owl": (lambda: owl("OwlViT"), detect, (24, 24)),
    "owl 2": (lambda: owl("Owlv2"), detect, (24, 24)),
    "clipseg": (clipseg, segment, (24, 24)),
    "tipsv2 depth": (lambda: tipsv2("DepthEstimation"), head("predicted_depth"), (32, 40)),
    "tipsv2 segmentation": (lambda: tipsv2("SemanticSegmentation"), head("logits"), (32, 40)),
    "sapiens2 segmentation": (lambda: sapiens2("SemanticSegmentation"), head("logits"), (32, 24)),
    "sapiens2 pose": (lambda: sapiens2("PoseEstimation"), head("heatmaps"), (32, 24)),
    "sapiens2 normals": (lambda: sapiens2("NormalEstimation"), head("normals"), (32, 24)),
}


@pytest.mark.parametrize("name", TASKS)
@settings
def test_heads_read_full_maps(name: str, reduction: Reduction) -> None:
    make, task, size = TASKS[name]
    model, x = make(), images(*size, batch=2)
    with torch.no_grad():
        plain = task(model, x)
        expedite(model, reduction)
        found = task(model, x)
        restored = task(restore(model), x)
    for ours, theirs, again in zip(found, plain, restored, strict=True):
        assert ours.shape == theirs.shape and ours.isfinite().all()
        assert not torch.equal(ours, theirs) and torch.equal(again, theirs)


def test_radio_takes_no_packed_patches() -> None:
    model, sizes = radio(), torch.tensor([[4, 4], [6, 3]])
    patches = torch.randn(34, 48)
    with torch.no_grad():
        plain = model(patches, image_grid_hw=sizes).features
        expedite(model, alpha=1, clusters=(2, 2))
        with pytest.raises(ValueError, match="images of one size, got packed patches"):
            model(patches, image_grid_hw=sizes)
        assert torch.equal(restore(model)(patches, image_grid_hw=sizes).features, plain)

"""Public DPT checkpoints: the release and transformers name the same parameters of ours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DPTConfig, DPTForDepthEstimation

import expedite_d2.d2.modeling  # noqa: F401 (registers the architectures)
from expedite_d2.d2 import build_model
from expedite_d2.d2.checkpoint.dpt import DPT_FORMATS, from_release, from_transformers
from expedite_d2.d2.config import load_config

HYBRID = {
    "is_hybrid": True,
    "hidden_size": 768,
    "reassemble_factors": [1, 1, 1, 0.5],
    "neck_hidden_sizes": [256, 512, 768, 768],
}
LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "backbone_out_indices": [5, 11, 17, 23],
    "neck_hidden_sizes": [256, 512, 1024, 1024],
}
# What a ViT-L asks for beside the hybrid's config.
LARGE_OPTS = [
    "MODEL.VIT.NAME", "vit_large_patch16_384",
    "MODEL.VIT.OUT_BLOCKS", "[5, 11, 17, 23]",
    "MODEL.DPT.NECK_CHANNELS", "[256, 512, 1024, 1024]",
    "MODEL.DPT.REASSEMBLE_FACTORS", "[4, 2, 1, 0.5]",
]  # fmt: skip
VARIANTS = {"hybrid": (HYBRID, []), "large": (LARGE, LARGE_OPTS)}


def official(variant: str) -> dict[str, Tensor]:
    """The release's names with empty tensors; ``{0-11}`` in a line counts blocks."""
    state = {}
    for line in (Path(__file__).parent / f"dpt_{variant}.txt").read_text().splitlines():
        name, sides = line.split(" ")
        shape = [int(side) for side in sides.split("x")]
        blocks = re.search(r"\{(\d+)-(\d+)\}", name)
        span = range(int(blocks[1]), int(blocks[2]) + 1) if blocks else [None]
        for block in span:
            full = name if blocks is None else name.replace(blocks[0], str(block))
            state[full] = torch.empty(shape, device="meta")
    return state


def transformers_state(settings: dict) -> dict[str, Tensor]:
    with torch.device("meta"):
        return DPTForDepthEstimation(DPTConfig(**settings)).state_dict()


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_sources_name_the_same_parameters(variant: str) -> None:
    release = shapes(from_release(official(variant)))
    assert release == shapes(from_transformers(transformers_state(VARIANTS[variant][0])))
    assert len(release) == 366  # all of 368 but the classifier


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_is_left_over_and_nothing_missing(variant: str) -> None:
    cfg = load_config(
        "nyuv2/depth/dpt_vit_hybrid.yaml", ["MODEL.DEVICE", "meta", *VARIANTS[variant][1]]
    )
    with torch.device("meta"):
        own = shapes(build_model(cfg).state_dict())
    assert shapes(from_release(official(variant))) == own


def test_formats_are_told_apart() -> None:
    release, transformers = DPT_FORMATS
    names = official("hybrid")
    assert release.recognises(names) and not transformers.recognises(names)
    names = transformers_state(HYBRID)
    assert transformers.recognises(names) and not release.recognises(names)


def test_fused_projections_hold_query_key_value_in_order() -> None:
    prefix = "dpt.encoder.layer.3.attention.attention"
    parts = {f"{prefix}.{n}.bias": torch.full((2,), float(i)) for i, n in enumerate(
        ("query", "key", "value")
    )}  # fmt: skip
    translated = from_transformers(parts)
    assert translated["backbone.vit.blocks.3.attn.qkv.bias"].tolist() == [0, 0, 1, 1, 2, 2]
    assert len(translated) == 1

"""Checkpoints of DPT and Segmenter by MODEL.WEIGHTS: the release's names, and what may be wrong."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import expedite_d2.d2.modeling  # noqa: F401 - registers the models that the configs name
from expedite_d2.d2 import build_model
from expedite_d2.d2.checkpoint import load_weights
from expedite_d2.d2.checkpoint.names import from_mask2former
from expedite_d2.d2.config import load_config
from expedite_d2.d2.engine import build_trained_model

MODELS = Path(__file__).parents[1] / "modeling"
State = dict[str, Tensor]

# Ours -> the DPT release's; its stages count from 1, its fusion layers from the finest map on.
_DPT_NAMES: list[tuple[str, str | Callable[[re.Match], str]]] = [
    (r"^backbone\.vit\.", "pretrained.model."),
    (
        r"^neck\.reassemble_stage\.readout_projects\.(\d)\.0\.",
        lambda m: f"pretrained.act_postprocess{int(m[1]) + 1}.0.project.0.",
    ),
    (
        r"^neck\.reassemble_stage\.layers\.(\d)\.(projection|resize)\.",
        lambda m: f"pretrained.act_postprocess{int(m[1]) + 1}.{3 if m[2] == 'projection' else 4}.",
    ),
    (r"^neck\.convs\.(\d)\.", lambda m: f"scratch.layer{int(m[1]) + 1}_rn."),
    (
        r"^neck\.fusion_stage\.layers\.(\d)\.projection\.",
        lambda m: f"scratch.refinenet{4 - int(m[1])}.out_conv.",
    ),
    (
        r"^neck\.fusion_stage\.layers\.(\d)\.residual_layer(\d)\.convolution(\d)\.",
        lambda m: f"scratch.refinenet{4 - int(m[1])}.resConfUnit{m[2]}.conv{m[3]}.",
    ),
    (r"^head\.head\.", "scratch.output_conv."),
]


def dpt_release(state: State) -> State:
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in _DPT_NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def segmenter_release(state: State) -> State:
    return {name.replace("backbone.vit.", "encoder."): tensor for name, tensor in state.items()}


RELEASES = {"dpt": dpt_release, "segmenter": segmenter_release}


def build(family: str, *opts: str, weights: Path | str = "") -> Any:
    words = ["MODEL.WEIGHTS", str(weights), *opts]
    return build_trained_model(load_config(MODELS / f"{family}_tiny.yaml", words))


def random_like(model: Any) -> State:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(value.shape, generator=generator)
        for name, value in model.state_dict().items()
    }


@pytest.fixture(scope="module")
def states() -> Iterator[dict[str, State]]:
    """Random tensors under the releases' names."""
    yield {name: RELEASES[name](random_like(build(name))) for name in RELEASES}


@pytest.mark.parametrize("family", RELEASES)
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "in a checkpoint"])
def test_weights_in_the_releases_names_arrive(family: str, wrapped: bool, tmp_path: Path) -> None:
    expected = random_like(build(family))
    state = RELEASES[family](expected)
    assert not state.keys() & expected.keys() - {n for n in state if n.startswith("decoder.")}
    classifier = {"dpt": "pretrained.model.head.weight", "segmenter": "encoder.head.weight"}
    state[classifier[family]] = torch.ones(2, 2)
    path = tmp_path / "release.pth"
    torch.save({"model": state, "iteration": 3} if wrapped else state, path)
    expedite = {"ENABLED": "True", "ALPHA": "1", "CLUSTERS": "[2, 2]"}
    opts = [word for key, value in expedite.items() for word in (f"MODEL.EXPEDITE.{key}", value)]
    loaded = build(family, *opts, weights=path).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def without(state: State, *parts: str) -> State:
    return {name: v for name, v in state.items() if not any(part in name for part in parts)}


def narrower(state: State) -> State:
    return {name: v[..., :1] if v.dim() == 4 else v for name, v in state.items()}


@pytest.mark.parametrize(
    ("family", "opts", "source", "change", "message"),
    [
        ("segmenter", (), "dpt", None, "another model: 54 of the model's .*missing are decoder"),
        ("dpt", (), "segmenter", None, "another model: 54 of the model's .*missing are neck"),
        ("dpt", (), "dpt", lambda s: without(s, "scratch"), "another model: 0 of the model's"),
        (
            "dpt",
            (),
            "dpt",
            lambda s: without(s, "blocks.1.attn.qkv.weight"),
            "missing are backbone.vit.blocks.1.attn.qkv.weight, left over are none",
        ),
        ("dpt", (), "dpt", narrower, r"differ in shape: .*\(48, 3, 16, 1\), expected \(48, 3, 16"),
        ("dpt", ("MODEL.VIT.DEPTH", "5"), "dpt", None, "missing are backbone.vit.blocks.4.norm1"),
        ("dpt", ("MODEL.VIT.EMBED_DIM", "96"), "dpt", None, r"cls_token \(1, 1, 48\), expected"),
        (
            "dpt",
            ("MODEL.VIT.IMG_SIZE", "96"),
            "dpt",
            None,
            r"1 of them differ in shape: backbone.vit.pos_embed \(1, 17, 48\), expected \(1, 37",
        ),
        (
            "segmenter",
            ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3"),
            "segmenter",
            None,
            r"decoder.cls_emb \(1, 5, 24\), expected \(1, 3, 24\)",
        ),
        (
            "segmenter",
            ("MODEL.SEGMENTER.DECODER", "linear"),
            "segmenter",
            None,
            "missing are decoder.head.weight, decoder.head.bias",
        ),
        (
            "segmenter",
            (),
            "segmenter",
            lambda s: without(s, "cls_emb"),
            "missing are decoder.cls_emb, left over are none",
        ),
    ],
)
def test_checkpoints_of_another_model_change_nothing(
    family: str,
    opts: tuple[str, ...],
    source: str,
    change: Callable[[State], State] | None,
    message: str,
    states: dict[str, State],
    tmp_path: Path,
) -> None:
    path = tmp_path / "other.pth"
    torch.save(change(states[source]) if change else states[source], path)
    model = build_model(load_config(MODELS / f"{family}_tiny.yaml", opts))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(model, path)
    assert str(path) in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_truncated_checkpoint_is_named(share: float, states: dict, tmp_path: Path) -> None:
    path = tmp_path / "dpt.pth"
    torch.save(states["dpt"], path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="dpt.pth is not a readable checkpoint"):
        build("dpt", weights=path)


# --- projections that do not fit each other ---------------------------------------------------


@pytest.mark.parametrize("query", [torch.ones(5, 7), torch.ones(5), torch.tensor(1.0)])
def test_projections_of_different_widths_are_named(query: Tensor, tmp_path: Path) -> None:
    prefix = "dpt.encoder.layer.1.attention.attention."
    state = {f"{prefix}{part}.weight": torch.ones(48, 48) for part in ("key", "value")}
    state |= {f"{prefix}query.weight": query, "dpt.embeddings.x": query, "neck.x": query}
    torch.save(state, tmp_path / "dpt.pth")
    with pytest.raises(ValueError, match="backbone.vit.blocks.1.attn.qkv.weight must differ in"):
        build("dpt", weights=tmp_path / "dpt.pth")


@pytest.mark.parametrize("fused", [torch.ones(4, 2), torch.tensor(1.0)])
def test_a_fused_projection_that_is_not_three_is_named(fused: Tensor) -> None:
    name = "sem_seg_head.predictor.transformer_self_attention_layers.0.self_attn.in_proj_weight"
    with pytest.raises(ValueError, match="must hold three projections of as many rows each"):
        from_mask2former({name: fused})

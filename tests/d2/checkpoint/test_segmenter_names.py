"""Public Segmenter checkpoints into ExpeditedSegmenter, and what the release makes of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import expedite_d2.d2.modeling  # noqa: F401 (registers the architectures)
from expedite_d2.d2 import build_model
from expedite_d2.d2.checkpoint import load_weights
from expedite_d2.d2.checkpoint.segmenter import from_release
from expedite_d2.d2.config import load_config

TINY = Path(__file__).parents[1] / "modeling/segmenter_tiny.yaml"
# Of a block: ours and the release's, MMSegmentation's.
BLOCK = {
    "norm1": "ln1",
    "norm2": "ln2",
    "attn.proj": "attn.attn.out_proj",
    "mlp.fc1": "ffn.layers.0.0",
    "mlp.fc2": "ffn.layers.1",
}
OTHERS = {
    "backbone.vit.patch_embed.proj": "backbone.patch_embed.projection",
    "backbone.vit.norm": "backbone.ln1",
    "decoder.proj_dec": "decode_head.dec_proj",
    "decoder.head": "decode_head.conv_seg",
}


def build(*opts, seed=0):
    torch.manual_seed(seed)
    model = build_model(load_config(TINY, opts)).eval()
    for parameter in model.parameters():  # no weight may hide behind an initial zero or one
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def equal(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def official() -> dict[str, Tensor]:
    """The names of ViT-L with the mask decoder on ADE20K; ``{0-23}`` in a line counts blocks."""
    state = {}
    file = Path(__file__).parent / "segmenter_vit_large_mask_ade20k.txt"
    for line in file.read_text().splitlines():
        name, sides = line.split(" ")
        shape = [int(side) for side in sides.split("x")]
        blocks = re.search(r"\{(\d+)-(\d+)\}", name)
        span = range(int(blocks[1]), int(blocks[2]) + 1) if blocks else [None]
        for block in span:
            full = name if blocks is None else name.replace(blocks[0], str(block))
            state[full] = torch.empty(shape, device="meta")
    return state


def as_release(model) -> dict[str, Tensor]:
    """A model's weights as github.com/rstrudel/segmenter saves them."""
    state = {k.replace("backbone.vit.", "encoder."): v for k, v in model.state_dict().items()}
    return state | {"encoder.head.weight": torch.ones(1000, 24), "encoder.head.bias": torch.ones(1)}


def as_mmseg(model, own_decoder: bool) -> dict[str, Tensor]:
    """The same under MMSegmentation's names, the decoder also under those that the release has."""
    state = {}
    for name, tensor in model.state_dict().items():
        stem, dot, leaf = name.rpartition(".")
        if name.startswith("decoder.") and not own_decoder:
            state[name.replace("decoder.", "decode_head.")] = tensor
        elif match := re.match(r"(backbone\.vit|decoder)\.blocks\.(\d+)\.(.*)$", stem):
            owner = "backbone" if match[1] == "backbone.vit" else "decode_head"
            prefix = f"{owner}.layers.{match[2]}."
            if match[3] == "attn.qkv":
                state[f"{prefix}attn.attn.in_proj_{leaf}"] = tensor
            else:
                state[f"{prefix}{BLOCK[match[3]]}.{leaf}"] = tensor
        elif name in ("decoder.proj_patch", "decoder.proj_classes"):
            state[f"decode_head.{leaf.removeprefix('proj_')}_proj.weight"] = tensor.T
        elif stem in OTHERS:
            one_by_one = stem == "decoder.head" and leaf == "weight"
            state[f"{OTHERS[stem]}.{leaf}"] = tensor[..., None, None] if one_by_one else tensor
        else:
            renamed = name.replace("backbone.vit.", "backbone.")
            state[renamed.replace("decoder.", "decode_head.", 1)] = tensor
    state["auxiliary_head.conv_seg.weight"] = torch.ones(5, 24, 1, 1)
    return state


def test_every_official_name_and_shape_has_its_place():
    cfg = load_config("ade20k/semantic/segmenter_vit_large.yaml", ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        own = {name: tuple(t.shape) for name, t in build_model(cfg).state_dict().items()}
    translated = {name: tuple(t.shape) for name, t in from_release(official()).items()}
    assert translated == own


@pytest.mark.parametrize("decoder", ["mask", "linear"])
@pytest.mark.parametrize("kind", ["release", "mmseg", "mmseg with the release's decoder"])
def test_weights_arrive_whole(tmp_path, decoder, kind):
    opts = ("MODEL.SEGMENTER.DECODER", decoder)
    model, other = build(*opts), build(*opts, seed=1)
    assert not equal(model, other)
    path = tmp_path / "checkpoint.pth"
    if kind == "release":
        torch.save({"model": as_release(model), "n_cls": 5}, path)
    else:
        state = as_mmseg(model, own_decoder=kind == "mmseg")
        if decoder == "mask":
            state["decode_head.conv_seg.weight"] = torch.ones(5, 24, 1, 1)  # idle there
        torch.save({"state_dict": state, "meta": {"epoch": 1}}, path)
    load_weights(other, path)
    assert equal(model, other)


def test_a_checkpoint_of_the_other_decoder_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": as_release(build("MODEL.SEGMENTER.DECODER", "linear"))}, path)
    with pytest.raises(ValueError, match="checkpoint of another model"):
        load_weights(build(), path)


def block(x: Tensor, state: dict[str, Tensor], prefix: str, heads: int, eps: float) -> Tensor:
    """A pre-norm transformer block, from its weights."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{prefix}.{name}.weight"], state[f"{prefix}.{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias = state[f"{prefix}.{name}.weight"], state[f"{prefix}.{name}.bias"]
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)

    query, key, value = (
        part.unflatten(-1, (heads, -1)).transpose(1, 2)
        for part in linear(norm(x, "norm1"), "attn.qkv").chunk(3, dim=-1)
    )
    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    x = x + linear((scores.softmax(-1) @ value).transpose(1, 2).flatten(2), "attn.proj")
    return x + linear(F.gelu(linear(norm(x, "norm2"), "mlp.fc1")), "mlp.fc2")


def release_logits(images: Tensor, state: dict[str, Tensor], encoder_eps: float) -> Tensor:
    """What the release's mask Segmenter computes from its weights, at its training size."""
    x = F.conv2d(images, state["encoder.patch_embed.proj.weight"], stride=4)
    rows, columns = x.shape[-2:]
    x = x.flatten(2).transpose(1, 2) + state["encoder.patch_embed.proj.bias"]
    x = torch.cat([state["encoder.cls_token"].expand(len(x), -1, -1), x], 1)
    x = x + state["encoder.pos_embed"]
    for number in range(4):
        x = block(x, state, f"encoder.blocks.{number}", heads=2, eps=encoder_eps)
    weight, bias = state["encoder.norm.weight"], state["encoder.norm.bias"]
    x = F.layer_norm(x, (24,), weight, bias, encoder_eps)[:, 1:]
    x = F.linear(x, state["decoder.proj_dec.weight"], state["decoder.proj_dec.bias"])
    x = torch.cat([x, state["decoder.cls_emb"].expand(len(x), -1, -1)], 1)
    for number in range(2):
        x = block(x, state, f"decoder.blocks.{number}", heads=4, eps=1e-5)
    weight, bias = state["decoder.decoder_norm.weight"], state["decoder.decoder_norm.bias"]
    x = F.layer_norm(x, (24,), weight, bias)
    patches, classes = x[:, :-5] @ state["decoder.proj_patch"], x[:, -5:]
    classes = classes @ state["decoder.proj_classes"]
    patches, classes = (t / t.norm(dim=-1, keepdim=True) for t in (patches, classes))
    weight, bias = state["decoder.mask_norm.weight"], state["decoder.mask_norm.bias"]
    masks = F.layer_norm(patches @ classes.transpose(1, 2), (5,), weight, bias)
    masks = masks.transpose(1, 2).unflatten(2, (rows, columns))
    return F.interpolate(masks, size=images.shape[-2:], mode="bilinear")


@pytest.mark.parametrize(
    ("epsilon", "other"),
    [(1e-5, 1e-6), (1e-6, 1e-5)],
    ids=["the release", "MMSegmentation and arXiv 2210.01035"],
)
def test_logits_are_those_of_each_source(epsilon, other):
    """Their encoders differ in the LayerNorms' epsilon alone; the decoders' is 1e-5 everywhere."""
    model = build("MODEL.VIT.NORM_EPS", epsilon)
    # Small weights, as in a training's beginning, let the epsilon count.
    model.backbone.vit.patch_embed.proj.weight.data *= 0.1
    model.backbone.vit.pos_embed.data *= 0.1
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model.logits(images)
        expected = release_logits(images, as_release(model), epsilon)
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
        wrong = release_logits(images, as_release(model), other)
        assert (logits - wrong).abs().max() > 6e-5

"""The pixel decoder with ms_deform_attn against transformers' own."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoder,
    Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention,
)

import expedite_d2.d2.modeling  # noqa: F401 (registers the architectures)
from expedite_d2.d2 import build_model
from expedite_d2.d2.comparison import cost
from expedite_d2.d2.config import load_config
from expedite_d2.d2.modeling.meta_arch.pixel_decoder import DeformableAttention

TINY = Path(__file__).parent / "mask2former_tiny.yaml"


def attentions(model):
    modules = list(model.modules())
    kind = Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention
    return [module for module in modules if isinstance(module, kind)]


def build():
    torch.manual_seed(0)
    model = build_model(load_config(TINY)).eval()
    for module in attentions(model):  # at first all queries sample the same offsets
        torch.nn.init.normal_(module.sampling_offsets.weight, std=0.1)
        torch.nn.init.normal_(module.attention_weights.weight, std=0.1)
    return model


def as_in_transformers(model):
    """The same weights under transformers' own modules."""
    model = copy.deepcopy(model)
    for module in attentions(model):
        module.__class__ = Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention
    return model


class Operators(TorchDispatchMode):
    """Counts calls by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
def test_logits_equal_transformers(size):
    model = build()
    images = torch.randn(2, 3, *size)
    with torch.no_grad(), Operators() as operators:
        found = model.logits(images)
    with torch.no_grad():
        expected = as_in_transformers(model).logits(images)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert operators.calls.count("expedite_d2.ms_deform_attn.default") == len(attentions(model))
    assert not any("grid_sampler" in call for call in operators.calls)


def test_gradients_equal_transformers():
    model = build()
    features = [torch.randn(1, 24 * 2**i, 32 // 2**i, 24 // 2**i) for i in range(4)]
    grads = []
    for decoder in (model.pixel_decoder, as_in_transformers(model).pixel_decoder):
        decoder(features).mask_features.square().mean().backward()
        grads.append({name: p.grad for name, p in decoder.named_parameters()})
    for name, grad in grads[1].items():
        torch.testing.assert_close(grads[0][name], grad, rtol=1e-3, atol=1e-6, msg=name)


class Sampled(TorchFunctionMode):
    """Keeps the arguments of each sampling of the maps."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.expedite_d2.ms_deform_attn.default:
            self.calls.append(args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_multiply_but_do_not_place_samples(dtype):
    model = build()
    features = [torch.randn(1, 24 * 2**i, 64 // 2**i, 48 // 2**i) for i in range(4)]
    with torch.no_grad():
        with Sampled() as exact:
            expected = model.pixel_decoder(features)
        with Sampled() as sampled, torch.autocast("cpu", getattr(torch, dtype)):
            found = model.pixel_decoder(features)
    assert len(sampled.calls) == len(exact.calls) == len(attentions(model))
    for value, _, _, locations, weights in sampled.calls:
        assert value.dtype == getattr(torch, dtype)
        assert locations.dtype == weights.dtype == torch.float32
    # Maps in 16 bits have moved the first layer's samples by less than locations in 16 bits would.
    places = exact.calls[0][3]
    moved, rounded = sampled.calls[0][3] - places, places.to(getattr(torch, dtype)) - places
    assert moved.abs().max() < rounded.abs().max()
    error = (found.mask_features - expected.mask_features).norm() / expected.mask_features.norm()
    assert 0 < error < 0.02


def test_names_and_multiply_adds_are_those_of_transformers():
    model = build()
    theirs = as_in_transformers(model)
    fresh = Mask2FormerPixelDecoder(model.pixel_decoder.config, [24, 48, 96, 192])
    assert list(model.pixel_decoder.state_dict()) == list(fresh.state_dict())
    assert cost.count_gflops(model, 64, 96) == cost.count_gflops(theirs, 64, 96)


def test_decoder_copies_and_pickles():
    model = build()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.pixel_decoder))):
        assert all(type(module) is DeformableAttention for module in attentions(again))


def test_padding_is_masked():
    attention = attentions(build())[0]
    queries, points = torch.randn(1, 6, 64), torch.rand(1, 6, 3, 2)
    mask = torch.arange(12)[None] > 7
    shapes = [(2, 2), (2, 2), (1, 4)]
    rest = {"reference_points": points, "spatial_shapes_list": shapes}
    plain = as_in_transformers(attention)
    maps = torch.randn(1, 12, 64)
    with torch.no_grad():
        for module in (attention, plain):
            module.double()
        args = (queries.double(), mask, maps.double())
        rest["reference_points"] = points.double()
        for a, b in zip(attention(*args, **rest), plain(*args, **rest), strict=True):
            torch.testing.assert_close(a, b)

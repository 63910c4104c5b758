"""Layers that take 16-bit products in float32, on a CPU said to be slow in them."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from expedite_d2.d2.modeling import upcast
from expedite_d2.d2.modeling.backbone import ExpeditedSwinTransformer
from expedite_d2.d2.modeling.upcast import (
    UpcastConv2d,
    UpcastLinear,
    _slow_dtypes,
    upcast_layers,
    upcast_product,
)

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def slow(monkeypatch):
    """A CPU without 16-bit products; the dtypes of the products that were taken."""
    monkeypatch.setattr(upcast, "_SLOW", tuple(HALVES))
    taken = []
    for name in ("linear", "conv2d"):
        original = getattr(nn.functional, name)

        def spy(x, *args, original=original, **kwargs):
            taken.append(x.dtype)
            return original(x, *args, **kwargs)

        monkeypatch.setattr(nn.functional, name, spy)
    return taken


def layers():
    torch.manual_seed(0)
    return [
        (UpcastLinear(24, 16), torch.randn(2, 5, 24)),
        (UpcastLinear(24, 16, bias=False), torch.randn(3, 24)),
        (UpcastConv2d(6, 8, 3, padding=1, padding_mode="reflect"), torch.randn(2, 6, 9, 7)),
        (UpcastConv2d(6, 8, 2, stride=2, bias=False), torch.randn(1, 6, 8, 8)),
    ]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("autocast", [False, True])
def test_products_are_float32_and_outputs_are_not(slow, dtype, autocast):
    for layer, x in layers():
        if not autocast:
            layer, x = layer.to(dtype), x.to(dtype)
        expected = layer.double()(x.double())
        layer = layer.to(torch.float32 if autocast else dtype)
        slow.clear()
        with torch.autocast("cpu", dtype) if autocast else contextlib.nullcontext():
            got = layer(x)
        assert got.dtype == dtype
        assert slow == [torch.float32]
        # One rounding, of the result.
        torch.testing.assert_close(got, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_types_are_left_alone(slow, dtype):
    for layer, x in layers():
        layer, x = layer.to(dtype), x.to(dtype)
        plain = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d
        assert torch.equal(layer(x), plain.forward(layer, x))
    assert set(slow) == {dtype}


def test_autocast_does_not_touch_float64(slow):
    layer, x = layers()[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.double()(x.double()).dtype == torch.float64
    assert slow == [torch.float64]


def test_layers_of_fast_cpus_are_pytorchs_own(monkeypatch):
    monkeypatch.setattr(upcast, "_SLOW", ())
    model = nn.Sequential(nn.Linear(3, 4), nn.Conv2d(4, 4, 1))
    upcast_layers(model)
    assert [type(module) for module in model] == [nn.Linear, nn.Conv2d]


@pytest.mark.parametrize("dtypes", [(), HALVES], ids=["fast", "slow"])
def test_backbones_multiply_in_float32_only_on_slow_cpus(monkeypatch, dtypes):
    monkeypatch.setattr(upcast, "_SLOW", tuple(dtypes))
    swin = ExpeditedSwinTransformer(embed_dim=8, depths=(1,), num_heads=(1,), out_features=["res2"])
    assert ("UpcastLinear" in repr(swin)) == ("UpcastConv2d" in repr(swin)) == bool(dtypes)


def test_fast_cpus_multiply_in_16_bits(slow, monkeypatch):
    monkeypatch.setattr(upcast, "_SLOW", ())
    layer, x = layers()[0]
    layer.bfloat16()(x.bfloat16())
    assert slow == [torch.bfloat16]


@pytest.mark.parametrize("dtype", HALVES)
def test_gradients(slow, dtype):
    x, weight, bias = torch.randn(4, 6), torch.randn(5, 6), torch.randn(5)
    halves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
    doubles = [t.detach().double().requires_grad_() for t in halves]
    upcast_product(nn.functional.linear, *halves).sum().backward()
    nn.functional.linear(*doubles).sum().backward()
    for half, double in zip(halves, doubles, strict=True):
        assert half.grad.dtype == dtype
        torch.testing.assert_close(half.grad, double.grad.to(dtype), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_without_breaks(monkeypatch, autocast):
    monkeypatch.setattr(upcast, "_SLOW", tuple(HALVES))
    torch.compiler.reset()
    model = nn.Sequential(nn.Conv2d(3, 8, 2, stride=2), nn.Flatten(2), nn.Linear(16, 4))
    upcast_layers(model)
    x = torch.randn(2, 3, 8, 8)
    if not autocast:
        model, x = model.bfloat16(), x.bfloat16()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(compiled(x), model(x))


def test_pytorchs_own_layers_change_class_and_nothing_else(slow):
    class Custom(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(3, 4), Custom(4, 4), nn.Conv2d(4, 4, 1), nn.Conv1d(4, 4, 1))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    called = []
    model[0].register_forward_hook(lambda *args: called.append(args))
    upcast_layers(model)
    upcast_layers(model)
    assert [type(module) for module in model] == [UpcastLinear, Custom, UpcastConv2d, nn.Conv1d]
    model[0](torch.randn(2, 3))
    assert len(called) == 1
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


@pytest.mark.parametrize(
    "capabilities, expected",
    [
        ({}, ()),
        ({"architecture": "aarch64"}, ()),
        ({"architecture": "x86_64", "avx2": True}, (torch.bfloat16, torch.float16)),
        ({"architecture": "x86_64", "avx512_bf16": True}, (torch.float16,)),
        ({"architecture": "x86_64", "amx_bf16": True, "avx512_fp16": True}, ()),
    ],
)
def test_slow_dtypes_of_a_cpu(capabilities, expected):
    assert _slow_dtypes(capabilities) == expected

"""Multi-scale deformable attention: values and gradients."""

from __future__ import annotations

import pytest
import torch
from deform_cases import (
    BACKWARD,
    CASES,
    KERNEL,
    Case,
    double,
    each_case,
    gradients,
    make_args,
    strided,
)
from op_cases import assert_kernel, each_dtype
from torch import Tensor

from expedite_d2.ops import ms_deform_attn
from expedite_d2.ops.reference import ms_deform_attn_backward_ref, ms_deform_attn_ref


def close(out: Tensor, exact: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    """Equal to the exact value, but for rounding to `dtype` and float32 sums in another order."""
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(out.double(), exact, rtol=rounding, atol=1e-5 * scale)


def output_weight(case: Case, device: str) -> Tensor:
    count = case.batch * case.queries * case.heads * case.channels
    weight = torch.linspace(-1, 1, count, dtype=torch.float64, device=device).cos()
    return weight.view(case.batch, case.queries, -1)


# --- values -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ms_deform_attn", "_ms_deform_attn_backward"])
def test_dispatcher_holds_the_kernel(name, device):
    assert_kernel(name, device)


@pytest.mark.parametrize("run", [ms_deform_attn_ref, KERNEL])
def test_ms_deform_attn_literals(run, device):
    # A 2 x 2 map and one of a single pixel; two heads of one channel.
    value = torch.tensor([[1.0, 10], [2, 20], [4, 40], [8, 80], [100, 1000]], device=device)
    locations = torch.tensor([
        [[[0.5, 0.5], [0.25, 0.25]], [[0.5, 0.5], [0.0, 0.5]]],  # head 0: level 0, level 1
        [[[0.75, 0.25], [0.5, 0.75]], [[2.0, 0.5], [0.25, 0.5]]],
    ], device=device)  # fmt: skip
    weights = torch.tensor([[[1.0, 2], [3, 4]], [[1, 1], [1, 1]]], device=device)
    out = run(
        value[None, :, :, None], [2, 2, 1, 1], [0, 4], locations[None, None], weights[None, None]
    )
    # Head 0: the mean, twice the first pixel, three times the single pixel, four halves of it.
    # Head 1: the top right pixel, the mean of the lower row, nothing, three quarters.
    assert out.tolist() == [[[3.75 + 2 + 300 + 200, 20 + 60 + 0 + 750]]]


@each_case
@each_dtype
@pytest.mark.parametrize("layout", ["dense", "strided"])
def test_ms_deform_attn_kernel_equals_reference(case, dtype, layout, device):
    assert_kernel("ms_deform_attn", device)
    args = make_args(case, device, dtype)
    if layout == "strided":
        args = strided(args)
    out = KERNEL(*args)
    assert out.is_contiguous() and out.dtype == dtype
    close(out, ms_deform_attn_ref(*double(args)), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ms_deform_attn_of_half_locations_and_weights(dtype, device):
    args = tuple(
        a.to(dtype) if isinstance(a, Tensor) else a for a in make_args(CASES["odd"], device)
    )
    out = KERNEL(*args)
    close(out, ms_deform_attn_ref(*double(args)), dtype)
    assert {a.dtype for a in gradients(KERNEL, args, output_weight(CASES["odd"], device))} == {
        dtype
    }


def test_ms_deform_attn_of_large_maps(device):
    case = Case(1, 300, 2, 32, ((32, 32), (64, 64), (128, 128)))
    args = make_args(case, device)
    close(KERNEL(*args), ms_deform_attn_ref(*double(args)), torch.float32)
    assert torch.equal(ms_deform_attn(args[0], case.shapes, None, *args[3:]), KERNEL(*args))


def test_ms_deform_attn_of_one_pixel_each_is_a_lookup(device):
    """At the centres of pixels there is nothing to blend."""
    case = Case(1, 12, 1, 8, ((3, 4),), 1)
    value, shapes, starts, locations, weights = make_args(case, device)
    y, x = torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")
    centres = torch.stack([(x + 0.5) / 4, (y + 0.5) / 3], -1).view(locations.shape).to(device)
    out = KERNEL(value, shapes, starts, centres, torch.ones_like(weights))
    torch.testing.assert_close(out, value.flatten(2))


@pytest.mark.parametrize("far", [1.0001, 2.5, 1e9, 3e38, float("inf")])
def test_ms_deform_attn_is_zero_outside(far, device):
    case = CASES["mask2former"]
    value, shapes, starts, locations, weights = make_args(case, device)
    half_a_pixel = 0.5 / 4
    for place in (far + half_a_pixel, -far - half_a_pixel):
        for axis in (0, 1):
            outside = locations.clone()
            outside[..., axis] = place
            for run in (KERNEL, ms_deform_attn_ref):
                args = (value, shapes, starts, outside, weights)
                assert run(*args).count_nonzero() == 0
                assert all(g.count_nonzero() == 0 for g in gradients(run, args, run(*args) + 1))


@pytest.mark.parametrize("spoiled", ["locations", "weights"])
def test_ms_deform_attn_nan_stays_with_its_query_and_head(spoiled, device):
    case = CASES["mask2former"]
    value, shapes, starts, locations, weights = make_args(case, device)
    clean = KERNEL(value, shapes, starts, locations, weights)
    if spoiled == "locations":
        locations[1, 3, 2, 1, 0, 1] = torch.nan
    else:
        weights[1, 3, 2, 1, 0] = torch.nan
    for run in (KERNEL, ms_deform_attn_ref):
        out = run(value, shapes, starts, locations, weights).unflatten(-1, (case.heads, -1))
        assert out[1, 3, 2].isnan().all()
        out[1, 3, 2] = clean.unflatten(-1, (case.heads, -1))[1, 3, 2]
        torch.testing.assert_close(out.flatten(2), clean)
    grads = BACKWARD(torch.ones_like(clean), value, shapes, starts, locations, weights)
    expected = BACKWARD(torch.ones_like(clean), *make_args(case, device))
    for found, other in zip(grads[1:], expected[1:], strict=True):
        found[1, 3, 2], other[1, 3, 2] = 0, 0
        torch.testing.assert_close(found, other)


def test_ms_deform_attn_nan_in_value_stays_with_its_pixel(device):
    case = CASES["mask2former"]
    args = make_args(case, device)
    args[0][1, 20, 3, 5] = torch.nan  # level 1
    out, expected = KERNEL(*args), ms_deform_attn_ref(*args)
    assert 0 < expected.isnan().sum() < expected.numel() / 100
    torch.testing.assert_close(out, expected, equal_nan=True)


def test_ms_deform_attn_levels_in_any_order_with_gaps(device):
    case = Case(2, 9, 2, 5, ((3, 4), (6, 2)), 3)
    value, shapes, _, locations, weights = make_args(case, device)
    spaced = torch.full((2, 40, 2, 5), torch.nan, device=device)
    spaced[:, 20:32], spaced[:, 3:15] = value[:, :12], value[:, 12:]
    out = ms_deform_attn(spaced, case.shapes, [20, 3], locations, weights)
    plain = ms_deform_attn(value, case.shapes, None, locations, weights)
    torch.testing.assert_close(out, plain)
    grad = BACKWARD(torch.ones_like(out), spaced, shapes, [20, 3], locations, weights)[0]
    expected = BACKWARD(torch.ones_like(out), value, shapes, [0, 12], locations, weights)[0]
    torch.testing.assert_close(torch.cat([grad[:, 20:32], grad[:, 3:15]], 1), expected)
    assert grad[:, :3].count_nonzero() + grad[:, 15:20].count_nonzero() == 0


def test_ms_deform_attn_takes_sizes_as_tensors(device):
    case = CASES["odd"]
    value, _, starts, locations, weights = make_args(case, device)
    tensors = torch.tensor(case.shapes), torch.tensor(starts)
    out = ms_deform_attn(value, *tensors, locations, weights)
    assert torch.equal(out, ms_deform_attn(value, case.shapes, starts, locations, weights))


def test_ms_deform_attn_empty_batch(device):
    args = make_args(CASES["odd"]._replace(batch=0), device)
    for run in (KERNEL, ms_deform_attn_ref):
        assert run(*args).shape == (0, 7, 27)
    for run in (BACKWARD, ms_deform_attn_backward_ref):
        grads = run(torch.zeros(0, 7, 27, device=device), *args)
        assert [g.shape for g in grads] == [args[i].shape for i in (0, 3, 4)]


# --- gradients --------------------------------------------------------------------------------


def test_ms_deform_attn_gradcheck(device):
    case = Case(2, 3, 2, 3, ((3, 4), (2, 2)), 2)
    value, _, _, locations, weights = double(make_args(case, device))
    inputs = [x.requires_grad_() for x in (value, locations, weights)]

    def run(value, locations, weights):
        return ms_deform_attn(value, case.shapes, None, locations, weights)

    assert torch.autograd.gradcheck(run, inputs)


@each_case
@each_dtype
def test_ms_deform_attn_gradient_is_the_references(case, dtype, device):
    assert_kernel("_ms_deform_attn_backward", device)
    args = make_args(case, device, dtype)
    weight = output_weight(case, device).to(dtype).double()
    exact = gradients(ms_deform_attn_ref, double(args), weight)
    found = gradients(KERNEL, args, weight)
    formula = ms_deform_attn_backward_ref(weight, *double(args))
    for name, a, b, c in zip(("value", "locations", "weights"), found, exact, formula, strict=True):
        torch.testing.assert_close(c, b)
        # Along a location the gradient jumps between pixels, so the exact place matters.
        scale = max(1.0, b.abs().max().item())
        close(a, b, dtype if name == "value" else torch.float32, 4 * scale)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@each_dtype
def test_ms_deform_attn_pixels_outside_add_no_slope(bad, dtype, device):
    """Not even 0 times the gradient of the output."""
    value = torch.ones(1, 12, 1, 8, dtype=dtype, device=device)  # 3 x 4 pixels
    beside = [[-0.3, 0.5], [1.3, 0.5], [0.5, -0.3], [0.5, 1.3]]
    across = [[0.05, 0.45], [0.95, 0.45], [0.45, 0.05], [0.45, 0.95]]
    locations = torch.tensor([beside, across], device=device).view(1, 2, 1, 1, 4, 2)
    grad = torch.full((1, 2, 8), bad, dtype=dtype, device=device)
    weights = torch.ones(1, 2, 1, 1, 4, device=device)
    found = BACKWARD(grad, value, [3, 4], [0], locations, weights)[1].cpu().view(2, 4, 2)
    assert found[0].count_nonzero() == 0
    slopes = torch.stack([found[1, :2, 0], found[1, 2:, 1]])  # across the rim
    expected = torch.tensor([bad, -bad]).expand(2, 2)
    torch.testing.assert_close(slopes, expected, equal_nan=True)


@pytest.mark.parametrize("run", [BACKWARD, ms_deform_attn_backward_ref])
def test_ms_deform_attn_nan_location_has_nan_gradients(run, device):
    case = CASES["odd"]
    value, shapes, starts, locations, weights = make_args(case, device)
    locations[1, 2, 0, 1, 1, 0] = torch.nan
    grad = torch.ones(case.batch, case.queries, case.heads * case.channels, device=device)
    found = run(grad, value, shapes, starts, locations, weights)
    spoilt = locations.isnan().any(-1)
    assert torch.equal(found[1].isnan(), spoilt[..., None].expand_as(locations))
    assert torch.equal(found[2].isnan(), spoilt)


@pytest.mark.parametrize("needed", [0, 3, 4])
def test_ms_deform_attn_gradient_of_one_input(needed, device):
    args = list(make_args(CASES["odd"], device))
    args[needed].requires_grad_()
    KERNEL(*args).sum().backward()
    assert args[needed].grad.shape == args[needed].shape
    assert all(a.grad is None for i, a in enumerate(args) if i in (0, 3, 4) and i != needed)


@pytest.mark.cuda
def test_ms_deform_attn_backward_says_that_it_is_not_deterministic():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    args = make_args(CASES["odd"], "cuda")
    out = KERNEL(*args)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="ms_deform_attn_backward_cuda"):
            BACKWARD(out, *args)
        KERNEL(*args)
    finally:
        torch.use_deterministic_algorithms(False)

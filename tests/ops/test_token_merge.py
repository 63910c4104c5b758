from __future__ import annotations

import math

import pytest
import torch
from merge_checks import assert_merged, mean_weights
from op_cases import CASES, assert_kernel, each_case, each_dtype, make_sample, tolerance

from expedite_d2.ops import token_merge, token_pool
from expedite_d2.ops.reference import token_merge_ref

KERNEL = torch.ops.expedite_d2.token_merge.default
each_run = pytest.mark.parametrize("run", [token_merge_ref, KERNEL], ids=["reference", "kernel"])

# Tokens 0 and 2 point as tokens 3 and 1 do; token 4 is as far from token 1 as from token 5.
POINTS = [[1, 0], [0, 2], [0, 1], [3, 0], [-1, 0], [0, -1]]
SIZES = [1, 1, 2, 3, 1, 1]
# tokens, sizes, merged, new tokens, new sizes, places
LITERALS = {
    "none": (
        POINTS, SIZES, 0,
        [[1, 0], [0, 1], [-1, 0], [0, 2], [3, 0], [0, -1]], [1, 2, 1, 1, 3, 1], [0, 3, 1, 4, 2, 5],
    ),
    "equal_scores": (
        POINTS, SIZES, 1,
        [[0, 1], [-1, 0], [0, 2], [2.5, 0], [0, -1]], [2, 1, 1, 4, 1], [3, 2, 0, 3, 1, 4],
    ),
    "two_pairs": (
        POINTS, SIZES, 2,
        [[-1, 0], [0, 4 / 3], [2.5, 0], [0, -1]], [1, 3, 4, 1], [2, 1, 1, 2, 0, 3],
    ),
    "equal_partners": (
        POINTS, SIZES, 3, [[-0.25, 1], [2.5, 0], [0, -1]], [4, 4, 1], [1, 0, 0, 1, 0, 2],
    ),
    "odd_number": (
        [[1, 0], [1, 1], [0, 1]], [1, 1, 1], 1, [[0, 1], [1, 0.5]], [1, 2], [1, 1, 0],
    ),
    "zeros": ([[0, 0], [1, 0], [1, 0]], [1, 1, 1], 1, [[0, 0], [1, 0]], [1, 2], [0, 1, 1]),
    "one_token": ([[3, 4]], [5], 0, [[3, 4]], [5], [0]),
    "two_tokens": ([[3, 4], [-1, 0]], [1, 3], 1, [[0, 1]], [4], [0, 0]),
}  # fmt: skip


def batch_of(values, device: str) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float32, device=device)


@each_run
@pytest.mark.parametrize("literal", LITERALS.values(), ids=LITERALS.keys())
def test_token_merge_literals(literal, run, device):
    tokens, sizes, merged, *expected = literal
    out, out_sizes, places = run(batch_of(tokens, device), batch_of(sizes, device), merged)
    torch.testing.assert_close(out, batch_of(expected[0], device))
    assert (out_sizes.dtype, places.dtype) == (torch.float32, torch.int32)
    assert (out_sizes.tolist(), places.tolist()) == ([expected[1]], [expected[2]])


@each_run
def test_token_merge_sums_from_the_odd_token_on(run, device):
    # All cosines are 1. 2**24 + 1 is 2**24 in float32, and so is 2**24 + 1 + 1 from the left.
    tokens = batch_of([[1], [2**24], [1], [7]], device)
    out, sizes, _ = run(tokens, torch.ones(1, 4, device=device), 2)
    assert sizes.tolist() == [[3, 1]]
    assert out.flatten().tolist() == [5592405.5, 7]


@each_case
@each_dtype
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
def test_token_merge_kernel_equals_reference(case, dtype, strided, device):
    assert_kernel("token_merge", device)
    tokens, sizes, _ = make_sample(case, device, dtype, strided).merge_args()
    count = tokens.shape[1]
    for merged in sorted({0, min(1, count // 2), count // 3, count // 2}):
        out = KERNEL(tokens, sizes, merged)
        assert_merged(tokens, sizes, merged, out)
        # What has the same places is the same.
        exact = token_merge_ref(tokens.double(), sizes, merged)
        same = (exact[2] == out[2]).all(1)
        assert torch.equal(out[1][same], exact[1][same])
        limits = tolerance(dtype)
        torch.testing.assert_close(out[0][same].double(), exact[0][same], **limits)


def test_token_merge_reference_is_right():
    for name in ("windows", "ragged_odd", "image", "one_channel"):
        args = make_sample(CASES[name]).merge_args()
        assert_merged(*args, token_merge_ref(*args))


def test_token_merge_of_equal_tokens_takes_the_first(device):
    tokens = torch.linspace(-1, 2, 33, device=device).expand(2, 301, 33)
    sizes = torch.ones(2, 301, device=device)
    for merged in (1, 70, 150):
        out = KERNEL(tokens, sizes, merged)
        staying = 151 - merged
        assert (out[2][:, : 2 * merged : 2] == staying).all()
        places = torch.arange(staying, device=device)
        assert (out[2][:, 2 * merged :: 2] == places).all()
        torch.testing.assert_close(out[0], tokens[:, : 301 - merged])


def test_token_merge_empty_batch(device):
    out = token_merge(torch.zeros(0, 9, 3, device=device), torch.zeros(0, 9, device=device), 4)
    assert (out.tokens.shape, out.sizes.shape, out.places.shape) == ((0, 5, 3), (0, 5), (0, 9))
    assert (out.sizes.dtype, out.places.dtype) == (torch.float32, torch.int32)


def test_token_merge_of_many_images_and_tokens(device):
    tokens = torch.rand(65537, 2, 2, device=device)
    out = token_merge(tokens, torch.ones(65537, 2, device=device), 1)
    torch.testing.assert_close(out.tokens, tokens.mean(1, keepdim=True))
    tokens = torch.randn(1, 5003, 3, device=device)
    sizes = torch.ones(1, 5003, device=device)
    assert_merged(tokens, sizes, 1700, token_merge(tokens, sizes, 1700))


def test_token_merge_of_strided_sizes(device):
    tokens, sizes, merged = make_sample(CASES["ragged"], device).merge_args()
    expected = token_merge(tokens, sizes, merged)
    for strided in (sizes.t().contiguous().t(), torch.stack([sizes, -sizes], 2)[:, :, 0]):
        for a, b in zip(token_merge(tokens, strided, merged), expected, strict=True):
            assert torch.equal(a, b)


# The square of the last one is not finite.
BAD = [math.nan, math.inf, -math.inf, 1e30]


@each_run
@pytest.mark.parametrize("bad", BAD)
def test_token_merge_of_bad_tokens(bad, run, device):
    tokens, sizes, _ = make_sample(CASES["image_odd"], device).merge_args()  # 187 tokens

    def replaced(value: float, *at: int) -> torch.Tensor:
        x = tokens.clone()
        x[0, list(at)] = value
        return x

    # One that is even stays while any other can merge; no token takes an odd one for its partner.
    # All the rest is as if there were zeros, which have nothing in common with such tokens.
    for at, merged in ((40, 60), (40, 93), (41, 60), (41, 93)):
        out, new_sizes, places = run(replaced(bad, at), sizes, merged)
        expected = run(replaced(0.0, at), sizes, merged)
        assert torch.equal(new_sizes, expected[1]) and torch.equal(places, expected[2])
        assert (places[0] == places[0, at]).sum() == 1
        rest = torch.arange(out.shape[1], device=device) != places[0, at]
        assert torch.equal(out[:, rest], expected[0][:, rest])
        assert torch.equal(out[0, ~rest][0].nan_to_num(), replaced(bad, at)[0, at].nan_to_num())

    # Without a better one the first of the odd tokens is everybody's partner.
    _, _, places = run(replaced(bad, *range(1, 187, 2)), sizes, 93)
    assert places[0, ::2].tolist() == [1] * 93 + [0]


@each_run
def test_token_merge_of_a_bad_token_that_must(run, device):
    tokens = batch_of([[math.nan, 1], [1, 0], [0, 1], [0, 2]], device)
    out, sizes, places = run(tokens, torch.ones(1, 4, device=device), 2)
    assert places.tolist() == [[0, 0, 1, 1]] and sizes.tolist() == [[2, 2]]
    assert out[0, 0].tolist()[1] == 0.5 and out[0, 0, 0].isnan()
    assert out[0, 1].tolist() == [0, 1.5]


class Quarter(torch.nn.Module):
    """Merges a share of the tokens, and averages what merged without its sizes."""

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sizes = tokens.new_ones(tokens.shape[:2])
        merged = token_merge(tokens, sizes, tokens.shape[1] // 4)
        return *merged, token_pool(tokens, merged.places, merged.tokens.shape[1])


def test_token_merge_and_pool_export_for_any_number_of_tokens(device):
    tokens = torch.randn(2, 77, 8, device=device)
    exported = torch.export.export(
        Quarter(),
        (torch.randn(2, 40, 8, device=device),),
        dynamic_shapes={"tokens": {1: torch.export.Dim("n", min=8, max=1000)}},
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    for a, b in zip(exported.module()(tokens), Quarter()(tokens), strict=True):
        assert torch.equal(a, b)


def test_token_merge_and_pool_compile_for_any_number_of_tokens(device):
    compiled = torch.compile(Quarter(), fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (40, 77):
        tokens = torch.randn(2, count, 8, device=device)
        for a, b in zip(compiled(tokens), Quarter()(tokens), strict=True):
            assert torch.equal(a, b)


def test_token_merge_gradcheck(device):
    for name in ("ragged", "one_token"):
        tokens, sizes, merged = make_sample(CASES[name], device).merge_args()
        tokens = tokens[:, :40, :2].double().requires_grad_()
        sizes, merged = sizes[:, :40], min(merged, 15)
        assert torch.autograd.gradcheck(
            lambda x, *rest: token_merge(x, *rest)[0], (tokens, sizes, merged)
        )


@each_case
@each_dtype
def test_token_merge_gradient_is_that_of_the_means(case, dtype, device):
    tokens, sizes, merged = make_sample(case, device, dtype).merge_args()
    tokens, sizes = tokens.clone().requires_grad_(), sizes.clone().requires_grad_()
    out, new_sizes, places = KERNEL(tokens, sizes, merged)
    assert not new_sizes.requires_grad and not places.requires_grad
    grad = torch.linspace(-1, 1, out.numel(), device=device).view(out.shape).to(dtype)
    out.backward(grad)
    assert sizes.grad is None
    weights = mean_weights(sizes.detach(), places, out.shape[1])
    weights /= weights.sum(2, keepdim=True)
    exact = weights.transpose(1, 2) @ grad.double()
    torch.testing.assert_close(tokens.grad.double(), exact, **tolerance(dtype))

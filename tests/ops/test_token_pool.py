from __future__ import annotations

import math

import pytest
import torch
from op_cases import assert_kernel, double, each_case, each_dtype, make_sample, tolerance

from expedite_d2.ops import token_pool
from expedite_d2.ops.reference import token_pool_ref

KERNEL = torch.ops.expedite_d2.token_pool.default
each_run = pytest.mark.parametrize("run", [token_pool_ref, KERNEL], ids=["reference", "kernel"])


def arguments(tokens, groups, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, N, 1) and (B, N)"""
    values = torch.tensor(tokens, dtype=torch.float32, device=device)[..., None]
    return values, torch.tensor(groups, dtype=torch.int32, device=device)


@each_run
def test_token_pool_literals(run, device):
    tokens, groups = [[1, 2, 4, 8, 16], [3, 5, 7, 9, 10]], [[0, 2, 0, 2, 2], [1, 1, 1, 1, 0]]
    out = run(*arguments(tokens, groups, device), 3)
    torch.testing.assert_close(out[..., 0].cpu(), torch.tensor([[2.5, 0, 26 / 3], [10, 6, 0]]))
    # Groups that there are not: the highest and lowest numbers, too.
    groups = [[0, -1, 2, 2, 3], [2**31 - 1, -(2**31), 1, 1, 1]]
    out = run(*arguments(tokens, groups, device), 3)
    torch.testing.assert_close(out[..., 0].cpu(), torch.tensor([[1, 0, 6], [0, 26 / 3, 0]]))


@each_run
def test_token_pool_sums_in_the_order_of_tokens(run, device):
    # 2**24 + 1 is 2**24 in float32.
    tokens = [[2**24, 1, 1, 0], [1, 1, 2**24, 0]]
    out = run(*arguments(tokens, [[1] * 4] * 2, device), 2)
    assert out[..., 0].tolist() == [[0, 2**22], [0, 2**22 + 0.5]]


@each_case
@each_dtype
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
def test_token_pool_kernel_equals_reference(case, dtype, strided, device):
    assert_kernel("token_pool", device)
    tokens, groups, count = make_sample(case, device, dtype, strided).pool_args()
    everyone = torch.zeros_like(groups)
    # Also as many groups as tokens, and one that holds them all.
    for settings in ((groups, count), (groups, tokens.shape[1]), (everyone, 1)):
        out = KERNEL(tokens, *settings)
        assert out.is_contiguous()
        expected = token_pool_ref(tokens.double(), *settings)
        torch.testing.assert_close(out.double(), expected, **tolerance(dtype))


def test_token_pool_of_one_token_each_changes_nothing(device):
    tokens = torch.randn(3, 50, 20, device=device)
    order = torch.stack([torch.randperm(50) for _ in range(3)]).to(device)
    out = token_pool(tokens, order.int(), 50)
    assert torch.equal(out.gather(1, order[..., None].expand(-1, -1, 20)), tokens)


def test_token_pool_empty_batch(device):
    groups = torch.zeros(0, 9, dtype=torch.int32, device=device)
    assert token_pool(torch.zeros(0, 9, 3, device=device), groups, 4).shape == (0, 4, 3)


@each_run
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_token_pool_of_a_bad_token(bad, run, device):
    out = run(*arguments([[1, bad, 3, 5]], [[0, 1, 1, 2]], device), 3)
    assert out.isfinite().flatten().tolist() == [True, False, True]
    # One of no group spoils nothing.
    out = run(*arguments([[1, bad, 3, 5]], [[0, 3, 1, 2]], device), 3)
    assert out.flatten().tolist() == [1, 3, 5]


def test_token_pool_of_many_images_and_tokens(device):
    tokens = torch.rand(65537, 2, 2, device=device)
    out = token_pool(tokens, torch.zeros(65537, 2, dtype=torch.int32, device=device), 2)
    torch.testing.assert_close(out[:, 0], tokens.mean(1))
    assert (out[:, 1] == 0).all()
    tokens = torch.randn(1, 70000, 2, device=device)
    groups = (torch.arange(70000, device=device) % 999).int()[None]
    expected = token_pool_ref(tokens.double(), groups, 1000)
    out = token_pool(tokens, groups, 1000)
    torch.testing.assert_close(out.double(), expected, **tolerance(torch.float32))


def test_token_pool_of_strided_groups(device):
    tokens = torch.randn(4, 30, 7, device=device)
    groups = (torch.arange(120, device=device) % 11).view(4, 30).int()
    expected = token_pool(tokens, groups, 9)
    for strided in (groups.t().contiguous().t(), torch.stack([groups, groups + 1], 2)[..., 0]):
        assert torch.equal(token_pool(tokens, strided, 9), expected)


def test_token_pool_gradcheck(device):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 11, 2, generator=generator, dtype=torch.float64).to(device)
    groups = torch.randint(-1, 5, (2, 11), generator=generator, dtype=torch.int32).to(device)
    tokens.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: token_pool(x, groups, 4), (tokens,))


@each_case
@each_dtype
def test_token_pool_gradient_is_the_references(case, dtype, device):
    args = make_sample(case, device, dtype).pool_args()

    def gradient(run, args):
        tokens = args[0].clone().requires_grad_()
        out = run(tokens, *args[1:])
        weight = torch.linspace(-1, 1, out.numel(), device=device).view(out.shape)
        (out * weight.to(out.dtype)).sum().backward()
        return tokens.grad

    # The incoming gradient has been rounded to `dtype`, too.
    rtol, atol = 2 * tolerance(dtype)["rtol"], 1e-4 if dtype == torch.float32 else 1e-2
    exact = gradient(token_pool_ref, double(args)).to(dtype)
    torch.testing.assert_close(gradient(KERNEL, args), exact, rtol=rtol, atol=atol)

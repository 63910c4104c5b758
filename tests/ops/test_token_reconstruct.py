from __future__ import annotations

import pytest
import torch
from op_cases import CASES, assert_kernel, double, each_case, each_dtype, make_sample, tolerance

from expedite_d2.ops import token_reconstruct
from expedite_d2.ops.reference import token_reconstruct_ref


def row(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, 1, -1, 1)


INDICES = torch.tensor([[0, 1], [1, 1], [2, 0]], dtype=torch.int32).view(1, 1, 3, 2)
WEIGHTS = torch.tensor([[0.25, 0.75], [1, 0], [0.5, 0.5]]).view(1, 1, 3, 2)


def test_token_reconstruct_literals(device):
    refined, centres, tokens = row(4, 8, -2), row(1, 2, 4), row(10, 20, 30)
    for run in (token_reconstruct_ref, torch.ops.expedite_d2.token_reconstruct.default):
        indices, weights, y = INDICES.to(device), WEIGHTS.to(device), refined.to(device)
        replaced = run(y, indices, weights, None, None)
        assert replaced.flatten().tolist() == [7, 8, 1]
        # The refinement added 3, 6, -6.
        kept = run(y, indices, weights, tokens.to(device), centres.to(device))
        assert kept.flatten().tolist() == [15.25, 26, 28.5]


def test_token_reconstruct_unrefined_centres_change_nothing(device):
    sample = make_sample(CASES["ragged"], device)
    out = token_reconstruct(
        sample.centres, sample.indices, sample.weights, tokens=sample.tokens, centres=sample.centres
    )
    assert torch.equal(out, sample.tokens)


@each_case
@each_dtype
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("mode", ["residual", "replace"])
def test_token_reconstruct_kernel_equals_reference(case, dtype, strided, mode, device):
    assert_kernel("token_reconstruct", device)
    args = make_sample(case, device, dtype, strided).reconstruct_args()
    if mode == "replace":
        args = (*args[:3], None, None)
    out = torch.ops.expedite_d2.token_reconstruct(*args)
    assert out.is_contiguous()
    expected = token_reconstruct_ref(*double(args))
    torch.testing.assert_close(out.double(), expected, **tolerance(dtype))


def test_token_reconstruct_empty_batch(device):
    indices = torch.zeros(0, 4, 5, 2, dtype=torch.int32, device=device)
    out = token_reconstruct(torch.zeros(0, 2, 3, 7, device=device), indices, indices.float())
    assert out.shape == (0, 4, 5, 7)


def test_token_reconstruct_nan_stays_with_its_tokens(device):
    refined = row(4, torch.nan, -2).to(device)
    indices = torch.tensor([[0], [1], [2]], dtype=torch.int32, device=device).view(1, 1, 3, 1)
    weights = torch.ones(1, 1, 3, 1, device=device)
    for run in (token_reconstruct_ref, torch.ops.expedite_d2.token_reconstruct.default):
        out = run(refined, indices, weights, None, None)
        assert out.isnan().flatten().tolist() == [False, True, False]


def test_token_reconstruct_rejects_indices_out_of_range():
    # On the CPU looking costs nothing; on a GPU it would need a synchronisation.
    assert_kernel("token_reconstruct", "cpu")
    for bad in (-1, 3):
        indices = INDICES.clone()
        indices[0, 0, 1, 1] = bad
        with pytest.raises(IndexError, match=f"token_reconstruct: expected indices .* got {bad}"):
            torch.ops.expedite_d2.token_reconstruct(row(4, 8, -2), indices, WEIGHTS, None, None)


def test_token_reconstruct_of_many_tokens(device):
    refined = torch.rand(65537, 1, 1, 2, device=device)
    indices = torch.zeros(65537, 1, 2, 1, dtype=torch.int32, device=device)
    out = token_reconstruct(refined, indices, torch.ones(indices.shape, device=device))
    assert torch.equal(out, refined.expand(-1, 1, 2, -1))


def test_token_reconstruct_gradient_has_the_same_bits_with_any_number_of_threads():
    grad, threads = torch.randn(1, 64, 64, 64), torch.get_num_threads()
    indices = (torch.arange(64 * 64 * 4) % 9).view(1, 64, 64, 4).int()
    args = (grad, indices, torch.rand(indices.shape), (3, 3))
    backward = torch.ops.expedite_d2._token_reconstruct_backward
    try:
        found = []
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            found.append(backward(*args))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, found[0]) for x in found[1:])


@pytest.mark.parametrize("mode", ["residual", "replace"])
def test_token_reconstruct_gradcheck(mode, device):
    sample = make_sample(CASES["ragged"], device)
    refined, _, _, tokens, centres = (
        a.double()[:1, :, :, :2].requires_grad_() if a.is_floating_point() else a
        for a in sample.reconstruct_args()
    )
    indices, weights = sample.indices[:1], sample.weights[:1]
    if mode == "replace":
        inputs = (refined,)
        assert torch.autograd.gradcheck(lambda y: token_reconstruct(y, indices, weights), inputs)
        return

    def run(y, z, s):
        return token_reconstruct(y, indices, weights, tokens=z, centres=s)

    assert torch.autograd.gradcheck(run, (refined, tokens, centres))


@each_case
@each_dtype
def test_token_reconstruct_gradient_is_the_references(case, dtype, device):
    args = make_sample(case, device, dtype).reconstruct_args()
    weight = torch.linspace(-1, 1, args[3].numel(), device=device).view(args[3].shape)

    def gradients(run, args):
        leaves = [a.clone().requires_grad_() if a.is_floating_point() else a for a in args]
        (run(*leaves) * weight.to(leaves[0].dtype)).sum().backward()
        assert leaves[2].grad is None
        return [leaves[i].grad for i in (0, 3, 4)]

    exact = gradients(token_reconstruct_ref, double(args))
    found = gradients(torch.ops.expedite_d2.token_reconstruct, args)
    for a, b in zip(found, exact, strict=True):
        # The incoming gradient has been rounded to `dtype`, too.
        rtol, atol = 2 * tolerance(dtype)["rtol"], 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(a, b.to(dtype), rtol=rtol, atol=atol)

from __future__ import annotations

import pytest
import torch
from op_cases import (
    CASES,
    Case,
    assert_kernel,
    double,
    each_case,
    each_dtype,
    make_sample,
    make_tokens,
)

from expedite_d2.ops import token_spread
from expedite_d2.ops.reference import token_spread_ref

TINY = torch.finfo(torch.float32).tiny


def row(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, 1, -1, 1)


LITERALS = [
    # Cells {0, 2} and {4, 8} average to 1 and 6: distances 1, 1, 4, 4.
    (row(0, 2, 4, 8), (1, 2), None, 3, 2.5),
    # The same cells as windows of their own.
    (row(0, 2, 4, 8), (1, 1), (1, 2), 5, 2.5),
    # A ragged last window: {9} alone is its own centre.
    (row(0, 2, 4, 8, 9), (1, 1), (1, 2), 5, 2.0),
    # Centres 1 and 6, but the token 4 may only look at its home cell, and 5 would be nearer to 6.
    (row(0, 2, 5, 7), (1, 2), None, 1, 1.0),
    # Every token is its own centre: a millionth of the variance, 1.
    (row(0, 2), (1, 2), None, 5, 1e-6),
    (row(3, 3, 3, 3), (1, 2), None, 5, TINY),
]


@pytest.mark.parametrize("tokens, clusters, window, neighbourhood, expected", LITERALS)
def test_token_spread_literals(tokens, clusters, window, neighbourhood, expected, device):
    tokens = tokens.to(device)
    for run in (token_spread_ref, torch.ops.expedite_d2.token_spread.default):
        out = run(tokens, clusters, window, neighbourhood)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out.cpu(), torch.tensor([expected]), rtol=1e-6, atol=0)


@each_case
@each_dtype
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
def test_token_spread_kernel_equals_reference(case, dtype, strided, device):
    assert_kernel("token_spread", device)
    args = make_sample(case, device, dtype, strided).spread_args()
    out = torch.ops.expedite_d2.token_spread(*args)
    torch.testing.assert_close(out, token_spread_ref(*double(args)), rtol=2e-5, atol=0)


@each_case
def test_token_spread_reference_float32_equals_float64(case):
    args = make_sample(case).spread_args()
    torch.testing.assert_close(
        token_spread_ref(*args), token_spread_ref(*double(args)), rtol=1e-4, atol=1e-6
    )


def test_token_spread_with_large_offset(device):
    assert_kernel("token_spread", device)
    case = CASES["windows"]
    tokens = make_tokens(case, offset=1000.0).to(device)
    out = torch.ops.expedite_d2.token_spread(tokens, case.clusters, case.window, 5)
    expected = token_spread_ref(tokens.double(), case.clusters, case.window, 5)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=0)


def test_token_spread_empty_batch(device):
    out = token_spread(torch.zeros(0, 4, 4, 3, device=device), (2, 2))
    assert out.shape == (0,) and out.dtype == torch.float32


@pytest.mark.parametrize("run", ["kernel", "reference"])
def test_token_spread_nan_stays_in_its_image(run, device):
    case = CASES["windows"]
    tokens = make_tokens(case).to(device)
    tokens[1, 3, 4, 0] = torch.nan
    function = token_spread_ref if run == "reference" else torch.ops.expedite_d2.token_spread
    out = function(tokens, case.clusters, case.window, 5)
    assert out.isnan().tolist() == [False, True]


def test_token_spread_of_many_windows(device):
    # More windows, and more images, than one dimension of a CUDA grid may have.
    for shape in ((1, 257, 257, 1), (65537, 1, 2, 1)):
        tokens = torch.zeros(shape, device=device)
        tokens[:, :, 1::2] = 2.0
        out = token_spread(tokens, (1, 1), window=(1, 1))
        variance = tokens[0].var(correction=0)
        torch.testing.assert_close(out, (1e-6 * variance).expand(shape[0]), rtol=1e-4, atol=0)


def test_token_spread_does_not_require_grad(device):
    tokens = make_tokens(Case((1, 8, 8, 4), (2, 2), None)).to(device).requires_grad_()
    assert not token_spread(tokens, (2, 2)).requires_grad
    assert not token_spread(tokens.double(), (2, 2)).requires_grad


def test_token_spread_kernel_of_one_token_in_a_huge_window(device):
    """More cells than 32 bits can count, of which one exists."""
    assert_kernel("token_spread", device)
    tokens = torch.ones(1, 1, 1, 8, device=device)
    kernel = torch.ops.expedite_d2.token_spread
    out = kernel(tokens, (46341, 46341), (23168, 23168), 46343)
    assert torch.equal(out, kernel(tokens, (1, 1), None, 1))

"""What operators say of bad arguments: the operator's name, the argument's, what it should be."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from op_cases import NAMES, assert_kernel

from expedite_d2 import ops


def on(device: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def _bad_inputs() -> list:
    """(operator, argument that must be named, what replaces it, error)."""

    def maps(op: str, name: str) -> list:
        return [
            (op, name, lambda d: on(d, 2, 6, 3), ValueError),
            (op, name, lambda d: on(d, 2, 0, 6, 3), ValueError),
            (op, name, lambda d: on(d, 2, 6, 6, 0), ValueError),
            (op, name, lambda d: on(d, 2, 6, 6, 3, dtype=torch.int64), TypeError),
            (op, name, lambda d: [[1.0]], TypeError),
        ]

    rows = []
    for op in ("token_spread", "token_cluster", "token_match", "token_reduce"):
        rows += maps(op, "tokens")
        for value in ((2,), (2, 2, 2), (0, 2), (2.0, 2), 4, "22"):
            rows.append((op, "clusters", value, ValueError))
        for value in ((3,), (0, 3), (3, -1), (1.5, 3), 3):
            rows.append((op, "window", value, ValueError))
        rows.append((op, "clusters", (2**16, 2**31), ValueError))
        rows.append((op, "tokens", lambda d: on(d, 1).expand(1, 2**16, 2**16, 1), ValueError))
    for op in ("token_spread", "token_cluster", "token_reduce"):
        for value in (4, 0, -1, 2.5, True, np.float64(3.0), np.bool_(True)):
            rows.append((op, "neighbourhood", value, ValueError))
    for op in ("token_cluster", "token_match", "token_reduce"):
        for value in (0.0, -1.0, float("nan"), float("inf")):
            rows.append((op, "temperature", value, ValueError))
        for value in ("hot", True, torch.ones(())):
            rows.append((op, "temperature", value, TypeError))
    for op in ("token_cluster", "token_match"):
        rows.append((op, "spread", lambda d: on(d, 3), ValueError))
        rows.append((op, "spread", lambda d: on(d, 2, 1), ValueError))
        rows.append((op, "spread", lambda d: on(d, 2, dtype=torch.float16), TypeError))
        rows.append((op, "spread", 1.0, TypeError))
    rows += [
        ("token_cluster", "iterations", -1, ValueError),
        ("token_cluster", "iterations", 1.5, ValueError),
        ("token_match", "topk", 0, ValueError),
        ("token_reduce", "iterations", -1, ValueError),
        ("token_reduce", "topk", 0, ValueError),
        ("token_match", "centres", lambda d: on(d, 2, 4, 5, 3), ValueError),
        ("token_match", "centres", lambda d: on(d, 2, 4, 4, 2), ValueError),
        ("token_match", "centres", lambda d: on(d, 2, 4, 4, 3, dtype=torch.float16), TypeError),
        ("token_match", "centres", None, TypeError),
        *maps("token_reconstruct", "refined"),
        ("token_reconstruct", "indices", lambda d: on(d, 2, 6, 6, 2), TypeError),
        ("token_reconstruct", "indices", lambda d: on(d, 1, 6, 6, 2).int(), ValueError),
        ("token_reconstruct", "indices", lambda d: on(d, 2, 36, 2).int(), ValueError),
        ("token_reconstruct", "weights", lambda d: on(d, 2, 6, 6, 3), ValueError),
        ("token_reconstruct", "weights", lambda d: on(d, 2, 6, 6, 2).half(), TypeError),
        ("token_reconstruct", "tokens", lambda d: on(d, 2, 6, 5, 3), ValueError),
        ("token_reconstruct", "tokens", lambda d: on(d, 2, 6, 6, 3).half(), TypeError),
        ("token_reconstruct", "tokens", None, ValueError),
        ("token_reconstruct", "centres", lambda d: on(d, 2, 4, 5, 3), ValueError),
        ("token_reconstruct", "centres", None, ValueError),
    ]
    for op in ("token_merge", "token_pool"):
        rows += [
            (op, "tokens", lambda d: on(d, 2, 6, 6, 3), ValueError),
            (op, "tokens", lambda d: on(d, 2, 0, 3), ValueError),
            (op, "tokens", lambda d: on(d, 2, 36, 0), ValueError),
            (op, "tokens", lambda d: on(d, 2, 36, 3, dtype=torch.int64), TypeError),
            (op, "tokens", [[1.0]], TypeError),
        ]
    for value in (-1, 19, 2.0, True, "2", None):
        rows.append(("token_merge", "merged", value, ValueError))
    for value in (0, -1, 2.0, True, None):
        rows.append(("token_pool", "count", value, ValueError))
    rows += [
        ("token_merge", "sizes", lambda d: on(d, 2, 35), ValueError),
        ("token_merge", "sizes", lambda d: on(d, 36), ValueError),
        ("token_merge", "sizes", lambda d: on(d, 2, 36).half(), TypeError),
        ("token_merge", "sizes", None, TypeError),
        ("token_pool", "groups", lambda d: on(d, 1, 36).int(), ValueError),
        ("token_pool", "groups", lambda d: on(d, 2, 6, 6).int(), ValueError),
        ("token_pool", "groups", lambda d: on(d, 2, 36).long(), TypeError),
        ("token_pool", "groups", None, TypeError),
    ]
    return rows


def good_arguments(op: str, device: str) -> dict:
    """Windows of 3 x 3 tokens with 2 x 2 cells: a map of 4 x 4; or the same tokens in a row."""
    in_a_row = op in ("token_merge", "token_pool")
    arguments = {
        "tokens": on(device, 2, 36, 3) if in_a_row else on(device, 2, 6, 6, 3),
        "clusters": (2, 2),
        "window": (3, 3),
        "neighbourhood": 5,
        "iterations": 1,
        "temperature": 1.0,
        "spread": on(device, 2) + 1,
        "centres": on(device, 2, 4, 4, 3),
        "topk": 2,
        "refined": on(device, 2, 4, 4, 3),
        "indices": on(device, 2, 6, 6, 2).int(),
        "weights": on(device, 2, 6, 6, 2),
        "sizes": on(device, 2, 36) + 1,
        "merged": 3,
        "groups": on(device, 2, 36).int(),
        "count": 4,
    }
    names = {
        "token_spread": "tokens clusters window neighbourhood",
        "token_cluster": "tokens clusters window neighbourhood iterations temperature spread",
        "token_match": "tokens centres clusters window topk temperature spread",
        "token_reconstruct": "refined indices weights tokens centres",
        "token_reduce": "tokens clusters window iterations neighbourhood topk temperature",
        "token_merge": "tokens sizes merged",
        "token_pool": "tokens groups count",
    }[op]
    return {name: arguments[name] for name in names.split()}


@pytest.fixture(params=["cpu", "meta", pytest.param("cuda", marks=pytest.mark.cuda)])
def any_device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return request.param


@pytest.mark.parametrize("op", NAMES)
def test_good_arguments(op, any_device):
    getattr(ops, op)(**good_arguments(op, any_device))


@pytest.mark.parametrize("op", NAMES)
def test_numbers_of_numpy_are_pythons_own(op):
    arguments = good_arguments(op, "cpu")
    numpys = {
        name: tuple(np.array(value)) if isinstance(value, tuple) else np.asarray(value)[()]
        for name, value in arguments.items()
        if not isinstance(value, torch.Tensor)
    }
    assert all(type(value).__module__ == "numpy" or name in ("clusters", "window")
               for name, value in numpys.items())  # fmt: skip
    torch.testing.assert_close(
        getattr(ops, op)(**arguments | numpys), getattr(ops, op)(**arguments), rtol=0, atol=0
    )


@pytest.mark.parametrize("op, name, value, error", _bad_inputs())
def test_bad_arguments_are_named(op, name, value, error, any_device):
    arguments = good_arguments(op, any_device)
    arguments[name] = value(any_device) if callable(value) else value
    with pytest.raises(error, match=f"^{op}: expected .*{name}.* got ") as caught:
        getattr(ops, op)(**arguments)
    assert re.fullmatch(r"[^\n]+", str(caught.value))


@pytest.mark.parametrize("op, name", [("token_cluster", "spread"), ("token_match", "centres"),
                                      ("token_reconstruct", "weights"), ("token_merge", "sizes"),
                                      ("token_pool", "groups")])  # fmt: skip
def test_arguments_on_two_devices_are_named(op, name):
    arguments = good_arguments(op, "cpu")
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(ValueError, match=f"{op}: expected {name} on the device of .* got meta"):
        getattr(ops, op)(**arguments)


@pytest.mark.parametrize("op, name", [
    ("token_spread", "tokens"), ("token_cluster", "tokens"), ("token_match", "centres"),
    ("token_reconstruct", "weights"), ("token_reduce", "tokens"), ("token_merge", "tokens"),
    ("token_merge", "sizes"), ("token_pool", "tokens"), ("token_pool", "groups"),
])  # fmt: skip
def test_kernels_check_shapes_themselves(op, name, device):
    """Whoever calls torch.ops directly gets an error, too, and no read out of bounds."""
    assert_kernel(op, device)
    arguments = good_arguments(op, device)
    arguments[name] = arguments[name][:1, :1].flatten(0, 1)
    order = {
        "token_spread": "tokens clusters window neighbourhood",
        "token_cluster": "tokens clusters window iterations neighbourhood temperature spread",
        "token_match": "tokens centres clusters window topk temperature spread",
        "token_reconstruct": "refined indices weights tokens centres",
        "token_reduce": "tokens clusters window iterations neighbourhood topk temperature",
        "token_merge": "tokens sizes merged",
        "token_pool": "tokens groups count",
    }[op]
    automatic = [True] if op == "token_reduce" else []
    with pytest.raises(ValueError, match=f"{op}: expected {name} of shape"):
        getattr(torch.ops.expedite_d2, op)(*(arguments[key] for key in order.split()), *automatic)

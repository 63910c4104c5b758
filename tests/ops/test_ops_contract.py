"""What holds for all operators: registration, argument errors, compile, export, autocast, bits."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from op_cases import CASES, Sample, assert_kernel, make_sample

from expedite_d2 import _ext, ops
from expedite_d2.ops import reference

# Those of which pipeline() below is made, and all.
PARTS = ["token_spread", "token_cluster", "token_match", "token_reconstruct"]
NAMES = [*PARTS, "token_reduce", "token_merge", "token_pool"]
OPCHECK_CASES = ["windows", "ragged", "image", "one_token"]


def op_args(name: str, sample: Sample) -> tuple:
    return {
        "token_spread": sample.spread_args,
        "token_cluster": sample.cluster_args,
        "token_match": sample.match_args,
        "token_reconstruct": sample.reconstruct_args,
        "token_merge": sample.merge_args,
        "token_pool": sample.pool_args,
        "token_reduce": sample.reduce_args,
    }[name]()


def pipeline(tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All public functions in the order of their use."""
    window, clusters = (12, 12), (8, 8)
    spread = ops.token_spread(tokens, clusters, window=window)
    rest = {"window": window, "temperature": 8.0, "spread": spread}
    centres = ops.token_cluster(tokens, clusters, **rest)
    indices, weights = ops.token_match(tokens, centres, clusters, **rest)
    refined = centres * 1.5
    out = ops.token_reconstruct(refined, indices, weights, tokens=tokens, centres=centres)
    sequence = out.flatten(1, 2)
    sizes = sequence.new_ones(sequence.shape[:2], dtype=torch.float32)
    merged = ops.token_merge(sequence, sizes, sequence.shape[1] // 4)
    pooled = ops.token_pool(sequence, merged.places, merged.tokens.shape[1])
    return spread, centres, indices, weights, out, *merged, merged.tokens + pooled


def reduced(tokens: torch.Tensor, side: int) -> tuple[torch.Tensor, ...]:
    """What windows of side x side give, each of 8 x 8 cells."""
    window, clusters = (side, side), (8, 8)
    return ops.token_reduce(tokens, clusters, window=window, temperature=8.0, automatic=True)


class Pipeline(torch.nn.Module):
    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return pipeline(tokens)


def test_extension_is_loaded():
    assert _ext.has_ext(), _ext.ext_error()
    assert _ext.ext_error() is None
    info = _ext.build_info()
    assert set(info) == {"cuda", "archs", "compiler", "torch"} and info["compiler"]


@pytest.mark.parametrize("name", NAMES)
def test_dispatcher_holds_the_kernel(name, device):
    assert_kernel(name, device)


def test_without_extension_the_references_run():
    code = (
        "import torch; from expedite_d2 import _ext, ops\n"
        "assert not _ext.has_ext() and 'EXPEDITE_D2_NO_EXT' in _ext.ext_error()\n"
        "assert _ext.build_info()['cuda'] is None\n"
        "print(ops.token_cluster(torch.tensor([0., 1, 4, 6]).view(1, 1, 4, 1), (1, 2),"
        " temperature=1.0, neighbourhood=1).flatten().tolist())"
    )
    env = {**os.environ, "EXPEDITE_D2_NO_EXT": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[0.5, 5.0]"


@pytest.mark.parametrize("case", ["windows", "ragged", "image"])
@pytest.mark.parametrize("name", NAMES)
def test_reference_is_contiguous_like_the_fake(name, case):
    sample = make_sample(CASES[case], strided=True)
    out = getattr(reference, f"{name}_ref")(*op_args(name, sample))
    assert all(x.is_contiguous() for x in (out if isinstance(out, tuple) else (out,)))


def test_opcheck_of_backward(device):
    sample = make_sample(CASES["ragged"], device)
    library = torch.ops.expedite_d2
    args = (torch.ones_like(sample.centres), *sample.cluster_args())
    torch.library.opcheck(library._token_cluster_backward.default, args)
    args = (
        torch.ones_like(sample.tokens),
        sample.indices,
        sample.weights,
        CASES["ragged"].map_size,
    )
    torch.library.opcheck(library._token_reconstruct_backward.default, args)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", OPCHECK_CASES)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
def test_opcheck(name, case, requires_grad, device):
    args = op_args(name, make_sample(CASES[case], device))
    if requires_grad:
        args = tuple(
            a.clone().requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a
            for a in args
        )
    torch.library.opcheck(getattr(torch.ops.expedite_d2, name).default, args)


@pytest.mark.parametrize("name", NAMES)
def test_fake_equals_kernel(name, device):
    for case in CASES.values():
        args = op_args(name, make_sample(case, device, torch.bfloat16))
        op = getattr(torch.ops.expedite_d2, name)
        real = op(*args)
        meta = op(*(a.to("meta") if torch.is_tensor(a) else a for a in args))
        for r, m in zip(*((x,) if torch.is_tensor(x) else x for x in (real, meta)), strict=True):
            assert (r.shape, r.dtype, r.stride()) == (m.shape, m.dtype, m.stride())


@pytest.mark.parametrize("name", NAMES)
def test_same_input_same_bits(name, device):
    for case in ("wide", "ragged", "image"):
        args = op_args(name, make_sample(CASES[case], device))
        op = getattr(torch.ops.expedite_d2, name)
        threads = torch.get_num_threads()
        try:
            outs = []
            for count in (1, 2, 3, 1):  # nor may the number of CPU threads matter
                torch.set_num_threads(count)
                out = op(*args)
                outs.append((out,) if torch.is_tensor(out) else out)
        finally:
            torch.set_num_threads(threads)
        for out in outs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(out, outs[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_output_types(dtype, device):
    tokens = make_sample(CASES["windows"], device).tokens.to(dtype)
    names = "spread centres indices weights out merged sizes places sum"
    for name, x in zip(names.split(), pipeline(tokens), strict=True):
        fixed = {"indices": torch.int32, "places": torch.int32}
        fixed |= dict.fromkeys(("spread", "weights", "sizes"), torch.float32)
        assert x.dtype == fixed.get(name, dtype), name


def test_autocast_changes_nothing(device):
    tokens = make_sample(CASES["windows"], device).tokens
    plain = pipeline(tokens)
    sample = make_sample(CASES["windows"], device)
    expected = reference.token_cluster_ref(*sample.cluster_args())
    with torch.autocast(device, torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(plain, pipeline(tokens), strict=True))
        assert torch.equal(reference.token_cluster_ref(*sample.cluster_args()), expected)


def test_compile_fullgraph(device):
    tokens = make_sample(CASES["windows"], device).tokens
    compiled = torch.compile(pipeline, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for a, b in zip(compiled(tokens), pipeline(tokens), strict=True):
            assert torch.equal(a, b)
    trained = [tokens.clone().requires_grad_() for _ in range(2)]
    compiled(trained[0])[-1].sum().backward()
    pipeline(trained[1])[-1].sum().backward()
    torch.testing.assert_close(trained[0].grad, trained[1].grad)


@pytest.mark.slow
def test_compile_inductor(device):
    tokens = make_sample(CASES["windows"], device).tokens
    with torch.no_grad():
        compiled = torch.compile(pipeline, fullgraph=True)
        for a, b in zip(compiled(tokens), pipeline(tokens), strict=True):
            torch.testing.assert_close(a, b)


def test_export(device):
    tokens = make_sample(CASES["windows"], device).tokens
    exported = torch.export.export(Pipeline(), (tokens,))
    targets = {str(node.target) for node in exported.graph.nodes}
    assert {f"expedite_d2.{name}.default" for name in PARTS} <= targets
    for a, b in zip(exported.module()(tokens), pipeline(tokens), strict=True):
        assert torch.equal(a, b)


class Reduce(torch.nn.Module):
    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(reduced(tokens, 12))


@pytest.mark.parametrize("module", [Pipeline(), Reduce()])
def test_decomposed_programs_hold_standard_operators(module, device):
    tokens = make_sample(CASES["windows"], device).tokens
    shapes = {"tokens": {0: torch.export.Dim("batch", min=2)}}
    program = torch.export.export(module, (tokens,), dynamic_shapes=shapes)
    program = program.run_decompositions(ops.decompositions())
    targets = " ".join(str(node.target) for node in program.graph.nodes)
    assert "expedite_d2" not in targets
    assert "index_add" not in targets and "index_put" not in targets  # see `add_rows`
    more = torch.cat([tokens, tokens.flip(2)])
    for a, b in zip(program.module()(more), module(more), strict=True):
        # A few centres hang on responsibilities so tiny that rounding moves them.
        torch.testing.assert_close(a, b, rtol=1e-2, atol=2e-3)


def test_every_operator_has_a_decomposition():
    known = {str(operator) for operator in ops.decompositions()}
    assert known >= {f"expedite_d2.{name}.default" for name in [*NAMES, "ms_deform_attn"]}


@pytest.mark.cuda
def test_side_stream():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    tokens = make_sample(CASES["windows"], "cuda").tokens
    expected = pipeline(tokens)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        out = pipeline(tokens)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


@pytest.mark.cuda
def test_cuda_graph():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    tokens = make_sample(CASES["windows"], "cuda").tokens

    def calls() -> list[torch.Tensor]:
        # Windows of several sizes, as what a kernel may ask for is one number.
        return [*pipeline(tokens), *reduced(tokens, 12), *reduced(tokens, 10)]

    calls()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = calls()
    tokens.mul_(0.5).add_(1.0)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(out, calls(), strict=True))


@pytest.mark.cuda
def test_threads_with_windows_of_different_sizes():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")

    tokens = make_sample(CASES["windows"], "cuda").tokens

    def reduce_often(side: int) -> bool:
        expected = reduced(tokens, side)
        results = (reduced(tokens, side) for _ in range(200))
        return all(torch.equal(a, b) for one in results for a, b in zip(one, expected, strict=True))

    with ThreadPoolExecutor() as pool:
        assert all(pool.map(reduce_often, (10, 12)))


@pytest.mark.slow
@pytest.mark.skipif("AVX512" not in torch.backends.cpu.get_cpu_capability(), reason="no AVX-512")
def test_narrow_registers_agree():
    """Runs the kernels' other instruction set, which this machine would not choose."""
    tests = [os.path.join(os.path.dirname(__file__), f"test_{name}.py") for name in NAMES]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    command += ["-k", "cpu and float32 and kernel_equals_reference and not strided"]
    env = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


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

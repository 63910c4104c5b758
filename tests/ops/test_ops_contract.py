"""What holds for all operators: registration, compile, export, autocast, bits."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from op_cases import CASES, NAMES, PARTS, Sample, assert_kernel, make_sample

from expedite_d2 import _ext, ops
from expedite_d2.ops import reference

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

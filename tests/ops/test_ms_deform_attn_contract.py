"""Multi-scale deformable attention: what holds for all operators, and argument errors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from deform_cases import BACKWARD, CASES, KERNEL, Case, make_args, strided
from op_cases import assert_kernel, each_dtype
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from expedite_d2.ops import decompositions, ms_deform_attn
from expedite_d2.ops.reference import ms_deform_attn_ref


@pytest.mark.parametrize("case", ["odd", "one_query", "mask2former"])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
def test_ms_deform_attn_opcheck(case, requires_grad, device):
    args = tuple(
        a.requires_grad_(requires_grad) if isinstance(a, Tensor) else a
        for a in make_args(CASES[case], device)
    )
    torch.library.opcheck(KERNEL, args)


def test_ms_deform_attn_backward_opcheck(device):
    args = make_args(CASES["odd"], device)
    torch.library.opcheck(BACKWARD, (torch.ones(2, 7, 27, device=device), *args))


@each_dtype
def test_ms_deform_attn_fake_equals_kernel(dtype, device):
    for case in CASES.values():
        args = strided(make_args(case, device, dtype))
        grad = KERNEL(*args)
        for op, inputs in ((KERNEL, args), (BACKWARD, (grad, *args))):
            real = op(*inputs)
            meta = op(*(a.to("meta") if isinstance(a, Tensor) else a for a in inputs))
            pairs = zip(*((x,) if isinstance(x, Tensor) else x for x in (real, meta)), strict=True)
            for r, m in pairs:
                assert (r.shape, r.dtype, r.stride()) == (m.shape, m.dtype, m.stride())


def test_ms_deform_attn_same_input_same_bits(device):
    args = make_args(CASES["mask2former"], device)
    ops = [lambda: [KERNEL(*args)]]
    if device == "cpu":
        ops.append(lambda: BACKWARD(torch.ones(2, 70, 256), *args))
    threads = torch.get_num_threads()
    for op in ops:
        try:
            outs = []
            for count in (1, 2, 3, 1):
                torch.set_num_threads(count)
                outs.append(op())
        finally:
            torch.set_num_threads(threads)
        for out in outs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(out, outs[0], strict=True))


def test_ms_deform_attn_autocast_changes_nothing(device):
    args = make_args(CASES["mask2former"], device)
    plain = [run(*args) for run in (KERNEL, ms_deform_attn_ref)]
    with torch.autocast(device, torch.bfloat16):
        for run, expected in zip((KERNEL, ms_deform_attn_ref), plain, strict=True):
            assert torch.equal(run(*args), expected)


class Attention(torch.nn.Module):
    """The operator with its sizes read from maps, as a pixel decoder has them."""

    def forward(self, maps: list[Tensor], locations: Tensor, weights: Tensor) -> Tensor:
        value = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)
        shapes = [(m.shape[2], m.shape[3]) for m in maps]
        heads = locations.shape[2]
        value = value.unflatten(2, (heads, -1))
        return ms_deform_attn(value, shapes, None, locations, weights)


def attention_inputs(device: str, scale: int = 1) -> tuple[list[Tensor], Tensor, Tensor]:
    case = Case(2, 5 * scale, 2, 8, ((3 * scale, 5), (7, 2 * scale)), 4)
    value, _, _, locations, weights = make_args(case, device)
    maps, start = [], 0
    for h, w in case.shapes:
        rows = value[:, start : start + h * w].flatten(2)
        maps.append(rows.transpose(1, 2).unflatten(2, (h, w)))
        start += h * w
    return maps, locations, weights


@pytest.mark.parametrize("dynamic", [False, True])
def test_ms_deform_attn_compile_fullgraph(dynamic, device):
    torch._dynamo.reset()
    module, backend = Attention(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=backend, dynamic=dynamic)
    counts = []
    for scale in (3, 5):  # of numbers that do not coincide, which would be guarded
        maps, *places = attention_inputs(device, scale)
        assert torch.equal(compiled(maps, *places), module(maps, *places))
        grads = []
        for run in (compiled, module):
            leaves = [x.detach().requires_grad_() for x in places]
            run(maps, *leaves).square().sum().backward()
            grads.append([leaf.grad for leaf in leaves])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
        counts.append(backend.frame_count)
    assert (counts[1] == counts[0]) == dynamic  # another size needs no other graph


def test_ms_deform_attn_export(device):
    inputs = attention_inputs(device)
    exported = torch.export.export(Attention(), inputs)
    assert "expedite_d2.ms_deform_attn.default" in {str(n.target) for n in exported.graph.nodes}
    expected = Attention()(*inputs)
    assert torch.equal(exported.module()(*inputs), expected)
    standard = exported.run_decompositions(decompositions())
    assert not any("expedite_d2" in str(node.target) for node in standard.graph.nodes)
    torch.testing.assert_close(standard.module()(*inputs), expected)


@pytest.mark.cuda
def test_ms_deform_attn_side_stream_and_cuda_graph():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    args = make_args(CASES["mask2former"], "cuda")
    expected = KERNEL(*args)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        out = KERNEL(*args)
    stream.synchronize()
    assert torch.equal(out, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = KERNEL(*args)
    args[0].mul_(0.5)
    graph.replay()
    assert torch.equal(out, KERNEL(*args))


def test_ms_deform_attn_without_extension_the_reference_runs():
    code = (
        "import torch; from expedite_d2 import _ext, ops\n"
        "assert not _ext.has_ext()\n"
        "x = torch.tensor([1., 3]).view(1, 2, 1, 1).requires_grad_()\n"
        "out = ops.ms_deform_attn(x, [(1, 2)], None, torch.full((1, 1, 1, 1, 1, 2), 0.5),"
        " torch.ones(1, 1, 1, 1, 1))\n"
        "out.backward(); print(out.item(), x.grad.flatten().tolist())"
    )
    env = {**os.environ, "EXPEDITE_D2_NO_EXT": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2.0 [0.5, 0.5]"


@pytest.mark.slow
@pytest.mark.skipif("AVX512" not in torch.backends.cpu.get_cpu_capability(), reason="no AVX-512")
def test_ms_deform_attn_narrow_registers_agree():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [str(Path(__file__).with_name("test_ms_deform_attn.py"))]
    command += ["-k", "cpu and float32 and kernel_equals_reference and dense"]
    env = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


# --- errors -----------------------------------------------------------------------------------


def good_arguments(device: str) -> dict[str, Any]:
    value, _, starts, locations, weights = make_args(CASES["odd"], device)
    return {
        "value": value,
        "spatial_shapes": list(CASES["odd"].shapes),
        "level_start": starts,
        "sampling_locations": locations,
        "attention_weights": weights,
    }


BAD = [
    ("value", lambda x: x[0], ValueError),
    ("value", lambda x: x[:, :0], ValueError),
    ("value", lambda x: x[:, :21], ValueError),
    ("value", lambda x: x.int(), TypeError),
    ("value", lambda x: [[1.0]], TypeError),
    ("spatial_shapes", lambda x: x[:1], ValueError),
    ("spatial_shapes", lambda x: [(5, 3), (7,)], ValueError),
    ("spatial_shapes", lambda x: [(5, 3), (0, 7)], ValueError),
    ("spatial_shapes", lambda x: [(5, 3), (1.0, 7)], ValueError),
    ("spatial_shapes", lambda x: [5, 3, 1, 7], ValueError),
    ("spatial_shapes", lambda x: [], ValueError),
    ("spatial_shapes", lambda x: None, ValueError),
    ("spatial_shapes", lambda x: [(5, 3), (2, 7)], ValueError),
    ("spatial_shapes", lambda x: torch.ones(2, 2), TypeError),
    ("spatial_shapes", lambda x: torch.ones(2, 2, dtype=torch.int64, device="meta"), TypeError),
    ("level_start", lambda x: [0], ValueError),
    ("level_start", lambda x: [0, 16], ValueError),
    ("level_start", lambda x: [-1, 15], ValueError),
    ("level_start", lambda x: [0.0, 15], ValueError),
    ("level_start", lambda x: 0, ValueError),
    ("sampling_locations", lambda x: x[..., 0], ValueError),
    ("sampling_locations", lambda x: x[:1], ValueError),
    ("sampling_locations", lambda x: x[:, :, :2], ValueError),
    ("sampling_locations", lambda x: x[:, :, :, :1], ValueError),
    ("sampling_locations", lambda x: x[:, :0], ValueError),
    ("sampling_locations", lambda x: x.half(), TypeError),
    ("sampling_locations", lambda x: None, TypeError),
    ("attention_weights", lambda x: x[:, :3], ValueError),
    ("attention_weights", lambda x: x.half(), TypeError),
    ("attention_weights", lambda x: None, TypeError),
]


@pytest.fixture(params=["cpu", "meta", pytest.param("cuda", marks=pytest.mark.cuda)])
def any_device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return request.param


def test_ms_deform_attn_good_arguments(any_device):
    assert ms_deform_attn(**good_arguments(any_device)).shape == (2, 7, 27)


@pytest.mark.parametrize("name, change, error", BAD)
def test_ms_deform_attn_bad_arguments_are_named(name, change, error, any_device):
    arguments = good_arguments(any_device)
    arguments[name] = change(arguments[name])
    with pytest.raises(error, match=f"^ms_deform_attn: expected .*{name}.* got ") as caught:
        ms_deform_attn(**arguments)
    assert re.fullmatch(r"[^\n]+", str(caught.value))


def test_ms_deform_attn_levels_must_fill_value():
    arguments = good_arguments("cpu") | {"level_start": None, "spatial_shapes": [(5, 3), (1, 6)]}
    with pytest.raises(ValueError, match="expected value of 21 rows, .* got 22"):
        ms_deform_attn(**arguments)


@pytest.mark.parametrize("name", ["sampling_locations", "attention_weights"])
def test_ms_deform_attn_arguments_on_two_devices_are_named(name):
    arguments = good_arguments("cpu")
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(ValueError, match=f"expected {name} on the device of .* got meta"):
        ms_deform_attn(**arguments)


@pytest.mark.parametrize("place, change", [
    (0, lambda x: x[0]),
    (1, lambda x: [5, 3, 2, 7]),
    (1, lambda x: [5, 3]),
    (1, lambda x: [2**62, 2, 1, 7]),
    (2, lambda x: [0, 2**62]),
    (2, lambda x: [-1, 15]),
    (3, lambda x: x[:, :, :, :1]),
    (3, lambda x: x.half()),
    (4, lambda x: x[:, :3]),
])  # fmt: skip
def test_ms_deform_attn_kernels_check_for_themselves(place, change, device):
    """Whoever calls torch.ops directly gets an error, too, and no read out of bounds."""
    assert_kernel("ms_deform_attn", device)
    args = list(make_args(CASES["odd"], device))
    grad = torch.ones(2, 7, 27, device=device)
    args[place] = change(args[place])
    for op, inputs in ((KERNEL, args), (BACKWARD, [grad, *args])):
        with pytest.raises((ValueError, TypeError), match="ms_deform_attn: expected .* got"):
            op(*inputs)


def test_ms_deform_attn_backward_checks_the_gradient(device):
    args = make_args(CASES["odd"], device)
    for grad in (torch.ones(2, 7, 26, device=device), torch.ones(2, 7, 27, device=device).half()):
        with pytest.raises((ValueError, TypeError), match="ms_deform_attn: expected grad"):
            BACKWARD(grad, *args)

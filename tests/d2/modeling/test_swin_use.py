"""The Swin backbones in use: batches, copies, threads, gradients, autocast, compilation."""

from __future__ import annotations

import copy
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from settings_cases import clustered
from swin_cases import images, tiny
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._inductor.utils import run_and_get_code

from expedite_d2.reducers import Reduction


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("reduction", [None, clustered(4, (3, 2))])
def test_swin_image_does_not_depend_on_batch(reduction: Reduction | None, version: int) -> None:
    model = tiny(reduction, version=version)
    x = images(96, 112, batch=3) * torch.tensor([1.0, 5.0, 0.2]).view(3, 1, 1, 1)
    with torch.no_grad():
        together = model(x)
        for i in range(3):
            alone = model(x[i : i + 1])
            for name, value in alone.items():
                torch.testing.assert_close(together[name][i], value[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("version", [1, 2])
def test_swin_survives_deepcopy_and_pickle(version: int) -> None:
    model = tiny(clustered(4, (2, 3)), version=version)
    x = images(64, 96)
    with torch.no_grad():
        expected = model(x)["res5"]
        assert torch.equal(copy.deepcopy(model)(x)["res5"], expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x)["res5"], expected)


def test_swin_threads_do_not_disturb_each_other() -> None:
    model = tiny(clustered(4, (2, 2)))
    inputs = [images(64 + 16 * i, 144 - 16 * i) for i in range(6)]

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            return model(x)["res5"]

    expected = [run(x) for x in inputs]
    with ThreadPoolExecutor(3) as pool:
        for a, b in zip(expected * 3, pool.map(run, inputs * 3), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("reduction", [None, clustered(4, (2, 2))])
def test_swin_checkpointing_gives_same_gradients(reduction: Reduction | None, version: int) -> None:
    x = images(64, 80)
    gradients = []
    for use_checkpoint in (False, True):
        settings = {"use_checkpoint": use_checkpoint, "drop_path_rate": 0.0, "version": version}
        model = tiny(reduction, **settings).train()
        sum(v.square().mean() for v in model(x).values()).backward()
        gradients.append({k: p.grad for k, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.isfinite().all(), name
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", [None, clustered(4, (2, 2))])
def test_swin_runs_under_autocast(
    reduction: Reduction | None, dtype: torch.dtype, version: int
) -> None:
    model = tiny(reduction, version=version)
    x = images(64, 80)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", dtype=dtype):
            got = model(x)
    for name, value in got.items():
        difference = (value.float() - expected[name]).square().mean().sqrt()
        assert difference < 0.15 * expected[name].square().mean().sqrt(), name


@pytest.mark.parametrize(
    ("backend", "version"),
    [("aot_eager", 1), ("aot_eager", 2), pytest.param("inductor", 2, marks=pytest.mark.slow)],
)
def test_swin_compiles_without_breaks(backend: str, version: int) -> None:
    torch.compiler.reset()
    stages = {"depths": [1, 3], "num_heads": [1, 2], "out_features": ["res2", "res3"]}
    model = tiny(clustered(2, (2, 2)), version=version, **stages)
    x = images(72, 64, batch=1)
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=False)
    with torch.no_grad():
        for name, value in compiled(x).items():
            torch.testing.assert_close(value, model(x)[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_convolutions_do_not_change_how_compiled_maps_lie_in_memory() -> None:
    torch.compiler.reset()
    stages = {"depths": [1, 2], "num_heads": [1, 2], "out_features": ["res3"]}
    model = tiny(clustered(2, (2, 2)), **stages)
    head = nn.Conv2d(32, 8, 1)

    def run(x: Tensor) -> Tensor:
        return head(model(x)["res3"])

    x = images(104, 72, batch=1)
    compiled = torch.compile(run, fullgraph=True, dynamic=False)
    with torch.no_grad():
        value, (code,) = run_and_get_code(compiled, x)
        torch.testing.assert_close(value, run(x), rtol=1e-3, atol=1e-4)
    buffers = re.findall(r"empty_strided_cpu\(\(([\d, ]+)\), \(([\d, ]+)\)", code)
    layouts = [[[int(n) for n in part.split(", ") if n] for part in parts] for parts in buffers]
    assert layouts
    # inductor would rather have the H of (B, H, W, C), which it takes for channels, innermost.
    for sizes, strides in layouts:
        if sizes[-1] in (16, 32):
            assert strides[-1] == 1, (sizes, strides)


@pytest.mark.parametrize("dynamic", [False, True])
def test_sizes_compile_once(dynamic: bool) -> None:
    torch.compiler.reset()
    stages = {"depths": [1, 2], "num_heads": [1, 2], "out_features": ["res2", "res3"]}
    model = tiny(clustered(1, (2, 2)), **stages)
    graphs = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=graphs, dynamic=dynamic)
    # Multiples of the windows, three or more a side: one, or padding, has a graph of its own.
    sizes = [(96, 128), (128, 160), (160, 96)]
    with torch.no_grad():
        for size in sizes:
            for name, value in compiled(images(*size)).items():
                expected = model(images(*size))[name]
                torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4)
        assert graphs.frame_count == (1 if dynamic else len(sizes))
        for size in sizes:
            compiled(images(*size))
    assert graphs.frame_count == (1 if dynamic else len(sizes))

"""What holds of every family: an expedited encoder is the same model on fewer tokens."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import CASES, swin
from family_cases.case import Case, images
from onnxruntime import InferenceSession
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from expedite_d2 import expedite, families, is_expedited, restore
from expedite_d2.adapters.registry import find_encoder
from expedite_d2.ops import decompositions
from expedite_d2.reducers import Cluster, Merge, Reduction

# Each kind of encoder with each reduction that it takes.
SETTINGS: dict[str, tuple[Case, Reduction]] = {}
for _name, _case in CASES.items():
    SETTINGS[_name] = (_case, Reduction(Cluster(_case.alpha, _case.clusters)))
    if not find_encoder(_case.make())[0].positions.needs_grid:  # type: ignore[union-attr]
        SETTINGS[f"{_name}, merging"] = (_case, Reduction(Merge((1, 2), 0.7)))
        SETTINGS[f"{_name}, grouped"] = (_case, Reduction(Merge((1, 2), 0.7, rounds=1)))
kinds = pytest.mark.parametrize(("case", "reduction"), SETTINGS.values(), ids=SETTINGS)
# Of each mechanism one, for what takes seconds: none, table (two libraries), windows, decomposed.
MECHANISMS = ["timm vit", "timm beit, own bias", "transformers beit, both biases"]
MECHANISMS += ["transformers dpt", "official swin", "detectron2 vit"]
MECHANISMS += ["transformers swin", "transformers swin v2"]
MECHANISMS += ["timm vit, grouped", "transformers vit, merging", "transformers yolos, merging"]
MECHANISMS += ["transformers sam", "transformers sam 3", "transformers vitdet"]
MECHANISMS += ["transformers dinov3", "dinov3, merging", "timm eva02, grouped"]
MECHANISMS += ["torchvision swin3d", "timm swin", "timm swin v2"]
mechanisms = pytest.mark.parametrize(
    ("case", "reduction"), [SETTINGS[name] for name in MECHANISMS], ids=MECHANISMS
)
# And of each kind of positions one, for what takes longer still.
KINDS_OF_POSITIONS = ["timm vit, grouped", "timm beit, own bias", "detectron2 vit"]
KINDS_OF_POSITIONS += ["transformers dinov3"]
SHALLOW = {name: SETTINGS[name] for name in KINDS_OF_POSITIONS}
for _name, _case in swin.SHALLOW.items():
    SHALLOW[_name] = (_case, Reduction(Cluster(_case.alpha, _case.clusters)))
shallow = pytest.mark.parametrize(("case", "reduction"), SHALLOW.values(), ids=SHALLOW)
# Grouped attention merges, too.
COMPILED = [
    name for name in SETTINGS if not name.endswith(", merging") and SETTINGS[name][0].compiled
]


def expedited(case: Case, reduction: Reduction) -> Any:
    return expedite(case.make(), reduction)


def lengths(case: Case, model: Any, x: Tensor) -> list[int]:
    """Tokens in each block's attention or MLP: what it really runs on."""
    seen: list[int] = []

    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].numel() // args[0].shape[-1] // len(x))

    hooks = []
    for block in case.blocks(model):
        (linear,) = [m for m in list(block.modules()) if isinstance(m, nn.Linear)][-1:]
        hooks.append(linear.register_forward_pre_hook(count))
    with torch.no_grad():
        case.run(model, x)
    for hook in hooks:
        hook.remove()
    return seen


def test_every_registered_family_is_tried() -> None:
    tried = {find_encoder(case.make())[0].name for case in CASES.values()}  # type: ignore[union-attr]
    assert tried == {family.name for family in families()}


@kinds
def test_blocks_of_the_span_run_on_fewer_tokens(case: Case, reduction: Reduction) -> None:
    model, x = case.make(), case.images()
    plain = lengths(case, model, x)
    expedite(model, reduction)
    fewer = lengths(case, model, x)
    assert len(plain) == len(fewer) == len(case.blocks(model))
    span = vars(model)["_hourglass"].span
    assert span.start == reduction.alpha
    for number, (before, after) in enumerate(zip(plain, fewer, strict=True)):
        assert after < 0.75 * before if number in span else after == before


@kinds
def test_outputs_keep_their_shapes_at_every_size(case: Case, reduction: Reduction) -> None:
    model, fast = case.make(), expedited(case, reduction)
    with torch.no_grad():
        for size in (case.size, *case.others):
            x = images(*size, batch=2)
            out, plain = case.run(fast, x), case.run(model, x)
            assert out.shape == plain.shape and out.isfinite().all()
            assert not torch.equal(out, plain)


@kinds
def test_a_batch_is_its_single_images(case: Case, reduction: Reduction) -> None:
    model, x = expedited(case, reduction), case.images()
    with torch.no_grad():
        together = case.run(model, x)
        single = torch.cat([case.run(model, image[None]) for image in x])
    torch.testing.assert_close(together, single, rtol=1e-4, atol=1e-4)


@kinds
def test_restored_is_plain_to_the_bit(case: Case, reduction: Reduction) -> None:
    model, x = case.make(), case.images()
    names = {name: set(vars(module)) for name, module in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        plain = case.run(model, x)
        expedite(model, reduction)
        assert is_expedited(model) and not torch.equal(case.run(model, x), plain)
        now = model.state_dict()
        assert list(now) == list(state) and all(torch.equal(now[name], state[name]) for name in now)
        assert restore(model) is model and not is_expedited(model)
        assert torch.equal(case.run(model, x), plain)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == names


@kinds
def test_copies_and_pickles_are_models_of_their_own(case: Case, reduction: Reduction) -> None:
    model, x = expedited(case, reduction), case.images()
    with torch.no_grad():
        expected = case.run(model, x)
        others = [copy.deepcopy(model)]
        if case.pickles:
            others.append(pickle.loads(pickle.dumps(model)))
        for other in others:
            assert torch.equal(case.run(other, x), expected)
            for parameter in other.parameters():
                parameter.mul_(0.5)
            assert not torch.equal(case.run(other, x), expected)
            assert torch.equal(case.run(model, x), expected)
            restore(other)
            assert is_expedited(model) and not is_expedited(other)


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_and_autocast(case: Case, reduction: Reduction, dtype: torch.dtype) -> None:
    model, x = expedited(case, reduction), case.images()
    with torch.no_grad():
        expected = case.run(model, x)
        with torch.autocast("cpu", dtype):
            mixed = case.run(model, x)
        half = case.run(copy.deepcopy(model).to(dtype), x.to(dtype))
    assert half.dtype == dtype and half.isfinite().all()
    scale = expected.abs().mean()
    for other in (mixed, half):  # in which rounding has changed the partners of a few tokens
        assert (other.float() - expected).abs().mean() < 0.15 * scale


@kinds
def test_a_training_step_reaches_every_parameter(case: Case, reduction: Reduction) -> None:
    model, x = case.make().train(), case.images()

    def reached() -> dict[str, bool]:
        model.zero_grad()
        case.run(model, x).square().mean().backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert all(grad is None or grad.isfinite().all() for grad in grads.values())
        return {name: grad is not None for name, grad in grads.items()}

    plain = reached()
    expedite(model, reduction)
    assert reached() == plain


@kinds
def test_nothing_of_a_pass_is_left_behind(case: Case, reduction: Reduction) -> None:
    model, x = expedited(case, reduction), case.images()
    seen: list[weakref.ref] = []

    def look(block: nn.Module, args: tuple[Tensor, ...], out: Any) -> None:
        seen.append(weakref.ref(out if isinstance(out, Tensor) else out[0]))

    for block in case.blocks(model):
        block.register_forward_hook(look)
    gc.disable()  # it would hide a cycle
    try:
        case.run(model, x).sum().backward()
        with torch.no_grad():
            case.run(model, x)
        assert len(seen) == 2 * len(case.blocks(model)) and all(ref() is None for ref in seen)
    finally:
        gc.enable()


@pytest.mark.parametrize(("case", "reduction"), [SETTINGS[name] for name in COMPILED], ids=COMPILED)
@pytest.mark.slow
def test_compiles_without_breaks(case: Case, reduction: Reduction) -> None:
    torch.compiler.reset()
    model, x = expedited(case, reduction), case.images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(case.run(compiled, x), case.run(model, x), rtol=1e-4, atol=1e-4)


@shallow
@pytest.mark.slow
def test_inductor_makes_code_of_it(case: Case, reduction: Reduction) -> None:
    torch.compiler.reset()
    model, x = expedited(case, reduction), case.images()
    with torch.no_grad():
        out = case.run(torch.compile(model, fullgraph=True), x)
        torch.testing.assert_close(out, case.run(model, x), rtol=1e-3, atol=1e-3)


def program_of(case: Case, model: nn.Module, x: Tensor) -> ExportedProgram:
    """The model for batches of any size but one."""

    class Run(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return case.run(self.model, x)

    return export(Run(), (x,), dynamic_shapes=({0: Dim("batch", min=2)},))


@mechanisms
@pytest.mark.slow
def test_exports_for_batches_of_any_size(case: Case, reduction: Reduction) -> None:
    model, x = expedited(case, reduction), case.images()
    with torch.no_grad():
        program = program_of(case, model, x).module()
        for batch in (x, x[:2]):
            expected = case.run(model, batch)
            torch.testing.assert_close(program(batch), expected, rtol=1e-4, atol=1e-4)


@shallow
@pytest.mark.slow
def test_onnx_runtime_gives_the_same(case: Case, reduction: Reduction, tmp_path: Path) -> None:
    model, x = expedited(case, reduction), case.images()
    file = tmp_path / "model.onnx"
    with torch.no_grad():
        program = program_of(case, model, x).run_decompositions(decompositions())
        torch.onnx.export(program, f=file, verbose=False)
        session = InferenceSession(file)
        for batch in (x, x[:2]):
            (found,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
            expected = case.run(model, batch)
            torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-3)

"""What happens to an expedited encoder besides being called: replicas, wrappers, tracers."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from family_cases import CASES
from family_cases.case import Case
from family_cases.decomposed import MapCase
from family_cases.plain import timm_vit, transformers_dinov2, transformers_vit
from family_cases.swin import SwinCase
from settings_cases import clustered
from torch import Tensor, nn
from torch.nn.parallel import replicate as torch_replicate

from expedite_d2 import expedite, is_expedited, restore
from expedite_d2.adapters.override import Override
from expedite_d2.reducers import Merge, Reduction

families = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


# ---- replicas --------------------------------------------------------------------------------


@pytest.fixture
def replicate(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torch's replicate() on a CPU: copy number i has the parameters times 1 + i."""
    module = __import__("sys").modules["torch.nn.parallel.replicate"]

    def broadcast(tensors: Any, devices: Any, detach: bool = False) -> list[list[Tensor]]:
        factors = [1 + device for device in devices]
        return [
            [t.detach() * f if t.is_floating_point() else t.clone() for t in tensors]
            for f in factors
        ]

    monkeypatch.setattr(module, "_get_device_index", lambda device, optional: device)
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", broadcast)
    return torch_replicate


@families
def test_replicas_compute_with_their_own_weights(case: Case, replicate: Any) -> None:
    model, x = expedite(case.make(), clustered(case.alpha, case.clusters)), case.images()
    doubled = copy.deepcopy(model)
    for tensor in [*doubled.parameters(), *doubled.buffers()]:
        if tensor.is_floating_point():
            tensor.data.mul_(2)
    with torch.no_grad():
        plain, other = case.run(model, x), case.run(doubled, x)
        first, second = replicate(model, [0, 1])
        assert torch.equal(case.run(first, x), plain)
        assert torch.equal(case.run(second, x), other) and not torch.equal(other, plain)
        assert torch.equal(case.run(model, x), plain)
        (again,) = replicate(restore(model), [0])
        assert not is_expedited(again) and torch.equal(case.run(again, x), case.run(model, x))


# ---- what is put over a changed method -------------------------------------------------------


def hook_as_accelerate_does(module: nn.Module) -> None:
    """accelerate keeps the instance's forward under another name and puts its own there."""
    module._old_forward = module.forward  # type: ignore[assignment]

    def hooked(*args: Any, **kwargs: Any) -> Any:
        module.calls = getattr(module, "calls", 0) + 1  # type: ignore[assignment]
        return module._old_forward(*args, **kwargs)

    module.forward = functools.update_wrapper(hooked, module._old_forward)  # type: ignore


def unhook(module: nn.Module) -> None:
    module.forward = module._old_forward  # type: ignore[method-assign]
    del module._old_forward


@families
@pytest.mark.parametrize("number", [0, 2])
def test_restore_leaves_later_wrappers_alone(case: Case, number: int) -> None:
    model, x = case.make(), case.images()
    with torch.no_grad():
        plain = case.run(model, x)
        expedite(model, clustered(case.alpha, case.clusters))
        expedited = case.run(model, x)
        block: Any = case.blocks(model)[number]
        hook_as_accelerate_does(block)
        assert torch.equal(case.run(model, x), expedited) and block.calls == 1
        restore(model)
        assert not is_expedited(model)
        assert torch.equal(case.run(model, x), plain) and block.calls == 2
        unhook(block)
        assert torch.equal(case.run(model, x), plain) and block.calls == 2
        expedite(model, clustered(case.alpha, case.clusters))
        assert torch.equal(case.run(model, x), expedited)
        restore(model)
        assert torch.equal(case.run(model, x), plain)


@pytest.mark.parametrize("name", CASES)
def test_earlier_wrappers_are_called_or_refused(name: str) -> None:
    case = CASES[name]
    model, x = case.make(), case.images()
    block: Any = case.blocks(model)[case.alpha]
    hook_as_accelerate_does(block)
    expedite(model, clustered(case.alpha, case.clusters))
    with torch.no_grad():
        if isinstance(case, (SwinCase, MapCase)):
            # Their blocks must see other attributes than the module has, which a wrapper hides.
            with pytest.raises(ValueError, match="replaced before the model was expedited"):
                case.run(model, x)
        else:
            expected = case.run(expedite(case.make(), clustered(case.alpha, case.clusters)), x)
            assert torch.equal(case.run(model, x), expected) and block.calls == 1


@pytest.mark.parametrize("number", [1, 3])
def test_replaced_blocks_are_told(number: int) -> None:
    model, x = expedite(timm_vit(), alpha=0, clusters=(4, 3)), torch.randn(1, 3, 24, 24)
    model.blocks[number] = timm_vit().blocks[0]
    message = f"its blocks {number} were replaced or wrapped since: expedite it again"
    if number < 3:  # after the last one nobody misses the clusters
        with pytest.raises(RuntimeError, match=message):
            model(x)
    expedite(model, alpha=0, clusters=(4, 3))
    assert model(x).isfinite().all()


def test_wrapped_blocks_go_on_where_they_hand_on_the_tokens() -> None:
    class Wrapper(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x)

    model, x = expedite(timm_vit(), alpha=1, clusters=(4, 3)), torch.randn(1, 3, 24, 24)
    with torch.no_grad():
        expected = model(x)
        model.blocks[2] = Wrapper(model.blocks[2])
        assert torch.equal(model(x), expected)


# ---- tracers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0, 2])
def test_fx_tracing_is_refused_in_a_sentence(alpha: int) -> None:
    model = expedite(timm_vit(dynamic_img_size=False), alpha=alpha, clusters=(4, 3))
    with pytest.raises(ValueError, match="cannot be traced by torch.fx .*use torch.export"):
        torch.fx.symbolic_trace(model)
    from torchvision.models.feature_extraction import create_feature_extractor

    with pytest.raises(ValueError, match="cannot be traced by torch.fx .*use torch.export"):
        create_feature_extractor(model, ["norm"])


def test_scripting_is_refused_in_a_sentence() -> None:
    model = expedite(timm_vit(dynamic_img_size=False), alpha=1, clusters=(4, 3))
    with pytest.raises(ValueError, match="or traced by torch.jit: use torch.export or"):
        torch.jit.script(model)


def test_hidden_states_and_attentions_have_their_sizes() -> None:
    model = expedite(transformers_vit(attn_implementation="eager"), alpha=2, clusters=(4, 3))
    out = model(torch.randn(1, 3, 24, 24), output_attentions=True)
    assert [a.shape[-1] for a in out.attentions] == [37, 37, 13, 13]


# ---- one method sees what another was told ---------------------------------------------------


class Twice(nn.Module):
    """A module whose forward asks its own methods, two deep."""

    def __init__(self) -> None:
        super().__init__()
        self.table = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x * self.outer() + self.doubled

    def outer(self) -> float:
        return self.inner() + self.constant()

    def inner(self) -> float:
        return self.table

    @staticmethod
    def constant() -> float:
        return 0.0

    @property
    def doubled(self) -> float:
        return 2 * self.table


@pytest.mark.parametrize("compiled", [False, True])
def test_changed_attributes_are_seen_by_the_methods_that_forward_calls(compiled: bool) -> None:
    module = Twice()

    class Changed(Override):
        def call(self, x: Tensor) -> Tensor:
            return self.original_with({"table": 3.0}, x)

    Changed(module, "forward").install()
    run = torch.compile(module, fullgraph=True, backend="eager") if compiled else module
    assert run(torch.ones(1)).item() == 3.0 + 6.0
    assert module.table == 1.0 and module.inner() == 1.0


# ---- what would do nothing -------------------------------------------------------------------


@pytest.mark.parametrize(
    "clusters", [(1, 40), (40, 1), (7, 6), (6, 6), (9, 2), (100, 100)], ids=str
)
def test_clusters_that_do_not_fit_the_tokens_are_refused(clusters: tuple[int, int]) -> None:
    model = timm_vit(dynamic_img_size=False)  # 6x6 tokens
    with pytest.raises(ValueError, match="fewer than the 6x6 tokens .*in rows and in columns"):
        expedite(model, alpha=1, clusters=clusters)
    assert not is_expedited(model)
    for varying in (timm_vit(), transformers_vit()):
        with pytest.warns(UserWarning, match="no fewer, in rows .* the 6x6 tokens of the im"):
            expedite(varying, alpha=1, clusters=clusters)


def test_settings_that_spare_nearly_nothing_are_told() -> None:
    with pytest.warns(UserWarning, match="spare VisionTransformer 4.2 % of what its blocks do"):
        expedite(timm_vit(), alpha=3, clusters=(6, 5))
    with pytest.warns(UserWarning, match="spare VisionTransformer 0.7 % .*: merge before earlier"):
        expedite(timm_vit(), Reduction(Merge(3, 0.95)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expedite(timm_vit(), Reduction(Merge(3, 0.95, rounds=1)))
        expedite(timm_vit(), Reduction(Merge(1, 0.8)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vit",), "model must be a torch.nn.Module, got str"),
        ((timm_vit(), 9), r"reduction must be a Reduction \(alpha .* by keyword\), got 9"),
        ((timm_vit(), (8, 8)), "reduction must be a Reduction"),
        ((timm_vit(), clustered(1, (4, 3)).cluster), r"Reduction\(Cluster\(...\)\), got Cluster"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expedite(*arguments)
    with pytest.raises(ValueError, match="expedite needs a reduction, or alpha and clusters"):
        expedite(timm_vit(), topk=3)


@pytest.mark.parametrize(
    "keywords", [{"alpha": 1}, {"clusters": (2, 2)}, {"topk": 3}, {"reconstruction": "replace"}]
)
def test_settings_are_given_in_one_way(keywords: dict[str, Any]) -> None:
    (name,) = keywords
    with pytest.raises(ValueError, match=f"a reduction or keywords, got a reduction and {name}"):
        expedite(timm_vit(), clustered(1, (4, 3)), **keywords)


@pytest.mark.parametrize("outputs", [3, "all", {"a": 1}, [9], [1.5]])
def test_outputs_are_numbers_of_blocks(outputs: Any) -> None:
    with pytest.raises(ValueError, match="outputs must be (a collection of )?numbers of blocks"):
        expedite(timm_vit(), alpha=1, clusters=(4, 3), outputs=outputs)
    model = expedite(timm_vit(), alpha=1, clusters=(4, 3), outputs=np.array([3]))
    assert is_expedited(model)


class Wrapped(nn.Module):
    """Somebody's wrapper around a block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.block(*args, **kwargs)


def test_wrapped_blocks_merge_without_groups() -> None:
    model = transformers_dinov2()
    model.encoder.layer = nn.ModuleList(map(Wrapped, model.encoder.layer))
    with pytest.raises(ValueError, match="rounds must be 0 for .* block 1, Wrapped, has no norm"):
        expedite(model, Reduction(Merge(1, 0.7, rounds=1)))
    assert expedite(model, budget=0.5, size=(96, 96)).reduction.steps[0].rounds == 0
    assert model(torch.randn(1, 3, 96, 96)).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("call", [restore, is_expedited])
def test_other_verbs_take_modules_alone(call: Any) -> None:
    with pytest.raises(ValueError, match="model must be a torch.nn.Module, got str"):
        call("vit")

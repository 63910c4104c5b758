"""Expediting third-party encoders: every family against its pass composed by hand."""

from __future__ import annotations

import copy
import io
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from family_cases import CASES, SEQUENCES
from family_cases.case import Case, images
from family_cases.plain import timm_vit, transformers_vit
from settings_cases import clustered
from torch import Tensor, nn

from expedite_d2 import expedite, restore
from expedite_d2.adapters.override import first_of
from expedite_d2.reducers import Reduction, clustering_of, reconstruct
from expedite_d2.reducers.state import state_of
from expedite_d2.tools.calibrate import calibrate

families = pytest.mark.parametrize("case", SEQUENCES.values(), ids=SEQUENCES)
ONE_EACH = ["timm vit", "timm beit, own bias", "transformers vit", "transformers dpt"]
ONE_EACH += ["transformers beit, both biases", "transformers dinov3", "timm eva, mixed"]
ONE_EACH += ["transformers yolos"]
some_families = pytest.mark.parametrize("case", [CASES[name] for name in ONE_EACH], ids=ONE_EACH)


def block_outputs(case: Case, model: Any, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The model's output, and what a hook on each block sees go out, alone or in a list."""
    seen: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, args, out: seen.append(first_of(out)))
        for block in case.blocks(model)
    ]
    with torch.no_grad():
        out = case.run(model, x)
    for hook in hooks:
        hook.remove()
    return out, seen


def attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {name: dict(vars(module)) for name, module in model.named_modules()}


@families
@pytest.mark.parametrize(
    "reduction",
    [
        clustered(2, (4, 3)),
        clustered(0, (0.5, 0.75), iterations=1, mode="replace", temperature=0.1),
        clustered(3, (3, 5), neighbourhood=3, topk=2),
    ],
    ids=["residual", "replace from the first block on", "last block alone"],
)
def test_expedite_equals_hand_composition(case: Case, reduction: Reduction) -> None:
    model, x = case.make(), case.images()
    expected = case.by_hand(model, x, reduction)
    assert expedite(model, reduction) is model
    out, seen = block_outputs(case, model, x)
    assert len(seen) == 4
    for ours, theirs in zip(seen, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, case.normalised(model, expected[-1]), rtol=1e-5, atol=1e-5)


@families
def test_expedite_twice_is_the_last_alone(case: Case) -> None:
    model, x = case.make(), case.images()
    with torch.no_grad():
        expected = case.run(expedite(copy.deepcopy(model), alpha=2, clusters=(4, 3)), x)
        expedite(expedite(model, alpha=0, clusters=(2, 2), topk=1), alpha=2, clusters=(4, 3))
        assert torch.equal(case.run(model, x), expected)
        assert model.reduction == clustered(2, (4, 3))


@families
def test_expedite_leaves_small_images_alone(case: Case) -> None:
    model, x = case.make(), case.images()
    reduction = clustered(1, (0.99, 0.99), topk=2)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = case.run(model, x)
        expedite(model, alpha=1, clusters=(3, 3))
        model.reduction = reduction  # beyond what `expedite` lets through for fixed sizes
        assert torch.equal(case.run(model, x), plain)


def test_small_image_warns() -> None:
    model = expedite(timm_vit(), alpha=1, clusters=(10, 10))
    with pytest.warns(UserWarning, match="no more tokens than the 10x10 cluster grid"):
        model(torch.randn(1, 3, 24, 24))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@some_families
def test_expedited_gradients_survive_checkpointing(case: Case) -> None:
    model, x = expedite(case.make(), alpha=1, clusters=(4, 3)), case.images()
    weights = torch.randn(16, generator=torch.Generator().manual_seed(2))

    def gradients() -> list[Tensor]:
        model.zero_grad()
        (case.run(model, x) @ weights).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    assert len(expected) > 50 and all(g.isfinite().all() for g in expected)
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    for ours, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_expedited_refuses_reentrant_checkpointing() -> None:
    model = expedite(timm_vit(), alpha=1, clusters=(4, 3)).train()
    x = torch.utils.checkpoint.checkpoint(
        model.blocks, model._pos_embed(model.patch_embed(torch.randn(1, 3, 32, 32))),
        use_reentrant=True,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        x.sum().backward()


def test_compiled_model_notices_every_change() -> None:
    torch.compiler.reset()
    model, x = timm_vit(depth=2), CASES["timm vit"].images()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        plain = compiled(x)
        expedite(model, alpha=1, clusters=(4, 3))
        torch.testing.assert_close(compiled(x), model(x))
        calibrate(model, [x])
        calibrate(compiled, [x])
        torch.testing.assert_close(compiled(x), model(x))
        restore(compiled)
        assert torch.equal(compiled(x), plain)


def test_expedited_runs_in_threads() -> None:
    model = expedite(timm_vit(), alpha=2, clusters=(4, 3))
    inputs = [torch.randn(1, 3, h, w) for h, w in ((24, 32), (32, 24), (48, 16), (16, 48))] * 4
    expected = [model(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for ours, theirs in zip(pool.map(model, inputs), expected, strict=True):
            assert torch.equal(ours, theirs)


# ---- outputs inside the span ------------------------------------------------------------------


def test_outputs_say_which_blocks_are_reconstructed() -> None:
    case = CASES["timm vit"]
    model, x = case.make(), case.images()
    tokens, clusters = 1 + 8 * 10, 1 + 4 * 3
    reads = {None: [tokens] * 4, (2,): [tokens, clusters, tokens, tokens]}
    reads |= {(0,): [tokens, clusters, clusters, tokens], (): [tokens] + [clusters] * 3}
    for outputs, lengths in reads.items():
        expedite(model, alpha=1, clusters=(4, 3), outputs=outputs)
        _, seen = block_outputs(case, model, x)
        assert [len(out[0]) for out in seen] == lengths
        for out in seen[1:]:
            found = clustering_of(out)
            assert found is not None and found[0].shape == (3, 4, 3, 16)
    expected = case.by_hand(restore(model), x, clustered(1, (4, 3)))[-1][:, 1:].unflatten(
        1, (8, 10)
    )
    torch.testing.assert_close(reconstruct(*clustering_of(seen[-1])), expected)
    assert clustering_of(seen[0]) is None and clustering_of(x) is None


def test_what_blocks_return_can_be_saved_and_loaded() -> None:
    model, file = expedite(transformers_vit(), alpha=1, clusters=(3, 3)), io.BytesIO()
    with torch.no_grad():
        states = model(images(24, 24), output_hidden_states=True).hidden_states
    assert state_of(states[2]) is not None
    torch.save(states, file)
    file.seek(0)
    for read, state in zip(torch.load(file), states, strict=True):
        assert torch.equal(read, state) and state_of(read) is None


@pytest.mark.parametrize("alpha", [0, 2])
def test_transformers_records_full_resolution(alpha: int) -> None:
    model, x = transformers_vit(), torch.randn(2, 3, 24, 24)
    plain = model(x, output_hidden_states=True).hidden_states  # installs its hooks, before ours
    for fresh in (
        expedite(model, alpha=alpha, clusters=(4, 3)),
        expedite(transformers_vit(), alpha=alpha, clusters=(4, 3)),
    ):
        states = fresh(x, output_hidden_states=True).hidden_states
        assert [state.shape for state in states] == [state.shape for state in plain]
        for ours, theirs in zip(states[: alpha + 1], plain, strict=False):
            assert torch.equal(ours, theirs)


def test_dpt_reads_full_resolution() -> None:
    from transformers import DPTConfig, DPTForDepthEstimation

    torch.manual_seed(0)
    config = DPTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        image_size=32, patch_size=4, backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
    )  # fmt: skip
    model, x = DPTForDepthEstimation(config).eval(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        plain = model(x).predicted_depth
        expedited = expedite(model, alpha=1, clusters=(7, 7))(x).predicted_depth
    assert expedited.shape == plain.shape and not torch.equal(expedited, plain)
    assert (expedited - plain).abs().mean() < 0.1 * plain.abs().mean()


def test_timm_intermediates_are_full_resolution() -> None:
    model, x = expedite(timm_vit(), alpha=1, clusters=(4, 3)), torch.randn(2, 3, 32, 40)
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert [tuple(m.shape) for m in maps] == [(2, 16, 8, 10)] * 4


# ---- what is refused, and what is found -------------------------------------------------------


def test_expedite_finds_the_encoder_inside() -> None:
    class Segmenter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = timm_vit(), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder.forward_features(x))

    model, x = Segmenter(), torch.randn(1, 3, 32, 40)
    plain = model(x)
    expedite(model, alpha=2, clusters=(4, 3))
    assert model.encoder.reduction == clustered(2, (4, 3)) and not hasattr(model, "reduction")
    assert calibrate(model, [x]) == model.encoder.reduction
    assert model.encoder.reduction.cluster.temperature > 0
    assert not torch.equal(model(x), plain) and torch.equal(restore(model)(x), plain)


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (nn.Linear(2, 2), {}, "Linear holds no encoder that can be expedited: it has no att"),
        (nn.ModuleList([timm_vit(), timm_vit()]), {}, "holds 2 encoders, of which .*: 0, 1"),
        (timm_vit(), {"alpha": 4}, "alpha must be less than the 4 blocks of VisionTr.*, got 4"),
        (timm_vit(), {"alpha": -1}, r"at \(alpha\) must be an integer >= 0, got -1"),
        (timm_vit(), {"clusters": (0, 3)}, r"grid \(clusters\) must be two sizes"),
        (timm_vit(), {"neighbourhood": 4}, "neighbourhood must be odd, got 4"),
        (timm_vit(), {"outputs": [2, 4]}, r"outputs must be numbers of blocks, 0 to 3, got"),
        (
            timm_vit(dynamic_img_size=False),
            {"clusters": (6, 6)},
            "fewer than the 6x6 tokens of the encoder's images, .*, got 6x6",
        ),
    ],
)
def test_expedite_refuses(model: nn.Module, settings: dict[str, Any], message: str) -> None:
    before = attributes(model)
    with pytest.raises(ValueError, match=message):
        expedite(model, **{"alpha": 1, "clusters": (4, 3), **settings})
    assert attributes(model) == before


def test_expedited_refuses_attention_masks() -> None:
    model = expedite(timm_vit(), alpha=1, clusters=(4, 3))
    with pytest.raises(ValueError, match="takes no attention mask"):
        model(torch.randn(1, 3, 24, 24), attn_mask=torch.ones(1, 1, 37, 37))


def test_expedited_says_when_the_grid_is_lost() -> None:
    model = expedite(timm_vit(), alpha=1, clusters=(4, 3))
    with pytest.raises(
        RuntimeError, match="block 1 of an expedited VisionTrans.* without their grid"
    ):
        model.blocks(torch.randn(1, 37, 16))
    dropped = expedite(timm_vit(patch_drop_rate=0.5), alpha=1, clusters=(4, 3)).train()
    with pytest.raises(RuntimeError, match="dropped patches"):
        dropped(torch.randn(1, 3, 24, 24))

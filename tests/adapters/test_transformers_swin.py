"""Expediting transformers' Swin, first and second version, against this package's own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from family_cases.case import images, randomised
from settings_cases import clustered
from swin_names import official_names
from torch import Tensor, nn
from transformers import (
    DonutSwinConfig,
    DonutSwinModel,
    DPTConfig,
    DPTForDepthEstimation,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    MaskFormerSwinConfig,
    OneFormerConfig,
    OneFormerForUniversalSegmentation,
    SwinBackbone,
    SwinConfig,
    SwinForImageClassification,
    SwinForMaskedImageModeling,
    SwinModel,
    Swinv2Backbone,
    Swinv2Config,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.maskformer.modeling_maskformer_swin import MaskFormerSwinBackbone

from expedite_d2 import expedite, restore
from expedite_d2.adapters.core import expedited_encoders
from expedite_d2.d2.modeling.backbone.swin import ExpeditedSwinTransformer
from expedite_d2.reducers import Reduction

SIZE: dict[str, Any] = {
    "embed_dim": 16,
    "depths": [1, 1, 6, 1],
    "num_heads": [1, 2, 2, 4],
    "window_size": 6,
}
STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"], "image_size": 192}
# Maps of 12x12, 13x17 and 5x9 tokens in the third stage: whole, ragged and less than a window.
SIZES = [(192, 192), (201, 270), (70, 134)]


def swin(**changes: Any) -> Any:
    return randomised(SwinBackbone, SwinConfig(**SIZE, **STAGES, **changes))


def maskformer_swin() -> Any:
    return randomised(MaskFormerSwinBackbone, MaskFormerSwinConfig(**SIZE, **STAGES))


def swin_v2() -> Any:
    # Windows of six tokens at every stage; in the third, coordinates are measured in smaller ones.
    changes = {"image_size": 768, "pretrained_window_sizes": [0, 0, 4, 0]}
    model = randomised(Swinv2Backbone, Swinv2Config(**SIZE, **{**STAGES, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "logit_scale" in name:
                parameter.uniform_(1.0, 4.0)
    return model


def ours(theirs: Any, reduction: Reduction | None = None) -> ExpeditedSwinTransformer:
    """This package's own Swin with the weights and settings of transformers'."""
    v2: dict[str, Any] = {}
    if isinstance(theirs, Swinv2Backbone):
        v2 = {"version": 2, "pretrained_window_sizes": theirs.config.pretrained_window_sizes}
    model = ExpeditedSwinTransformer(**SIZE, **v2, reduction=reduction).eval()
    if v2:  # transformers' gives the stages' outputs as they are
        for i in range(4):
            setattr(model, f"norm{i}", nn.Identity())
    model.to(next(theirs.parameters()).dtype).load_state_dict(official_names(theirs.state_dict()))
    return model


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        out = model(x)
    return list(out.values()) if isinstance(out, dict) and "res2" in out else list(out.feature_maps)


@pytest.mark.parametrize("make", [swin, maskformer_swin, swin_v2])
@pytest.mark.parametrize(
    "reduction",
    [
        clustered(4, (4, 4)),
        clustered(2, (3, 3), mode="replace", temperature=0.2),
        clustered(0, (4, 4), iterations=2, neighbourhood=3),
        clustered(7, (0.5, 0.5)),
        clustered(3, (1, 1), topk=1),
        clustered(8, (5, 5)),
    ],
    ids=["odd block", "whole stage", "first stage", "last of a stage", "one cell", "last stage"],
)
def test_backbones_equal_ours(make: Callable[[], Any], reduction: Reduction) -> None:
    # In float32 the two round differently, and a token's nearest centres may then be others.
    theirs = make().double()
    model = ours(theirs, reduction)
    assert expedite(theirs, reduction) is theirs
    for size in SIZES:
        x = images(*size).double()
        for got, expected in zip(run(theirs, x), run(model, x), strict=True):
            # transformers computes SwinV2's coordinates in float32.
            tolerance = 2e-5 if make is swin_v2 else 1e-6
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def classifier(model: Any, config: Any, depth: int = 4) -> Any:
    settings = {**SIZE, "depths": [1, 1, depth], "num_heads": [1, 2, 2], "drop_path_rate": 0.0}
    return randomised(model, config(**settings), add_pooling_layer=False)


@pytest.mark.parametrize("model", [(SwinModel, SwinConfig), (DonutSwinModel, DonutSwinConfig)])
def test_classifiers_shift_nothing_in_a_map_of_one_window(model: Any) -> None:
    x = images(96, 144)  # 6x9 tokens in the third stage

    def shifts(alpha: int, **kwargs: Any) -> list[tuple[int, ...]]:
        encoder = expedite(classifier(*model), alpha=alpha, clusters=(4, 4))
        seen = []
        roll = torch.roll
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(
                torch, "roll", lambda x, shifts, dims: seen.append(shifts) or roll(x, shifts, dims)
            )
            encoder(x, **kwargs)
            small = list(seen)
            encoder(images(144, 192), **kwargs)  # 9x12
        return small, seen[len(small) :]

    small, large = shifts(2)
    # Of four blocks two shift: by half a window of clusters there, and back.
    assert small == [] and large == [(-2, -2), (2, 2)] * 2
    if model[0] is SwinModel:
        assert shifts(2, always_partition=True) == ([(-2, -2), (2, 2)] * 2,) * 2


def test_windows_of_clusters_are_no_smaller_on_a_small_map() -> None:
    encoder = expedite(classifier(SwinModel, SwinConfig, depth=1), alpha=2, clusters=(4, 4))
    x = images(64, 108)  # 4x7 tokens and 3x5 clusters in the third stage, which shifts nothing
    with torch.no_grad():
        out, backbone = encoder(x), encoder(x, always_partition=True)
    assert torch.equal(out.last_hidden_state, backbone.last_hidden_state)


BACKBONE = SwinConfig(**SIZE, **STAGES)


def maskformer() -> Any:
    config = MaskFormerConfig(backbone_config=BACKBONE, mask_feature_size=32, fpn_feature_size=32)
    return MaskFormerForInstanceSegmentation(config)


def upernet() -> Any:
    config = UperNetConfig(backbone_config=BACKBONE, hidden_size=16, auxiliary_in_channels=64)
    return UperNetForSemanticSegmentation(config)


def dpt() -> Any:
    backbone = Swinv2Config(**SIZE, **{**STAGES, "image_size": 768})
    config = DPTConfig(
        backbone_config=backbone, neck_hidden_sizes=[16, 32, 64, 128], fusion_hidden_size=16,
        reassemble_factors=[], readout_type="ignore",
    )  # fmt: skip
    return DPTForDepthEstimation(config)


def first(out: Any) -> Tensor:
    return next(value for value in out.values() if isinstance(value, Tensor))


@pytest.mark.parametrize("make", [maskformer, upernet, dpt])
def test_models_of_a_task_run_on_clusters(make: Callable[[], Any]) -> None:
    model, x = randomised(make), images(192, 192, 2)
    with torch.no_grad():
        plain = first(model(pixel_values=x))
        expedite(model, alpha=4, clusters=(4, 4))
        fast = first(model(pixel_values=x))
        assert fast.shape == plain.shape and fast.isfinite().all() and not torch.equal(fast, plain)
        assert torch.equal(first(restore(model)(pixel_values=x)), plain)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: SwinForImageClassification(BACKBONE), "swin"),
        (lambda: SwinForMaskedImageModeling(BACKBONE), "swin"),
        (
            lambda: OneFormerForUniversalSegmentation(OneFormerConfig(backbone_config=BACKBONE)),
            "model.pixel_level_module.encoder.swin",
        ),
        (
            lambda: GroundingDinoForObjectDetection(GroundingDinoConfig(backbone_config=BACKBONE)),
            "model.backbone.conv_encoder.model.swin",
        ),
    ],
)
def test_models_hold_a_swin(make: Callable[[], Any], name: str) -> None:
    with torch.device("meta"):
        model = make()
    assert list(expedited_encoders(expedite(model, alpha=4, clusters=(4, 4)))) == [name]


@pytest.mark.parametrize("make", [swin, maskformer_swin, swin_v2])
def test_backbones_are_copied_and_pickled(make: Callable[[], Any]) -> None:
    model, x = expedite(make(), alpha=4, clusters=(4, 4)), images(*SIZES[1])
    expected = run(model, x)
    others = [copy.deepcopy(model)]
    if make is not swin:  # SwinBackbone has local functions for hooks, which cannot be pickled
        others.append(pickle.loads(pickle.dumps(model)))
    for other in others:
        assert all(map(torch.equal, run(other, x), expected))
        assert not torch.equal(run(restore(other), x)[2], expected[2])
        assert all(map(torch.equal, run(model, x), expected))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("make", [swin, maskformer_swin, swin_v2])
def test_gradient_checkpointing_changes_no_gradient(make: Callable[[], Any]) -> None:
    if make is swin and "__call__" in vars(GradientCheckpointingLayer):
        pytest.skip("this transformers checkpoints Swin's blocks within its stages: state is lost")
    model, x = expedite(make(), alpha=4, clusters=(4, 4)).train(), images(*SIZES[1])

    def gradients() -> list[Tensor | None]:
        model.zero_grad()
        sum(out.square().mean() for out in model(x).feature_maps).backward()
        return [parameter.grad for parameter in model.parameters()]

    for module in model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for got, expected in zip(gradients(), plain, strict=True):
        if expected is not None:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 9}, "alpha must be less than the 9 blocks of Swin"),
        ({"clusters": (6, 6)}, "clusters must be smaller than the 6x6 window, got 6x6"),
        ({"clusters": (4, 3)}, "as many rows as columns in the square windows .*, got 4x3"),
        ({"outputs": ()}, "outputs must not be empty: a stage of Swin.* ends"),
    ],
)
@pytest.mark.parametrize("make", [swin, swin_v2])
def test_settings_that_do_not_fit_are_refused(
    make: Callable[[], Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        expedite(make(), **{"alpha": 1, "clusters": (4, 4), **settings})


def test_windows_are_those_of_the_stage() -> None:
    """SwinV2's are no larger than a stage's map of the configured image: 6, 6, 6 and 3."""
    config = Swinv2Config(**SIZE, **{**STAGES, "image_size": 96})
    expedite(randomised(Swinv2Backbone, config), alpha=4, clusters=(5, 5))
    model = randomised(Swinv2Backbone, config)
    with pytest.raises(ValueError, match="clusters must be smaller than the 3x3 window, got 5x5"):
        expedite(model, alpha=8, clusters=(5, 5))
    seen = []
    last = model.encoder.layers[3].blocks[0].output.dense
    last.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    out = run(expedite(model, alpha=8, clusters=(2, 2)), images(192, 192))
    assert out[3].shape[2:] == (6, 6) and seen == [16]

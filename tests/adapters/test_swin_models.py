"""Swins of torchvision, timm and transformers as people use them, on clusters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torchvision
from family_cases import CASES
from family_cases.case import images
from family_cases.swin import timm_swin
from settings_cases import clustered
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from expedite_d2 import expedite, restore
from expedite_d2.adapters.registry import find_encoder
from expedite_d2.ops import token_spread
from expedite_d2.reducers import Merge, Reduction
from expedite_d2.tools.calibrate import calibrate


def timm_features(**changes: Any) -> Any:
    return timm.create_model("swin_tiny_patch4_window7_224", features_only=True, **changes)


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (torchvision.models.swin_t, (224, 224)),
        (torchvision.models.swin_v2_t, (128, 192)),
        (torchvision.models.video.swin3d_t, (6, 96, 128)),
        (timm_features, (224, 224)),
        (partial(timm_features, feature_cls="getter"), (224, 224)),
        (partial(timm_features, feature_cls="hook"), (224, 224)),
        (partial(timm.create_model, "swin_s3_tiny_224"), (224, 224)),
    ],
)
def test_models_run_on_clusters_and_are_restored(
    make: Callable[[], Any], size: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(1, 3, *size)

    def run() -> list[Tensor]:
        out = model(x)
        return out if isinstance(out, list) else [out]

    with torch.no_grad():
        plain = run()
        expedite(model, alpha=5, clusters=(0.6667, 0.6667))
        for fast, slow in zip(run(), plain, strict=True):
            assert fast.shape == slow.shape and fast.isfinite().all()
        assert not torch.equal(run()[-1], plain[-1])
        restore(model)
        assert all(map(torch.equal, run(), plain))


def test_windows_are_those_of_the_stage() -> None:
    """Swin-S3 has larger ones in its third stage; windows are no larger than a stage's map."""
    settings = {"window_size": (6, 6, 8), "img_size": (192, 96)}  # 12x6 tokens in the third stage
    model = timm_swin(SwinTransformer, **settings)
    with pytest.raises(ValueError, match="clusters must be smaller than the 6x6 window, got 7x5"):
        expedite(model, alpha=1, clusters=(7, 5))
    expedite(model, alpha=2, clusters=(7, 5))
    with pytest.raises(ValueError, match="clusters must be smaller than the 8x6 window, got 7x7"):
        expedite(model, alpha=2, clusters=(7, 7))
    rolled: list[tuple[int, ...]] = []
    roll = torch.roll
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(
            torch, "roll", lambda x, shifts, dims: rolled.append(shifts) or roll(x, shifts, dims)
        )
        model(images(192, 96))
    assert rolled == [(-3, 0), (3, 0)] * 3  # columns are one window, and stay


def test_timm_may_change_its_size_afterwards() -> None:
    def resized(model: Any) -> Any:
        model.set_input_size((288, 240))  # and windows of 9x7 for 6x6
        return model

    x, settings = images(288, 240), clustered(3, (0.5, 0.5))
    make = partial(timm_swin, SwinTransformer, img_size=(192, 192))
    with torch.no_grad():
        before, after = resized(expedite(make(), settings)), expedite(resized(make()), settings)
        assert before.layers[2].blocks[0].window_size == (9, 7)
        assert torch.equal(before(x), after(x))
        assert torch.equal(restore(before)(x), restore(after)(x))


def test_families_tell_which_attention_writes_out_its_matrix() -> None:
    expected = {"transformers swin": False, "transformers swin, eager": True}
    eager = ["official swin", "transformers maskformer swin", "transformers swin v2"]
    eager += ["torchvision swin", "torchvision swin3d", "timm swin v2", "video swin"]
    for name, writes in {**expected, **dict.fromkeys(eager, True)}.items():
        family, encoder = find_encoder(CASES[name].make())
        assert family is not None and family.eager(encoder) is writes
    for name in ("timm swin", "timm swin features"):
        family, encoder = find_encoder(CASES[name].make())
        for fused in (True, False):
            for block in CASES[name].blocks(encoder):
                block.attn.fused_attn = fused
            assert family is not None and family.eager(encoder) is not fused


def test_clips_are_calibrated_frame_by_frame() -> None:
    """In windows of one frame, those of all frames are one batch."""
    case = CASES["torchvision swin3d"]
    model = expedite(case.make(), clustered(case.alpha, case.clusters))
    clip = torch.randn(1, 3, 6, 96, 96)
    kept = []
    model.features[4][2].register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    settings = calibrate(model, [clip], correction=False)
    spread = token_spread(kept[0][0], case.clusters, window=(6, 6))
    assert len(spread) == 3  # two frames are one token
    assert settings.cluster.temperature == pytest.approx(32 / spread.mean().item(), rel=1e-5)
    assert calibrate(model, [clip] * 4).correction is not None


@pytest.mark.parametrize("name", ["timm swin", "timm swin v2"])
def test_gradients_survive_checkpointing(name: str) -> None:
    case = CASES[name]
    model = expedite(case.make(), clustered(case.alpha, case.clusters)).train()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(case.images()).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    assert len(expected) > 50
    model.set_grad_checkpointing()
    for got, plain in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())


@pytest.mark.parametrize(
    "reduction",
    [
        clustered(1, (4, 4)),
        Reduction(Merge((1, 2), 0.7)),
        Reduction(Merge((1, 2), 0.7, rounds=1)),
    ],
    ids=["clusters", "merging", "grouped"],
)
def test_a_classifier_needs_no_map_at_full_resolution(reduction: Reduction) -> None:
    """As torchvision's VisionTransformer with SWAG's weights, which reads the class token alone."""
    model, x = CASES["torchvision vit"].make(), images(32, 32)
    seen: list[int] = []
    for block in model.encoder.layers:
        block.register_forward_hook(lambda _, args, out: seen.append(out.shape[1]))
    with torch.no_grad():
        expected = expedite(model, reduction)(x)
        assert seen == [65] * 4
        seen.clear()
        out = expedite(model, reduction, outputs=())(x)
    assert torch.equal(out, expected)  # the class token passes by
    assert seen[0] == 65 and seen[-1] < 65


def test_transformers_v2_runs_a_fused_kernel_unless_asked_for_its_matrix() -> None:
    case = CASES["transformers swin v2"]
    model = expedite(case.make().double(), clustered(case.alpha, case.clusters))
    for name, parameter in model.named_parameters():
        if "logit_scale" in name:
            nn.init.uniform_(parameter, 1.0, 5.0)
    x = images(192, 192).double()
    with torch.no_grad():
        fused, eager = model(x), model(x, output_attentions=True)
    assert eager.attentions[2][case.alpha - 2].shape[-2:] == (16, 16)
    torch.testing.assert_close(
        fused.last_hidden_state, eager.last_hidden_state, rtol=1e-10, atol=1e-10
    )

"""RF-DETR: the windows of an image are reduced one by one, and are joined in some layers."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from family_cases import CASES
from family_cases.case import images
from family_cases.rotary import rf_detr
from torch import Tensor

from expedite_d2 import expedite
from expedite_d2.reducers import Merge, Reduction, state_of
from expedite_d2.tools.describe import describe


@torch.no_grad()
def test_global_attention_sees_the_groups_of_all_windows() -> None:
    case = CASES["transformers rf-detr"]
    model = expedite(case.make(), Reduction(Merge(1, 0.7, rounds=1)))
    layer: Any = next(x for x in case.blocks(model)[1:] if x.global_attention)  # type: ignore
    seen: dict[str, Any] = {}
    layer.norm1.register_forward_hook(lambda _, args, out: seen.update(x=args[0], normed=out))
    layer.attention.register_forward_hook(lambda _, args, out: seen.update(out=out[0]))
    layer.register_forward_hook(lambda _, args, out: seen.update(state=state_of(out)))
    case.run(model, case.images())

    groups = seen["state"].layout.groups
    tokens = groups.places.shape[1]  # of a window, with its class token
    assert seen["x"].shape[:2] == (3, 4 * tokens)
    assert seen["normed"].shape[:2] == (3, 4 * groups.total)
    for image in range(3):
        means: list[Tensor] = []
        for window in range(4):
            places = groups.places[4 * image + window]
            own = seen["x"][image, window * tokens : (window + 1) * tokens]
            means += [own[places == group].mean(0) for group in range(groups.total)]
        normed = torch.nn.functional.layer_norm(
            torch.stack(means), (16,), layer.norm1.weight, layer.norm1.bias, layer.norm1.eps
        )
        torch.testing.assert_close(seen["normed"][image], normed, rtol=1e-5, atol=1e-5)
        attended = type(layer.attention).forward(layer.attention, normed[None])[0][0]
        for window in range(4):
            places = groups.places[4 * image + window].long() + window * groups.total
            ours = seen["out"][image, window * tokens : (window + 1) * tokens]
            torch.testing.assert_close(ours, attended[places], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_detector_on_an_expedited_backbone() -> None:
    backbone = rf_detr().config
    config = transformers.RfDetrConfig(
        backbone_config=backbone, d_model=16, num_queries=4, decoder_layers=1,
        decoder_self_attention_heads=2, decoder_cross_attention_heads=2, decoder_ffn_dim=16,
        group_detr=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.RfDetrForObjectDetection(config).eval()
    x = images(64, 64, batch=2)
    plain = model(x).pred_boxes
    boxes = expedite(model, alpha=1, clusters=(0.5, 0.5))(x).pred_boxes
    assert boxes.shape == plain.shape and boxes.isfinite().all() and not torch.equal(boxes, plain)


def test_images_are_whole_windows() -> None:
    model = rf_detr(image_size=52)  # 13 x 13 patches, windows of 6 x 6 of them
    assert describe(model).size == (48, 48)

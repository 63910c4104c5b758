"""Multiply-adds: operators by hand, torch's own counter, and the paper's backbones."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from expedite_d2 import ops
from expedite_d2.config import load_config
from expedite_d2.d2 import build_backbone, build_model
from expedite_d2.evaluation import cost
from expedite_d2.models.meta_arch.masked_decoder import predict_masks

TINY = [
    "MODEL.SWIN.EMBED_DIM", "16",
    "MODEL.SWIN.DEPTHS", "[1, 1, 4, 1]",
    "MODEL.SWIN.NUM_HEADS", "[1, 2, 4, 8]",
    "MODEL.MASK_FORMER.DEC_LAYERS", "3",
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", "1",
    "MODEL.EXPEDITE.ALPHA", "3",
]  # fmt: skip
EXPEDITED = "configs/scenes/panoptic/mask2former_swin_mini_expedited.yaml"
PLAIN = "configs/scenes/panoptic/mask2former_swin_mini.yaml"


class Call(nn.Module):
    """A function of the images as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.function(images)


def count(function, height: int, width: int) -> dict[str, float]:
    module = function if isinstance(function, nn.Module) else Call(function)
    return dict(cost.analyse(module.to("meta"), height, width).by_operator())


def brute_force_pairs(grid, clusters, window, neighbourhood) -> int:
    """Candidates of every token, straight from the definition."""
    pairs = 0
    for y in range(grid[0]):
        for x in range(grid[1]):
            per_axis = []
            for position, length, side, cells in zip((y, x), grid, window, clusters, strict=True):
                start = position // side * side
                real = min(side, length - start)
                home = (position - start) * cells // side
                # A cell exists where it covers a real token.
                existing = [i for i in range(cells) if i * side // cells < real]
                per_axis.append(sum(abs(i - home) <= neighbourhood // 2 for i in existing))
            pairs += math.prod(per_axis)
    return pairs


@pytest.mark.parametrize(
    ("grid", "clusters", "window", "neighbourhood"),
    [
        ((24, 24), (8, 8), (12, 12), 5),
        ((25, 31), (8, 5), (12, 12), 3),
        ((7, 9), (3, 4), (7, 9), 1),
        ((13, 5), (5, 3), (8, 8), 7),
    ],
)
def test_pairs_follow_the_definition(grid, clusters, window, neighbourhood):
    assert cost.candidate_pairs(grid, clusters, window, neighbourhood) == brute_force_pairs(
        grid, clusters, window, neighbourhood
    )
    everything = 2 * max(clusters) + 1
    assert cost.match_pairs(grid, clusters, window) == brute_force_pairs(
        grid, clusters, window, everything
    )


@pytest.mark.parametrize("window", [None, (8, 8)])
def test_own_operators_by_formula(window):
    grid, channels, clusters = (24, 20), 3, (5, 4)

    def hourglass(images: torch.Tensor) -> torch.Tensor:
        tokens = images.permute(0, 2, 3, 1).contiguous()
        spread = ops.token_spread(tokens, clusters, window=window, neighbourhood=3)
        common = {"window": window, "temperature": 8.0, "spread": spread}
        centres = ops.token_cluster(tokens, clusters, iterations=2, neighbourhood=3, **common)
        indices, weights = ops.token_match(tokens, centres, clusters, topk=4, **common)
        return ops.token_reconstruct(centres, indices, weights, tokens=tokens, centres=centres)

    tokens = math.prod(grid) * channels
    near = brute_force_pairs(grid, clusters, window or grid, 3) * channels
    every = brute_force_pairs(grid, clusters, window or grid, 99) * channels
    assert count(hourglass, *grid) == {
        "token_spread": tokens + near,
        "token_cluster": tokens + 2 * 2 * near,
        "token_match": every,
        "token_reconstruct": 4 * tokens,
    }


@pytest.mark.parametrize("automatic", [False, True])
def test_reduction_costs_what_its_parts_cost(automatic):
    settings = (2, 3, 4, 8.0, automatic)

    def reduction(images: torch.Tensor) -> torch.Tensor:
        tokens = images.permute(0, 2, 3, 1).contiguous()
        return torch.ops.expedite_d2.token_reduce(tokens, (5, 4), (8, 8), *settings)[1]

    grid, channels = (24, 20), 3
    near = brute_force_pairs(grid, (5, 4), (8, 8), 3) * channels
    every = brute_force_pairs(grid, (5, 4), (8, 8), 99) * channels
    pooled = math.prod(grid) * channels
    spread = pooled + near if automatic else 0
    assert count(reduction, *grid) == {"token_reduce": spread + pooled + 2 * 2 * near + every}


def test_attention_products_and_convolutions_by_hand():
    def attention(images: torch.Tensor) -> torch.Tensor:
        keys = images[..., :5, :]
        return nn.functional.scaled_dot_product_attention(images, keys, keys[..., :4])

    # 3 heads, 8 queries, 5 keys, 6 and 4 channels.
    assert count(attention, 8, 6) == {"scaled_dot_product_attention": 3 * 8 * 5 * (6 + 4)}
    # A matrix times a batch of them.
    assert count(lambda x: x[0, 0] @ x.transpose(2, 3), 8, 6) == {"matmul": 3 * 8 * 8 * 6}
    assert count(nn.Conv2d(3, 4, 3, stride=2, padding=1), 8, 6) == {"conv": 4 * 3 * 9 * 4 * 3}
    assert count(nn.ConvTranspose2d(3, 4, 2, stride=2), 8, 6) == {"conv": 4 * 3 * 4 * 8 * 6}


def test_unknown_operator_is_named(caplog):
    with caplog.at_level(logging.WARNING):
        count(lambda images: torch.fft.fft(images).real, 8, 6)
    assert "not counted: aten::fft_fft" in caplog.text


@pytest.fixture(scope="module")
def tiny():
    return load_config(EXPEDITED, TINY)


@pytest.fixture(scope="module")
def result(tiny):
    return cost.report(tiny, 128, 160)


def test_no_operator_of_mask2former_is_uncounted(tiny, result, caplog):
    with caplog.at_level(logging.WARNING):
        gflops = cost.count_gflops(tiny, 97, 130)
    assert "not counted" not in caplog.text
    assert gflops == result["expedited"]["gflops"], "97x130 is padded to 128x160"


def test_products_equal_torchs_own_counter(tiny):
    plain = load_config(PLAIN, TINY)
    model = cost._meta_model(plain).eval()
    images = torch.empty(1, 3, 128, 160, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as reference:
        # Not model.logits: torch.autocast does not know the meta device.
        features = model.backbone(images)
        pixels = model.pixel_decoder([features[name] for name in model.in_features])
        decoded = model.transformer_module(
            multi_scale_features=pixels.multi_scale_features, mask_features=pixels.mask_features
        )
        model.class_predictor(decoded.intermediate_hidden_states[-1])
        predict_masks(decoded.masks_queries_logits[-1], pixels.mask_features)
    # Where another layer would attend to; nothing reads it, so a trace does not hold it.
    sizes = [level[0, 0].numel() for level in pixels.multi_scale_features]
    last = decoded.masks_queries_logits[-1].numel()
    unread = last * sizes[len(model.transformer_module.decoder.layers) % 3]
    products = ("linear", "conv", "matmul", "einsum", "bmm", "baddbmm", "addmm")
    ours = cost.analyse(cost._Logits(model), 128, 160).by_operator()
    total = sum(ours[name] for name in (*products, "scaled_dot_product_attention"))
    assert total == reference.get_total_flops() / 2 - unread


def test_model_is_counted_like_its_config_and_left_alone(tiny, result):
    cfg = tiny.clone()
    cfg.MODEL.DEVICE = "cpu"
    cfg.TEST.DTYPE = "bfloat16"
    model = build_model(cfg).train()
    with torch.inference_mode():
        assert cost.count_gflops(model, 128, 160) == result["expedited"]["gflops"]
    assert model.training and {p.device.type for p in model.parameters()} == {"cpu"}


# The paper's tables: Swin-L, window 12, 1152x1152.
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("coco/panoptic/mask2former_swin_large.yaml", 937),
        ("coco/panoptic/mask2former_swin_large_expedited.yaml", 663),
        ("coco/instance/mask2former_swin_large_expedited.yaml", 705),
        ("ade20k/semantic/mask2former_swin_large_expedited.yaml", 620),
    ],
)
def test_swin_large_costs_what_the_paper_says(config, expected):
    cfg = load_config(f"configs/{config}")
    with torch.device("meta"):
        backbone = build_backbone(cfg)
    assert cost.analyse(backbone, 1152, 1152).total() / 1e9 == pytest.approx(expected, rel=0.01)


# The paper's SwinV2-L (HTC++) has 921 and 748 G; it gives no size: windows of 32 at 1024x1024 fit.
def test_swin_v2_large_costs_what_the_paper_says(caplog):
    cfg = load_config("configs/coco/panoptic/mask2former_swin_large.yaml", [
        "MODEL.SWIN.VERSION", "2",
        "MODEL.SWIN.WINDOW_SIZE", "32",
        "MODEL.SWIN.PRETRAINED_WINDOW_SIZES", "[12, 12, 12, 6]",
        "MODEL.EXPEDITE.ALPHA", "12",
        "MODEL.EXPEDITE.CLUSTERS", "[24, 24]",
    ])  # fmt: skip
    total = []
    for enabled in (False, True):
        cfg.MODEL.EXPEDITE.ENABLED = enabled
        with torch.device("meta"):
            backbone = build_backbone(cfg)
        with caplog.at_level(logging.WARNING):
            total.append(cost.analyse(backbone, 1024, 1024).total() / 1e9)
    assert "not counted" not in caplog.text
    assert total == pytest.approx([921, 748], rel=0.01)
    assert total[1] / total[0] == pytest.approx(748 / 921, rel=0.01)


def test_report_compares_baseline_and_expedited(result):
    assert result["size"] == [128, 160]
    for part in ("backbone", "model"):
        ratio = result["expedited"]["gflops"][part] / result["baseline"]["gflops"][part]
        assert 0.5 < ratio < 1
        assert result["ratio"][f"gflops_{part}"] == ratio
    assert result["expedited"]["settings"]["alpha"] == 3
    assert set(result["expedited"]["settings"]) == {
        "alpha", "clusters", "iterations", "neighbourhood", "topk", "temperature", "reconstruction"
    }  # fmt: skip
    lines = cost._table(result).splitlines()
    assert [line.split()[0] for line in lines[1:]] == [
        "baseline",
        "expedited",
        "ratio",
        "settings:",
    ]


def test_command_prints_json_alone_and_a_plain_config_has_a_baseline_alone(capsys, result):
    cost.main(["--config-file", PLAIN, "--size", "128", "160", "--json", *TINY])
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"size": [128, 160], "baseline": result["baseline"]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config-file", "nowhere.yaml", "--size", "8", "8"], "nowhere.yaml"),
        (["--config-file", PLAIN, "--size", "0", "8"], "--size must be two positive numbers"),
    ],
)
def test_command_names_what_is_wrong(capsys, words, message):
    with pytest.raises(SystemExit) as stopped:
        cost.main(words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_count_in_inference_mode() -> None:
    # This stem standardises its weights in place.
    cfg = load_config("scenes/semantic/segmenter_vit_mini.yaml", ["MODEL.WEIGHTS", ""])
    model = build_model(cfg).eval()
    with torch.inference_mode():
        inside = cost.count_gflops(model, 64, 64)
    assert inside == cost.count_gflops(model, 64, 64)

"""The Swin backbone: official semantics when plain, the expedited stage against slow loops."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from expedite_d2.config import add_expedite_config, add_mask2former_config
from expedite_d2.d2 import BACKBONE_REGISTRY, build_backbone, get_cfg
from expedite_d2.hourglass import Reduction, calibrate
from expedite_d2.models.backbones.swin import ExpeditedSwinTransformer
from expedite_d2.models.backbones.swin_blocks import position_resampling


def tiny(reduction: Reduction | None = None, **changes: Any) -> ExpeditedSwinTransformer:
    """16 channels, windows of 4, nine blocks of which six in the third stage."""
    settings: dict[str, Any] = {
        "embed_dim": 16,
        "depths": [1, 1, 6, 1],
        "num_heads": [1, 2, 2, 4],
        "window_size": 4,
        "reduction": reduction,
    }
    torch.manual_seed(0)
    model = ExpeditedSwinTransformer(**{**settings, **changes})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relative_position_bias_table" in name:
                parameter.normal_()  # large enough that a wrong bias shows
            elif parameter.dim() > 1:
                parameter.normal_(std=0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def images(height: int, width: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


# ---- plain: official Swin -------------------------------------------------------------------


def official_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' SwinBackbone weights under official Swin's names (transformers 5.10 to 5.x)."""
    renamed = {}
    for name, value in state.items():
        name = name.removeprefix("swin.").removeprefix("encoder.")
        if name.startswith("hidden_states_norms.stage"):
            stage = int(name.split(".")[1].removeprefix("stage"))
            name = f"norm{stage - 1}.{name.split('.')[-1]}"
        for theirs, ours in (
            ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
            ("embeddings.norm", "patch_embed.norm"),
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
            ("attention.output.dense", "attention.proj"),
            ("attention.o_proj", "attention.proj"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
            ("attention.self.", "attention."),
            ("attention.relative_position_bias.", "attention."),
            ("attention.query.", "attention.q_proj."),
            ("attention.key.", "attention.k_proj."),
            ("attention.value.", "attention.v_proj."),
            ("attention.", "attn."),
        ):
            name = name.replace(theirs, ours)
        if "relative_position_index" not in name and not name.startswith("layernorm."):
            renamed[name] = value
    for name in [n for n in renamed if ".q_proj." in n]:
        qkv = [renamed.pop(name.replace("q_proj", f"{x}_proj")) for x in "qkv"]
        renamed[name.replace("q_proj", "qkv")] = torch.cat(qkv)
    return renamed


@pytest.mark.parametrize("window", [12, 7])
@pytest.mark.parametrize("size", [(384, 384), (256, 320), (250, 333)])
def test_swin_plain_equals_transformers(size: tuple[int, int], window: int) -> None:
    transformers = pytest.importorskip("transformers")
    settings = {"embed_dim": 16, "depths": [2, 2, 3, 1], "num_heads": [1, 2, 2, 4]}
    names = ["stage1", "stage2", "stage3", "stage4"]
    config = transformers.SwinConfig(
        **settings, window_size=window, out_features=names, image_size=384
    )
    theirs = transformers.SwinBackbone(config).eval()
    ours = tiny(**settings, window_size=window)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(mean=0.0, std=0.15, generator=generator)
    ours.load_state_dict(official_names(theirs.state_dict()))
    x = images(*size, batch=3)
    with torch.no_grad():
        expected, got = theirs(x).feature_maps, ours(x)
    assert list(got) == ["res2", "res3", "res4", "res5"]
    for a, b in zip(expected, got.values(), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-4)


def test_swin_parameter_names_are_official() -> None:
    names = set(tiny().state_dict())
    for name in (
        "patch_embed.proj.weight",
        "patch_embed.norm.bias",
        "layers.2.blocks.5.norm1.weight",
        "layers.2.blocks.5.attn.relative_position_bias_table",
        "layers.2.blocks.5.attn.qkv.weight",
        "layers.2.blocks.5.attn.proj.bias",
        "layers.2.blocks.5.norm2.bias",
        "layers.2.blocks.5.mlp.fc1.weight",
        "layers.2.blocks.5.mlp.fc2.bias",
        "layers.0.downsample.norm.weight",
        "layers.0.downsample.reduction.weight",
        "norm0.weight",
        "norm3.bias",
    ):
        assert name in names
    assert "layers.3.downsample.reduction.weight" not in names
    assert "layers.0.downsample.reduction.bias" not in names


def test_swin_loads_checkpoint_with_position_index() -> None:
    model = tiny()
    state = model.state_dict()
    index = model.layers[0].blocks[0].attn.relative_position_index
    for stage, layer in enumerate(model.layers):
        for block in range(len(layer.blocks)):
            state[f"layers.{stage}.blocks.{block}.attn.relative_position_index"] = index
    model.load_state_dict(state, strict=True)


def test_swin_absolute_position_embedding_is_resized() -> None:
    model = tiny(ape=True, pretrain_img_size=32)
    assert model.absolute_pos_embed.shape == (1, 16, 8, 8)
    x = images(40, 64)
    position = F.interpolate(model.absolute_pos_embed, size=(10, 16), mode="bicubic")
    plain = tiny()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "absolute" not in k})
    expected = plain._embed(x) + position.permute(0, 2, 3, 1)
    torch.testing.assert_close(model._embed(x), expected)


def test_swin_output_shape_and_subset() -> None:
    model = tiny(out_features=["res5", "res3"])
    shapes = model.output_shape()
    assert {k: (v.channels, v.stride) for k, v in shapes.items()} == {
        "res3": (32, 8),
        "res5": (128, 32),
    }
    outputs = model(images(64, 96))
    assert {k: tuple(v.shape) for k, v in outputs.items()} == {
        "res3": (2, 32, 8, 12),
        "res5": (2, 128, 2, 3),
    }
    assert model.size_divisibility == 32
    assert model.padding_constraints["size_divisibility"] == 32


# ---- expedited: slow loops -------------------------------------------------------------------


def cluster_window(z: Tensor, window: int, grid: tuple[int, int], tau: float) -> Any:
    """Soft k-means of one window (rows, columns, C), cell by cell; only cells with tokens exist."""
    rows, columns, _ = z.shape
    cells = {}
    for i in range(grid[0]):
        for j in range(grid[1]):
            r0, r1 = i * window // grid[0], -(-(i + 1) * window // grid[0])
            c0, c1 = j * window // grid[1], -(-(j + 1) * window // grid[1])
            if r0 < rows and c0 < columns:
                cells[i, j] = z[r0:r1, c0:c1].flatten(0, 1).mean(0)
    home = {
        (y, x): (y * grid[0] // window, x * grid[1] // window)
        for y in range(rows)
        for x in range(columns)
    }
    near = {
        p: [c for c in cells if abs(c[0] - h[0]) <= 2 and abs(c[1] - h[1]) <= 2]
        for p, h in home.items()
    }
    spread = [min((z[p] - cells[c]).square().sum() for c in near[p]) for p in home]
    for _ in range(5):
        mass = dict.fromkeys(cells, z.new_zeros(()))
        total = {c: torch.zeros_like(z[0, 0]) for c in cells}
        for p, candidates in near.items():
            distance = torch.stack([(z[p] - cells[c]).square().sum() for c in candidates])
            for c, q in zip(candidates, (-tau * distance).softmax(0), strict=True):
                mass[c] = mass[c] + q
                total[c] = total[c] + q * z[p]
        cells = {c: total[c] / mass[c] for c in cells}
    return cells, spread


def bias_at(table: Tensor, window: int, dy: float, dx: float) -> Tensor:
    """The bias table, (heads,) at a fractional offset, by bilinear interpolation."""
    y, x = dy + window - 1, dx + window - 1
    y0, x0 = min(int(y), 2 * window - 3), min(int(x), 2 * window - 3)
    grid = table.view(2 * window - 1, 2 * window - 1, -1)
    top = grid[y0, x0] * (x0 + 1 - x) + grid[y0, x0 + 1] * (x - x0)
    bottom = grid[y0 + 1, x0] * (x0 + 1 - x) + grid[y0 + 1, x0 + 1] * (x - x0)
    return top * (y0 + 1 - y) + bottom * (y - y0)


def slow_block(block: Any, x: Tensor, window: int, m: tuple[int, int]) -> Tensor:
    """One block on a map (h, w, C) of clusters: every pair of positions, allowed or not."""
    h, w, channels = x.shape
    hp, wp = -(-h // m[0]) * m[0], -(-w // m[1]) * m[1]
    y = x.new_zeros(hp, wp, channels)
    y[:h, :w] = block.norm1(x)
    sy, sx = (m[0] // 2, m[1] // 2) if block.shifted else (0, 0)
    attn = block.attn
    heads = attn.num_heads
    qkv = attn.qkv(y.reshape(-1, channels)).view(hp * wp, 3, heads, -1)
    query, key, value = qkv.permute(1, 2, 0, 3)
    logits = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
    place = [((r - sy) % hp, (c - sx) % wp, r < sy, c < sx) for r in range(hp) for c in range(wp)]
    bias = x.new_full((heads, hp * wp, hp * wp), -torch.inf)
    for p, (pr, pc, *p_wrapped) in enumerate(place):
        for q, (qr, qc, *q_wrapped) in enumerate(place):
            same = (pr // m[0], pc // m[1]) == (qr // m[0], qc // m[1])
            if same and p_wrapped == q_wrapped:
                dy, dx = (pr - qr) * window / m[0], (pc - qc) * window / m[1]
                table = attn.relative_position_bias_table
                bias[:, p, q] = bias_at(table, window, dy, dx)
    out = (logits + bias).softmax(-1) @ value
    out = attn.proj(out.transpose(0, 1).reshape(hp, wp, channels))[:h, :w]
    x = x + out
    return x + block.mlp(block.norm2(x))


def slow_stage(stage: Any, first: int, z: Tensor, reduction: Reduction, window: int = 4) -> Tensor:
    """The expedited end of a stage for one image (H, W, C), from the definitions."""
    height, width, channels = z.shape
    m: Any = reduction.clusters
    corners = [(y, x) for y in range(0, height, window) for x in range(0, width, window)]

    def part(y: int, x: int) -> Tensor:
        return z[y : y + window, x : x + window]

    tau = reduction.temperature
    if tau == 0:
        spreads = [s for y, x in corners for s in cluster_window(part(y, x), window, m, 1.0)[1]]
        tau = 32 / float(torch.stack(spreads).mean())
    low = z.new_zeros(-(-height * m[0] // window), -(-width * m[1] // window), channels)
    cells = {(y, x): cluster_window(part(y, x), window, m, tau)[0] for y, x in corners}
    for (y, x), window_cells in cells.items():
        for (i, j), centre in window_cells.items():
            low[y // window * m[0] + i, x // window * m[1] + j] = centre
    refined = low
    for block in stage.blocks[first:]:
        refined = slow_block(block, refined, window, m)
    out = torch.zeros_like(z)
    for (y, x), window_cells in cells.items():
        names = list(window_cells)
        centres = torch.stack([window_cells[c] for c in names])
        after = torch.stack(
            [refined[y // window * m[0] + i, x // window * m[1] + j] for i, j in names]
        )
        for r in range(part(y, x).shape[0]):
            for c in range(part(y, x).shape[1]):
                token = part(y, x)[r, c]
                distance = (centres - token).square().sum(1)
                nearest = distance.argsort(stable=True)[: reduction.topk]
                weight = (-tau * distance[nearest]).softmax(0)
                if reduction.reconstruction == "replace":
                    out[y + r, x + c] = weight @ after[nearest]
                else:
                    out[y + r, x + c] = token + weight @ (after - centres)[nearest]
    return out


@pytest.mark.parametrize(
    ("size", "reduction"),
    [
        ((128, 128), Reduction(4, (2, 2))),
        ((144, 112), Reduction(4, (3, 3))),  # 9x7 tokens: ragged windows both ways
        ((112, 80), Reduction(3, (3, 2), temperature=0.3, reconstruction="replace")),
        ((80, 160), Reduction(2, (2, 3), topk=2)),  # the first block of the stage
        ((48, 48), Reduction(7, (3, 3))),  # a map smaller than one window, the last block only
    ],
)
def test_swin_expedited_equals_slow_loops(size: tuple[int, int], reduction: Reduction) -> None:
    model = tiny(reduction)
    x = images(*size, batch=1)
    exact = copy.deepcopy(model).double()
    stage = exact.layers[2]
    with torch.no_grad():
        tokens = exact.tokens_to_cluster(x.double())[0]
        res4 = slow_stage(stage, reduction.alpha - 2, tokens, reduction)[None]
        res5 = stage.downsample(res4)
        res5 = exact.layers[3].blocks[0](res5, exact.layers[3].token_windows(res5))
        expected = {"res4": exact.norm2(res4), "res5": exact.norm3(res5)}
        in_double, in_float = exact(x.double()), model(x)
    for name, value in expected.items():
        value = value.permute(0, 3, 1, 2)
        # The fractions of the resampling matrix are float32. A sharp softmax over distances makes
        # much of float32's rounding.
        torch.testing.assert_close(in_double[name], value, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(in_float[name].double(), value, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("alpha", [0, 1, 2, 5, 7, 8])
def test_swin_expedited_has_plain_shapes(alpha: int) -> None:
    plain, expedited = tiny(), tiny(Reduction(alpha, (0.5, 0.75)))
    for size in ((32, 32), (33, 47), (95, 130)):
        x = images(*size, batch=1)
        with torch.no_grad():
            a, b = plain(x), expedited(x)
        assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
        assert all(v.isfinite().all() for v in b.values())
        stages = [0] * 1 + [1] * 1 + [2] * 6 + [3]
        for i, name in enumerate(a):
            assert torch.equal(a[name], b[name]) == (i < stages[alpha])


def test_swin_disabled_is_bit_equal() -> None:
    plain, model = tiny(), tiny(Reduction(4, (2, 2)))
    x = images(100, 144)
    with torch.no_grad():
        model(x)
        model.reduction = None
        for a, b in zip(plain(x).values(), model(x).values(), strict=True):
            assert torch.equal(a, b)


def test_swin_expedited_changes_no_state_dict() -> None:
    plain, model = tiny(), tiny(Reduction(4, (2, 2)))
    with torch.no_grad():
        model(images(64, 64))
    assert list(plain.state_dict()) == list(model.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True)
    )
    plain.load_state_dict(model.state_dict(), assign=True)
    assert plain.norm0.weight.data_ptr() == model.norm0.weight.data_ptr()


def test_swin_bias_follows_loaded_weights() -> None:
    model, other = tiny(Reduction(4, (2, 2))), tiny(Reduction(4, (2, 2)), mlp_ratio=4.0)
    x = images(64, 64)
    with torch.no_grad():
        model(x)
        for p in other.parameters():
            p.mul_(1.1)
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(x)["res5"], other(x)["res5"])


def test_swin_position_resampling_hits_table_at_integers() -> None:
    # 4 -> 2: offsets -2, 0, 2 are entries 1, 3, 5 of the seven.
    rows = position_resampling(4, (2, 2)).view(3, 3, 7, 7)
    expected = torch.zeros(3, 3, 7, 7)
    for i, a in enumerate((1, 3, 5)):
        for j, b in enumerate((1, 3, 5)):
            expected[i, j, a, b] = 1
    assert torch.equal(rows, expected)
    # 12 -> 8: offset 1 is 1.5 tokens, half way between two entries; every row is an average.
    rows = position_resampling(12, (8, 8))
    torch.testing.assert_close(rows.sum(1), torch.ones(225))
    assert rows.view(15, 15, 23, 23)[8, 7, 12, 11] == rows.view(15, 15, 23, 23)[8, 7, 13, 11] == 0.5


@pytest.mark.parametrize("reduction", [None, Reduction(4, (3, 2))])
def test_swin_image_does_not_depend_on_batch(reduction: Reduction | None) -> None:
    model = tiny(reduction)
    x = images(96, 112, batch=3) * torch.tensor([1.0, 5.0, 0.2]).view(3, 1, 1, 1)
    with torch.no_grad():
        together = model(x)
        for i in range(3):
            alone = model(x[i : i + 1])
            for name, value in alone.items():
                torch.testing.assert_close(together[name][i], value[0], rtol=1e-4, atol=1e-5)


def test_swin_survives_deepcopy_and_pickle() -> None:
    model = tiny(Reduction(4, (2, 3)))
    x = images(64, 96)
    with torch.no_grad():
        expected = model(x)["res5"]
        assert torch.equal(copy.deepcopy(model)(x)["res5"], expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x)["res5"], expected)


def test_swin_threads_do_not_disturb_each_other() -> None:
    model = tiny(Reduction(4, (2, 2)))
    inputs = [images(64 + 16 * i, 144 - 16 * i) for i in range(6)]

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            return model(x)["res5"]

    expected = [run(x) for x in inputs]
    with ThreadPoolExecutor(3) as pool:
        for a, b in zip(expected * 3, pool.map(run, inputs * 3), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", [None, Reduction(4, (2, 2))])
def test_swin_checkpointing_gives_same_gradients(reduction: Reduction | None) -> None:
    x = images(64, 80)
    gradients = []
    for use_checkpoint in (False, True):
        model = tiny(reduction, use_checkpoint=use_checkpoint, drop_path_rate=0.0).train()
        sum(v.square().mean() for v in model(x).values()).backward()
        gradients.append({k: p.grad for k, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.isfinite().all(), name
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


def test_swin_stochastic_depth_drops_only_in_training() -> None:
    model = tiny(drop_path_rate=0.9)
    x = images(64, 64)
    with torch.no_grad():
        assert torch.equal(model(x)["res5"], model(x)["res5"])
        model.train()
        assert not torch.equal(model(x)["res5"], model(x)["res5"])
    assert model.layers[0].blocks[0].drop_path.p == 0
    assert model.layers[3].blocks[0].drop_path.p == pytest.approx(0.9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", [None, Reduction(4, (2, 2))])
def test_swin_runs_under_autocast(reduction: Reduction | None, dtype: torch.dtype) -> None:
    model = tiny(reduction)
    x = images(64, 80)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", dtype=dtype):
            got = model(x)
    for name, value in got.items():
        difference = (value.float() - expected[name]).square().mean().sqrt()
        assert difference < 0.15 * expected[name].square().mean().sqrt(), name


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_swin_compiles_without_breaks(backend: str) -> None:
    torch.compiler.reset()
    stages = {"depths": [1, 3], "num_heads": [1, 2], "out_features": ["res2", "res3"]}
    model = tiny(Reduction(2, (2, 2)), **stages)
    x = images(72, 64, batch=1)
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=False)
    with torch.no_grad():
        for name, value in compiled(x).items():
            torch.testing.assert_close(value, model(x)[name], rtol=1e-3, atol=1e-4)


def test_swin_calibrated_equals_automatic_on_one_image() -> None:
    model = tiny(Reduction(4, (2, 2)))
    x = images(96, 112, batch=1)
    with torch.no_grad():
        automatic = model(x)["res5"]
        temperature = calibrate(model, [x])
        assert model.reduction == Reduction(4, (2, 2), temperature=temperature)
        torch.testing.assert_close(model(x)["res5"], automatic, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (66, 97)])
def test_swin_tokens_to_cluster_are_what_is_clustered(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from expedite_d2.models.backbones import swin

    seen = []

    def spy(tokens: Tensor, *args: Any) -> Any:
        seen.append(tokens)
        return reduce(tokens, *args)

    reduce = swin.reduce
    monkeypatch.setattr(swin, "reduce", spy)
    for alpha in (0, 1, 2, 5, 8):
        model = tiny(Reduction(alpha, (2, 2)))
        with torch.no_grad():
            model(images(*size))
            assert torch.equal(seen.pop(), model.tokens_to_cluster(images(*size)))


@pytest.mark.parametrize(
    ("reduction", "message"),
    [
        (Reduction(9, (2, 2)), "alpha must be less than the backbone's 9 blocks, got 9"),
        (Reduction(4, (4, 4)), "smaller than the 4x4 window, got 4x4"),
        (Reduction(4, (2, 5)), "smaller than the 4x4 window, got 2x5"),
        (Reduction(4, (0.9, 0.9)), "smaller than the 4x4 window, got 4x4"),
    ],
)
def test_swin_refuses_bad_reduction(reduction: Reduction, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(reduction)
    model = tiny()
    with pytest.raises(ValueError, match=message):
        model.reduction = reduction
    assert model.reduction is None


def test_swin_refuses_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"out_features must be among .*, got \['res6'\]"):
        tiny(out_features=["res6"])
    with pytest.raises(ValueError, match="num_heads must have one entry a stage"):
        tiny(num_heads=[1, 2])
    with pytest.raises(ValueError, match=r"expects images \(B, 3, H, W\), got \(3, 32, 32\)"):
        tiny()(torch.zeros(3, 32, 32))
    with pytest.raises(ValueError, match="reduction is None"):
        tiny().tokens_to_cluster(images(32, 32))


def test_swin_is_built_from_config() -> None:
    assert BACKBONE_REGISTRY.get("ExpeditedSwinTransformer") is ExpeditedSwinTransformer
    cfg = get_cfg()
    add_mask2former_config(cfg)
    add_expedite_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "ExpeditedSwinTransformer"
    cfg.MODEL.SWIN.EMBED_DIM = 16
    cfg.MODEL.SWIN.DEPTHS = [1, 1, 3, 1]
    cfg.MODEL.SWIN.NUM_HEADS = [1, 2, 2, 4]
    cfg.MODEL.SWIN.OUT_FEATURES = ["res3", "res5"]
    assert build_backbone(cfg).reduction is None
    cfg.MODEL.EXPEDITE.ENABLED = True
    cfg.MODEL.EXPEDITE.ALPHA = 3
    cfg.MODEL.EXPEDITE.CLUSTERS = [0.5, 0.5]
    cfg.MODEL.EXPEDITE.TEMPERATURE = 0.25
    backbone = build_backbone(cfg)
    assert backbone.reduction == Reduction(3, (0.5, 0.5), temperature=0.25)
    assert list(backbone.output_shape()) == ["res3", "res5"]
    assert backbone.cluster_window == (7, 7)

"""Multiply-adds of any module: by hand, by device, and what a count misses."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from family_cases.plain import from_transformers
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from expedite_d2 import expedite
from expedite_d2.tools import count_multiply_adds, on_meta
from expedite_d2.tools.cost import MultiplyAdds


class Call(nn.Module):
    """A function as a module without parameters."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def count(function, *shapes: tuple[int, ...], device: str = "meta") -> dict[str, int]:
    module = function if isinstance(function, nn.Module) else Call(function)
    inputs = [torch.ones(shape, device=device) for shape in shapes]
    # A copy: tests share the module, and nothing comes back from meta.
    return count_multiply_adds(copy.deepcopy(module).to(device), *inputs).by_operator()


# ---- operators -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (nn.Linear(3, 4), [(2, 5, 3)], {"aten.addmm": 2 * 5 * 3 * 4}),
        (nn.Linear(3, 4, bias=False), [(2, 5, 3)], {"aten.mm": 2 * 5 * 3 * 4}),
        (nn.Linear(3, 4), [(3,)], {"aten.addmm": 3 * 4}),
        (nn.Conv2d(3, 4, 3, 2, 1), [(1, 3, 8, 6)], {"aten.convolution": 4 * 3 * 9 * 4 * 3}),
        (nn.Conv2d(4, 4, 3, groups=2), [(4, 8, 6)], {"aten.convolution": 6 * 4 * 9 * 4 * 2}),
        (nn.ConvTranspose2d(3, 4, 2, 2), [(1, 3, 8, 6)], {"aten.convolution": 48 * 4 * 3 * 4}),
        # A matrix, or a batch of them, times a matrix, a batch, a vector.
        (torch.matmul, [(8, 6), (3, 6, 5)], {"aten.bmm": 3 * 8 * 6 * 5}),
        (torch.matmul, [(3, 8, 6), (6, 5)], {"aten.mm": 3 * 8 * 6 * 5}),
        (torch.matmul, [(8, 6), (6,)], {"aten.mv": 8 * 6}),
        (torch.matmul, [(3, 8, 6), (6,)], {"aten.mv": 3 * 8 * 6}),
        (torch.matmul, [(6,), (6,)], {"aten.dot": 6}),
        (torch.addmv, [(8,), (8, 6), (6,)], {"aten.addmv": 8 * 6}),
        (torch.baddbmm, [(3, 8, 5), (3, 8, 6), (3, 6, 5)], {"aten.baddbmm": 3 * 8 * 6 * 5}),
        (torch.addbmm, [(8, 5), (3, 8, 6), (3, 6, 5)], {"aten.addbmm": 3 * 8 * 6 * 5}),
        (
            lambda q, r: torch.einsum("bhwc,hkc->bhwk", q, r),
            [(2, 3, 4, 5), (3, 6, 5)],
            {"aten.bmm": 2 * 3 * 4 * 6 * 5},
        ),
        (torch.outer, [(3,), (4,)], {}),
    ],
)
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_products_by_hand(function, shapes, expected, device):
    assert count(function, *shapes, device=device) == expected


@pytest.mark.parametrize(
    ("function", "shape", "expected"),
    [
        (nn.LayerNorm(3), (2, 4, 3), {"aten.native_layer_norm": 5 * 24}),
        (nn.LayerNorm(3, elementwise_affine=False), (2, 4, 3), {"aten.native_layer_norm": 4 * 24}),
        (nn.GroupNorm(2, 4), (2, 4, 3, 3), {"aten.native_group_norm": 5 * 72}),
        (nn.GroupNorm(2, 4, affine=False), (2, 4, 3, 3), {"aten.native_group_norm": 4 * 72}),
        (nn.InstanceNorm2d(4, affine=True), (2, 4, 3, 3), {"aten.native_batch_norm": 5 * 72}),
        (nn.BatchNorm2d(4), (2, 4, 3, 3), {"aten.native_batch_norm": 5 * 72}),
        (nn.BatchNorm2d(4).eval(), (2, 4, 3, 3), {"aten.native_batch_norm": 2 * 72}),
        (nn.BatchNorm2d(4, affine=False).eval(), (2, 4, 3, 3), {"aten.native_batch_norm": 72}),
        (nn.AdaptiveAvgPool2d(2), (1, 2, 6, 6), {"aten._adaptive_avg_pool2d": 72}),
        (nn.Upsample((4, 5)), (1, 2, 3, 3), {"aten.upsample_nearest2d": 40}),
        (
            nn.Upsample((4, 5), mode="bilinear"),
            (1, 2, 3, 3),
            {"aten.upsample_bilinear2d": 4 * 40},
        ),
        (
            lambda x: F.grid_sample(x, x.new_zeros(1, 4, 5, 2), align_corners=False),
            (1, 2, 3, 3),
            {"aten.grid_sampler_2d": 4 * 40},
        ),
        (
            lambda x: torchvision.ops.roi_align(x, x.new_zeros(3, 5), 7),
            (1, 2, 9, 9),
            {"torchvision.roi_align": 3 * 2 * 49 * 4 * 4},
        ),
        (nn.Sequential(nn.GELU(), nn.Softmax(-1), nn.Dropout(), nn.MaxPool2d(2)), (1, 2, 6, 6), {}),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_conventions_by_hand(function, shape, expected, inference, device):
    # In inference mode torch decomposes more.
    with torch.inference_mode(inference):
        assert count(function, shape, device=device) == expected


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **options):
    return F.scaled_dot_product_attention(query, key, value, mask, **options)


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize(
    ("function", "channels"),
    [
        (lambda q, k, m: attend(q, k, k), 6),
        (lambda q, k, m: attend(q, k, k, m), 6),
        (lambda q, k, m: attend(q, k, k, m > 0), 6),
        (lambda q, k, m: attend(q, k, k, is_causal=True), 6),
        (lambda q, k, m: attend(q, k, k[..., :4]), 4),
        (lambda q, k, m: attend(q, k[:, :2], k[:, 2:], enable_gqa=True), 6),
        (lambda q, k, m: (q @ k.mT + m).softmax(-1) @ k, 6),
    ],
)
def test_attention_by_hand(function, channels, device):
    # 2 images, 4 heads, 8 queries, 5 keys of 6 channels, values of as many or fewer.
    found = count(function, (2, 4, 8, 6), (2, 4, 5, 6), (2, 1, 8, 5), device=device)
    assert found == {"aten.bmm": 2 * 4 * 8 * 5 * (6 + channels)}


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("options", [{}, {"need_weights": False}, {"average_attn_weights": False}])
def test_multihead_attention_by_hand(options, device):
    module = nn.MultiheadAttention(12, 3, batch_first=True).eval().to(device)
    x = torch.ones(2, 8, 12, device=device)
    products = count_multiply_adds(module, x, x, x, **options)
    assert products.total() == 4 * 2 * 8 * 12 * 12 + 2 * 2 * 8 * 8 * 12


# ---- what is missed --------------------------------------------------------------------------


@torch.library.custom_op("expedite_d2_test::mystery", mutates_args=())
def mystery(x: Tensor) -> Tensor:
    return x @ x


@mystery.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: mystery(x), "expedite_d2_test.mystery"),
        (torch.fft.fft, "aten._fft_r2c"),
        (torch.linalg.matrix_exp, "aten.linalg_matrix_exp"),
        (lambda x: torch.linalg.solve(x + torch.eye(4), x), "aten._linalg_solve_ex"),
        (lambda x: torch.cdist(x, x), "aten._cdist_forward"),
        (lambda x: nn.Bilinear(4, 4, 2)(x, x), "aten._trilinear"),
        (lambda x: nn.LSTM(4, 5)(x[None])[0], "aten.mkldnn_rnn_layer"),
    ],
)
def test_operator_without_a_formula_is_named(function, name):
    with pytest.warns(UserWarning, match=f"multiply-adds: not counted: {name}$"):
        count(function, (4, 4), device="cpu")


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.normalize(x).cumsum(0).cummax(0).values.sort(1).values.topk(2).values,
        lambda x: torchvision.ops.nms(x.clone(), x[:, 0], 0.5),
        lambda x: F.interpolate(x[None, None], (9, 9), mode="bicubic", antialias=True).relu().var(),
        lambda x: F.pad(x, (1, 1)).unfold(1, 2, 1).gather(1, torch.zeros(4, 1, 2).long()).prod(),
    ],
)
def test_operators_without_products_are_not_named(function):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert count(function, (4, 4), device="cpu") == {}


# ---- models ----------------------------------------------------------------------------------

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 64}


def timm_vit(**options) -> nn.Module:
    size = {"img_size": 64, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 3}
    return timm.models.VisionTransformer(**size | options).eval()


MODELS = {
    "timm_vit": timm_vit,
    "timm_vit_with_bias": lambda: timm.models.Beit(
        img_size=64, embed_dim=24, num_heads=3, depth=2, use_rel_pos_bias=True
    ).eval(),
    "timm_swin": lambda: timm.models.SwinTransformer(
        img_size=64, embed_dim=12, depths=(1, 2), num_heads=(1, 2), window_size=8
    ).eval(),
    "timm_resnet": lambda: timm.create_model("resnet10t").eval(),
    "transformers_dinov3": lambda: transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(**SMALL, intermediate_size=48)
    ).eval(),
    "transformers_swinv2": lambda: transformers.Swinv2Model(
        transformers.Swinv2Config(
            embed_dim=12, depths=[1, 2], num_heads=[1, 2], image_size=64, window_size=4
        )
    ).eval(),
    "torchvision_vit": lambda: torchvision.models.VisionTransformer(64, 8, 2, 3, 24, 48).eval(),
    "encoder_layer": lambda: nn.Sequential(
        nn.Flatten(1, 2), nn.TransformerEncoderLayer(64, 4, 96, batch_first=True)
    ).eval(),
    "expedited": lambda: expedite(timm_vit(), alpha=1, clusters=(4, 4)),
}


def totals(counts: MultiplyAdds) -> dict[str, int]:
    return {name: counts.total(name) for name in counts.modules}


@pytest.mark.parametrize("name", MODELS)
def test_counts_are_the_same_without_memory_and_in_inference_mode(name):
    model, images = MODELS[name](), torch.ones(1, 3, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        real = count_multiply_adds(model, images)
        empty = count_multiply_adds(on_meta(model), images.to("meta"))
        with torch.inference_mode():
            inference = count_multiply_adds(on_meta(model), images.to("meta"))
    assert real == empty
    assert totals(real) == totals(inference)
    assert real.total() > 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", MODELS)
def test_counts_are_the_same_on_a_gpu(name):
    model, images = MODELS[name]().cuda(), torch.ones(1, 3, 64, 64, device="cuda")
    empty = count_multiply_adds(on_meta(model), images.to("meta"))
    assert totals(count_multiply_adds(model, images)) == totals(empty)


def test_products_are_those_of_torchs_own_counter():
    model, images = on_meta(timm_vit()), torch.ones(1, 3, 64, 64, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as reference:
        model(images)
    found = count_multiply_adds(model, images).by_operator()
    assert found.pop("aten.native_layer_norm") > 0
    assert sum(found.values()) == reference.get_total_flops() / 2


def test_expedited_model_costs_less_and_its_operators_are_counted():
    images = torch.ones(1, 3, 64, 64)
    plain = count_multiply_adds(timm_vit(), images)
    counts = count_multiply_adds(MODELS["expedited"](), images)
    assert {"expedite_d2.token_reduce", "expedite_d2.token_reconstruct"} <= set(
        counts.by_operator()
    )
    assert counts.total("blocks.0") == plain.total("blocks.0")
    # The last block also makes the map again.
    assert counts.total("blocks.2.mlp") < 0.3 * plain.total("blocks.2.mlp")
    assert 0.4 < counts.total() / plain.total() < 0.7


# ---- modules and the caller's state ----------------------------------------------------------


class Twice(nn.Module):
    """A layer called twice, one never, and a method beside forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor, times: int = 2) -> Tensor:
        for _ in range(times):
            x = self.stem(x)
        return x @ x.mT

    def logits(self, x: Tensor) -> Tensor:
        return self.stem(x)


class Recorder:
    """Somebody's hook, which is an object and has a method that is one."""

    def note(self, module: nn.Module, args: Any, out: Tensor) -> None:
        out.detach().numpy()

    __call__ = note


def test_only_the_librarys_own_hooks_see_tensors_without_values() -> None:
    model, seen = from_transformers("ViTModel"), []
    with torch.no_grad():
        model(torch.ones(1, 3, 24, 24), output_hidden_states=True)  # puts hooks of its own there
    own = len(model.layers[0]._forward_hooks)
    recorder = Recorder()
    for hook in (lambda module, args, out: seen.append(out.cpu()), recorder, recorder.note):
        model.layers[0].register_forward_hook(hook)
    model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].cpu()))
    empty = on_meta(model)
    images = torch.ones(1, 3, 24, 24, device="meta")
    assert len(empty(images, output_hidden_states=True).hidden_states) == 5
    assert own and len(empty.layers[0]._forward_hooks) == own and not seen
    expedite(model)
    assert not seen and len(model.layers[0]._forward_hooks) == own + 3


def test_tensors_that_cannot_be_copied_are_counted_all_the_same() -> None:
    model, images = from_transformers("ViTModel"), torch.ones(1, 3, 24, 24)
    whole = count_multiply_adds(model, images).total()
    prune.l1_unstructured(model.layers[0].mlp.fc1, "weight", amount=0.3)
    model.layers[1].kept = model(images).last_hidden_state
    model.layers[2].kept = [model.layers[1].kept]
    assert model.layers[1].kept.requires_grad
    assert count_multiply_adds(on_meta(model), images.to("meta")).total() == whole


def test_counts_of_submodules():
    counts = count_multiply_adds(Twice(), torch.ones(5, 3))
    assert totals(counts) == {
        "": 2 * 5 * 24 + 75,
        "stem": 2 * 5 * 24,
        "stem.0": 2 * 5 * 12,
        "stem.1": 2 * 5 * 12,
        "unused": 0,
    }
    assert counts.by_operator() == {"aten.addmm": 2 * 5 * 24, "aten.mm": 75}
    assert counts.by_operator("stem") == {"aten.addmm": 2 * 5 * 24}
    assert counts.total() == 2 * 5 * 24 + 75
    with pytest.raises(ValueError, match="has no module 'backbone'"):
        counts.total("backbone")


def test_counts_of_a_method_and_with_options():
    model, x = Twice(), torch.ones(5, 3)
    logits = count_multiply_adds(model, x, call=model.logits)
    assert logits.total() == logits.total("stem") == 5 * 24
    assert count_multiply_adds(model, x, times=3).total("stem") == 3 * 5 * 24


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
def test_compiled_model_is_counted():
    model = Twice()
    compiled = torch.compile(model, backend="eager")
    counts = count_multiply_adds(compiled, torch.ones(5, 3))
    assert counts.total() == count_multiply_adds(model, torch.ones(5, 3)).total()


def test_count_leaves_model_and_settings_alone():
    model = nn.TransformerEncoderLayer(8, 2, 8).train()
    state = copy.deepcopy(model.state_dict())
    for x in (torch.ones(3, 1, 8), torch.ones(3, 1, 9)):
        try:
            count_multiply_adds(model, x)
        except AssertionError:
            assert x.shape[2] == 9
        assert torch.backends.mha.get_fastpath_enabled() and torch.is_grad_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
    assert model.training and not any(module._forward_hooks for module in model.modules())
    torch.testing.assert_close(model.state_dict(), state)


def test_copy_on_meta_holds_no_memory_and_shares_what_was_shared():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    copied = on_meta(model)
    assert copied[2].weight is copied[0].weight
    tensors = [*copied.parameters(), *copied.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert copied.state_dict().keys() == model.state_dict().keys()
    assert model[0].weight.device.type == "cpu" and model[0].weight.requires_grad

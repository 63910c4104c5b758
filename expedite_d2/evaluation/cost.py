"""Multiply-adds of a backbone and of a whole model, from the configuration alone.

    python -m expedite_d2.evaluation.cost --config-file F --size H W [--json] [KEY VALUE ...]

Counted with fvcore on the ``meta`` device: no weights, no data, seconds. fvcore's conventions hold
(one multiply-add is one; 5 a value for layer and group norm; 4 a value for bilinear sampling;
elementwise arithmetic, activations and softmax nothing): by them Swin-L has 937 G at 1152x1152.
``HANDLES`` adds the operators that fvcore does not know, ours with the work that the sparse
formulation executes, and names those that are deliberately not counted.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

import expedite_d2.models  # noqa: F401 (registers the architectures that configs name)
from expedite_d2.config import cli, load_config
from expedite_d2.d2 import CfgNode, build_model
from expedite_d2.evaluation.tracing import tracing_on_meta

with warnings.catch_warnings():
    # fvcore scripts a function while it is imported, which torch now warns of.
    warnings.filterwarnings("ignore", category=FutureWarning)
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.jit_handles import einsum_flop_jit

logger = logging.getLogger(__name__)

Gflops = dict[str, float]
Handle = Callable[[list[Any], list[Any]], int]

_SETTINGS = (
    "alpha",
    "clusters",
    "iterations",
    "neighbourhood",
    "topk",
    "temperature",
    "reconstruction",
)


# The trace runs in a thread that is not in inference mode, and some layers work in place.
@torch.inference_mode(False)
def count_gflops(cfg: CfgNode | nn.Module, height: int, width: int) -> Gflops:
    """Giga multiply-adds of one image's forward pass.

    Args:
        cfg: a config, or a model already built (left untouched: its parameters are only measured).
        height, width: the network's input; raised to the model's ``size_divisibility``, as
            inference pads it.

    Returns:
        "backbone", and "model": all of it up to the logits, post-processing excluded.
    """
    model: Any = _meta_copy(cfg) if isinstance(cfg, nn.Module) else _meta_model(cfg)
    step = max(model.size_divisibility, 1)
    height, width = (math.ceil(side / step) * step for side in (height, width))
    counts = analyse(_Logits(model), height, width)
    return {"backbone": counts.total("model.backbone") / 1e9, "model": counts.total() / 1e9}


def analyse(module: nn.Module, height: int, width: int) -> FlopCountAnalysis:
    """fvcore's analysis of a module on the meta device, by operator and by submodule.

    An operator that this count misses is named in a warning.

    Args:
        module: takes images (1, 3, height, width).
        height, width: of the images.
    """
    images = torch.empty(1, 3, height, width, device="meta")
    counts = FlopCountAnalysis(module.eval(), images).set_op_handle(**HANDLES)
    counts.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    with tracing_on_meta() as unrecorded:
        counts.total()
    uncounted = unrecorded | counts.unsupported_ops().keys()
    if uncounted:
        logger.warning("multiply-adds: not counted: %s", ", ".join(sorted(uncounted)))
    return counts


def expedite_settings(cfg: CfgNode) -> dict[str, Any]:
    """The settings of ``MODEL.EXPEDITE`` as reports show them."""
    return {name: cfg.MODEL.EXPEDITE[name.upper()] for name in _SETTINGS}


def report(cfg: CfgNode, height: int, width: int) -> dict[str, Any]:
    """Baseline and, where the config enables it, expedited cost and their ratio."""
    plain = _switched(cfg, False)
    baseline = count_gflops(plain, height, width)
    result: dict[str, Any] = {"size": [height, width], "baseline": {"gflops": baseline}}
    if cfg.MODEL.EXPEDITE.ENABLED:
        expedited = count_gflops(cfg, height, width)
        result["expedited"] = {"gflops": expedited, "settings": expedite_settings(cfg)}
        result["ratio"] = {f"gflops_{part}": expedited[part] / baseline[part] for part in baseline}
    return result


def _switched(cfg: CfgNode, enabled: bool) -> CfgNode:
    changed = cfg.clone()
    changed.defrost()
    changed.MODEL.EXPEDITE.ENABLED = enabled
    return changed


def _meta_model(cfg: CfgNode) -> nn.Module:
    changed = cfg.clone()
    changed.defrost()
    changed.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(changed)


def _meta_copy(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers hold no memory."""
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        for parameter in model.parameters()
    }
    memo |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


class _Logits(nn.Module):
    """``model.logits`` as a module's forward, which is all that fvcore traces."""

    model: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> Any:
        return self.model.logits(images)


def _shape(value: Any) -> list[int]:
    return value.type().sizes()


def _ints(value: Any) -> list[int] | None:
    """A constant int[] or int[]? argument of a traced operator."""
    if value.node().kind() == "prim::ListConstruct":
        return [element.toIValue() for element in value.node().inputs()]
    return value.toIValue()


def _matmul(inputs: list[Any], outputs: list[Any]) -> int:
    """Output values times the contracted length (fvcore's own misses broadcast batches)."""
    return math.prod(_shape(outputs[0])) * _shape(inputs[0])[-1]


def _baddbmm(inputs: list[Any], outputs: list[Any]) -> int:
    return _matmul(inputs[1:], outputs)


def _einsum(inputs: list[Any], outputs: list[Any]) -> int:
    """Product of the sizes of all indices (fvcore's own goes through four printed digits)."""
    equation = inputs[0].toIValue().replace(" ", "")
    operands = equation.split("->")[0].split(",")
    if len(operands) != 2 or "." in equation:
        return int(einsum_flop_jit(inputs, outputs))
    sizes: dict[str, int] = {}
    for indices, operand in zip(operands, inputs[1].node().inputs(), strict=True):
        sizes.update(zip(indices, _shape(operand), strict=True))
    return math.prod(sizes.values())


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    """Scaled dot-product attention: q kᵀ and the weighted sum of v; B·L·S·(E + E_v)."""
    query, key, value = (_shape(tensor) for tensor in inputs[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _candidates(length: int, window: int, cells: int, neighbourhood: int) -> int:
    """Pairs of a position and a candidate cell along one axis, ragged last window included."""
    reach = neighbourhood // 2
    pairs = 0
    for start in range(0, length, window):
        real = min(window, length - start)
        existing = math.ceil(real * cells / window)
        for position in range(real):
            home = position * cells // window
            pairs += min(home + reach, existing - 1) - max(home - reach, 0) + 1
    return pairs


def candidate_pairs(
    grid: Sequence[int], clusters: Sequence[int], window: Sequence[int], neighbourhood: int
) -> int:
    """How many (token, candidate centre) pairs an image has; the axes are independent."""
    return math.prod(
        _candidates(*axis, neighbourhood) for axis in zip(grid, window, clusters, strict=True)
    )


def match_pairs(grid: Sequence[int], clusters: Sequence[int], window: Sequence[int]) -> int:
    """How many (token, centre of its window) pairs an image has."""
    return candidate_pairs(grid, clusters, window, 2 * max(clusters) + 1)


class _Tokens(NamedTuple):
    """What the work of clustering depends on."""

    shape: list[int]  # (B, H, W, C)
    clusters: list[int]
    window: list[int]

    @classmethod
    def of(cls, tokens: Any, clusters: Any, window: Any) -> _Tokens:
        """From the arguments of an operator."""
        shape = _shape(tokens)
        return cls(shape, _ints(clusters) or [], _ints(window) or shape[1:3])

    def spread(self, neighbourhood: int) -> int:
        """Pooling (1 a value) and a distance to each candidate: tokens·C + P·C."""
        return math.prod(self.shape) + self._distances(neighbourhood)

    def cluster(self, iterations: int, neighbourhood: int) -> int:
        """Pooling, then κ times distances and weighted sums over candidates: tokens·C + 2κ·P·C."""
        return math.prod(self.shape) + 2 * iterations * self._distances(neighbourhood)

    def match(self) -> int:
        """A distance to each centre of the window: P_all·C."""
        pairs = match_pairs(self.shape[1:3], self.clusters, self.window)
        return self.shape[0] * pairs * self.shape[3]

    def _distances(self, neighbourhood: int) -> int:
        grid = self.shape[1:3]
        pairs = candidate_pairs(grid, self.clusters, self.window, neighbourhood)
        return self.shape[0] * pairs * self.shape[3]


def _token_spread(inputs: list[Any], outputs: list[Any]) -> int:
    return _Tokens.of(*inputs[:3]).spread(inputs[3].toIValue())


def _token_cluster(inputs: list[Any], outputs: list[Any]) -> int:
    return _Tokens.of(*inputs[:3]).cluster(inputs[3].toIValue(), inputs[4].toIValue())


def _token_match(inputs: list[Any], outputs: list[Any]) -> int:
    return _Tokens.of(inputs[0], *inputs[2:4]).match()


def _token_reduce(inputs: list[Any], outputs: list[Any]) -> int:
    """The sum of the three, of which a fixed temperature needs no spread."""
    tokens = _Tokens.of(*inputs[:3])
    iterations, neighbourhood, automatic = (inputs[i].toIValue() for i in (3, 4, 7))
    spread = tokens.spread(neighbourhood) if automatic else 0
    return spread + tokens.cluster(iterations, neighbourhood) + tokens.match()


def _token_reconstruct(inputs: list[Any], outputs: list[Any]) -> int:
    """A weighted sum of topk centres a token: tokens·topk·C."""
    return math.prod(_shape(inputs[1])) * _shape(inputs[0])[-1]


def _ms_deform_attn(inputs: list[Any], outputs: list[Any]) -> int:
    """What fvcore counts for the same samples by grid_sample: 4 for each sampled value."""
    channels, samples = _shape(inputs[0])[-1], _shape(inputs[3])[:-1]
    return math.prod(samples) * channels * 4


def _roi_align(inputs: list[Any], outputs: list[Any]) -> int:
    """Each output value is the mean of samples, each of them blended from four values."""
    ratio = inputs[5].toIValue()
    # 0 lets the size of each region decide; two samples a side are what Detectron2's regions get.
    samples = (ratio if ratio > 0 else 2) ** 2
    return math.prod(_shape(outputs[0])) * samples * 4


# Elementwise arithmetic, comparisons, reductions without products and pure data movement, which
# fvcore's counts leave out, too (its own list of such operators is shorter than what occurs).
_NOT_COUNTED = (
    "_upsample_bicubic2d_aa abs add add_ addcdiv alias all any argmax bernoulli_ ceil clamp_min "
    "clone contiguous cos cumsum div div_ dropout_ empty_like eq erf exp expand_as fill_ gelu "
    "hardtanh im2col index_select isfinite kron le leaky_relu lift_fresh linalg_vector_norm "
    "linspace log log_softmax logical_and logical_not logical_or lt masked_fill masked_fill_ "
    "max_pool2d mean meshgrid min movedim mul mul_ ne neg new_ones normal_ ones_like pad pow prod "
    "reciprocal repeat repeat_interleave reshape_as rsqrt rsub scatter scatter_ sigmoid silu sin "
    "softmax sort sqrt square sub sub_ sum tanh tile topk tril triu unflatten unfold view_as "
    "where"
).split()

HANDLES: dict[str, Handle | None] = {f"aten::{name}": None for name in _NOT_COUNTED} | {
    "aten::matmul": _matmul,
    "aten::baddbmm": _baddbmm,
    "aten::einsum": _einsum,
    "aten::scaled_dot_product_attention": _attention,
    "torchvision::roi_align": _roi_align,
    "expedite_d2::token_spread": _token_spread,
    "expedite_d2::token_cluster": _token_cluster,
    "expedite_d2::token_match": _token_match,
    "expedite_d2::token_reduce": _token_reduce,
    "expedite_d2::token_reconstruct": _token_reconstruct,
    "expedite_d2::ms_deform_attn": _ms_deform_attn,
}


def _table(result: dict[str, Any]) -> str:
    height, width = result["size"]
    lines = [f"{f'G multiply-adds at {height}x{width}':<32}{'backbone':>10}{'model':>10}"]
    for name in ("baseline", "expedited"):
        if name in result:
            gflops = result[name]["gflops"]
            lines.append(f"{name:<32}{gflops['backbone']:>10.1f}{gflops['model']:>10.1f}")
    if "ratio" in result:
        ratio = result["ratio"]
        lines.append(
            f"{'ratio':<32}{ratio['gflops_backbone']:>10.3f}{ratio['gflops_model']:>10.3f}"
        )
        settings = result["expedited"]["settings"].items()
        lines.append("settings: " + ", ".join(f"{name} {value}" for name, value in settings))
    return "\n".join(lines)


@cli
def main(argv: Sequence[str] | None = None) -> None:
    """Print the cost of a configuration, baseline and expedited."""
    parser = argparse.ArgumentParser(
        prog="python -m expedite_d2.evaluation.cost",
        description="Count the multiply-adds of a configuration, baseline and expedited.",
    )
    parser.add_argument("--config-file", required=True, help="YAML configuration")
    parser.add_argument(
        "--size", nargs=2, type=int, required=True, metavar=("H", "W"), help="input in pixels"
    )
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides"
    )
    args = parser.parse_args(argv)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    if min(args.size) < 1:
        raise ValueError(f"--size must be two positive numbers, got {args.size[0]} {args.size[1]}")
    result = report(load_config(args.config_file, args.opts), *args.size)
    print(json.dumps(result, indent=2) if args.json else _table(result))


if __name__ == "__main__":
    main()

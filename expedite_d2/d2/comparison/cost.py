"""Multiply-adds of a backbone and of a whole model, from the configuration alone.

    expedite-d2 cost --config-file F --size H W [--json] [KEY VALUE ...]

Counted on the ``meta`` device: no weights, no data, seconds. What is counted is told in
:mod:`expedite_d2.tools.cost`: by its conventions Swin-L has 937 G at 1152x1152.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from expedite_d2.d2.comparison.settings import describe_settings, expedite_settings, switched
from expedite_d2.d2.config import load_config
from expedite_d2.d2.config.command_line import config_parser
from expedite_d2.d2.modeling.build import build_model
from expedite_d2.d2.provider import CfgNode
from expedite_d2.tools import count_multiply_adds, on_meta

Gflops = dict[str, float]


def count_gflops(cfg: CfgNode | nn.Module, height: int, width: int) -> Gflops:
    """Giga multiply-adds of one image's forward pass.

    Args:
        cfg: a config, or a model already built (left untouched: its parameters are only measured).
        height, width: the network's input; raised to the model's ``size_divisibility``, as
            inference pads it.

    Returns:
        "backbone", and "model": all of it up to the logits, post-processing excluded.
    """
    model: Any = on_meta(cfg) if isinstance(cfg, nn.Module) else meta_model(cfg)
    step = max(model.size_divisibility, 1)
    height, width = (math.ceil(side / step) * step for side in (height, width))
    images = torch.empty(1, 3, height, width, device="meta")
    counts = count_multiply_adds(model.eval(), images, call=model.logits)
    return {"backbone": counts.total("backbone") / 1e9, "model": counts.total() / 1e9}


def config_cost(cfg: CfgNode, height: int, width: int) -> dict[str, Any]:
    """Baseline and, where the config enables it, expedited cost and their ratio."""
    plain = switched(cfg, False)
    baseline = count_gflops(plain, height, width)
    result: dict[str, Any] = {"size": [height, width], "baseline": {"gflops": baseline}}
    if cfg.MODEL.EXPEDITE.ENABLED:
        expedited = count_gflops(cfg, height, width)
        result["expedited"] = {"gflops": expedited, "settings": expedite_settings(cfg)}
        result["ratio"] = {f"gflops_{part}": expedited[part] / baseline[part] for part in baseline}
    return result


def meta_model(cfg: CfgNode) -> nn.Module:
    """The model of a config on the ``meta`` device: shapes alone, built in no time."""
    changed = cfg.clone()
    changed.defrost()
    changed.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(changed)


def _table(result: dict[str, Any]) -> str:
    height, width = result["size"]
    lines = [f"{f'G multiply-adds at {height}x{width}':<32}{'backbone':>10}{'model':>10}"]
    for name in ("baseline", "expedited"):
        if name in result:
            gflops = result[name]["gflops"]
            backbone, whole = (f"{gflops[part]:>10.4g}" for part in ("backbone", "model"))
            lines.append(f"{name:<32}{backbone}{whole}")
    if "ratio" in result:
        ratio = result["ratio"]
        lines.append(
            f"{'ratio':<32}{ratio['gflops_backbone']:>10.3f}{ratio['gflops_model']:>10.3f}"
        )
        settings = describe_settings(result["expedited"]["settings"])
        lines.append("settings: " + ", ".join(" ".join(pair) for pair in settings))
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Print the cost of a configuration, baseline and expedited."""
    parser = config_parser("cost", "Count the multiply-adds of a config.", models=True)
    parser.add_argument(
        "--size", nargs=2, type=int, required=True, metavar=("H", "W"), help="input in pixels"
    )
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    args = parser.parse_args(argv)
    if min(args.size) < 1:
        raise ValueError(f"--size must be two positive numbers, got {args.size[0]} {args.size[1]}")
    result = config_cost(load_config(args.config_file, args.opts), *args.size)
    print(json.dumps(result, indent=2) if args.json else _table(result))

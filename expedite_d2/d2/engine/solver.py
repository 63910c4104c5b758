"""Optimizers and learning-rate schedules from Detectron2's and Mask2Former's SOLVER keys."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator

import torch
from torch import nn

from expedite_d2.d2.config.keys import check_keys
from expedite_d2.d2.config.rules import SOLVER_KEYS, check
from expedite_d2.d2.engine.muon import Muon
from expedite_d2.d2.provider import CfgNode

# Tables, embeddings and scales that Mask2Former, Swin, SwinV2 and ViT never decay.
_NO_DECAY = (
    "relative_position_bias_table",
    "absolute_pos_embed",
    "pos_embed",
    "cls_token",
    "logit_scale",
)
# SwinV2's bias of positions, a small network.
_POSITION_MLP = ".cpb_mlp."


def build_optimizers(cfg: CfgNode, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """Optimizers by name: ``{"optimizer": AdamW}``, or Muon for the weight matrices beside it.

    Parameter groups follow Mask2Former: the backbone learns at ``BACKBONE_MULTIPLIER``,
    normalisation layers, embeddings and position tables have their own weight decay. A multiplier
    of 0 freezes the backbone: its parameters get no gradients, and training costs less.
    ``SOLVER.OPTIMIZER "MUON"`` gives the weights of linear layers to Muon, its steps scaled so that
    one learning rate serves both optimizers.

    Raises:
        ValueError: a key of ``SOLVER`` that cannot be.
    """
    check_keys(cfg, "SOLVER")
    check(cfg, SOLVER_KEYS)
    name = cfg.SOLVER.OPTIMIZER
    if cfg.SOLVER.BACKBONE_MULTIPLIER == 0:
        model.get_submodule("backbone").requires_grad_(False)
    matrices: list[dict] = []
    others: list[dict] = []
    for path, module, leaf, parameter in _named_parameters(model):
        group = {
            "params": [parameter],
            "lr": cfg.SOLVER.BASE_LR
            * (cfg.SOLVER.BACKBONE_MULTIPLIER if path.startswith("backbone.") else 1.0),
            "weight_decay": _weight_decay(cfg, path, module, leaf),
        }
        is_hidden = isinstance(module, nn.Linear) and _POSITION_MLP not in path
        is_matrix = is_hidden and parameter.ndim == 2
        (matrices if name == "MUON" and is_matrix else others).append(group)
    optimizers: dict[str, torch.optim.Optimizer] = {
        "optimizer": torch.optim.AdamW(others, lr=cfg.SOLVER.BASE_LR)
    }
    if matrices:
        optimizers["matrix_optimizer"] = Muon(matrices, lr=cfg.SOLVER.BASE_LR)
    return optimizers


def _named_parameters(
    model: nn.Module,
) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """(path, owner, name in the owner, parameter) of each trainable parameter, once."""
    seen: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                yield f"{prefix}.{leaf}", module, leaf, parameter


def _weight_decay(cfg: CfgNode, path: str, module: nn.Module, leaf: str) -> float:
    norms = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
    if leaf in _NO_DECAY or _POSITION_MLP in path:
        return 0.0
    if isinstance(module, norms):
        return cfg.SOLVER.WEIGHT_DECAY_NORM
    if isinstance(module, nn.Embedding):
        return cfg.SOLVER.WEIGHT_DECAY_EMBED
    return cfg.SOLVER.WEIGHT_DECAY


def build_lr_scheduler(
    cfg: CfgNode, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up, then ``SOLVER.LR_SCHEDULER_NAME``: multi-step, cosine or polynomial.

    Raises:
        ValueError: a key of ``SOLVER`` that cannot be.
    """
    check_keys(cfg, "SOLVER")
    check(cfg, SOLVER_KEYS)
    solver = cfg.SOLVER
    name = solver.LR_SCHEDULER_NAME

    def decay(step: int) -> float:
        progress = min(step / solver.MAX_ITER, 1.0)
        if name == "WarmupMultiStepLR":
            return solver.GAMMA ** bisect_right(sorted(solver.STEPS), step)
        if name == "WarmupCosineLR":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        floor = solver.POLY_LR_CONSTANT_ENDING
        return max((1.0 - progress) ** solver.POLY_LR_POWER, floor)

    def factor(step: int) -> float:
        if step >= solver.WARMUP_ITERS:
            return decay(step)
        ramp = step / solver.WARMUP_ITERS
        return decay(step) * (solver.WARMUP_FACTOR * (1.0 - ramp) + ramp)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

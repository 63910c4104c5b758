from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from expedite_d2.d2 import CfgNode, comm
from expedite_d2.d2.config import load_config
from expedite_d2.d2.engine.muon import Muon, orthogonalise
from expedite_d2.d2.engine.solver import build_lr_scheduler, build_optimizers


def make_cfg(*opts: str) -> CfgNode:
    return load_config("scenes/panoptic/mask2former_swin_mini.yaml", opts)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"fc": nn.Linear(4, 6), "norm": nn.LayerNorm(6)})
        self.queries = nn.Embedding(3, 6)
        self.head = nn.Linear(6, 2)


def test_orthogonalise_brings_singular_values_near_one() -> None:
    for shape in ((20, 50), (50, 20)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.5
        assert values.max() < 1.3


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon to compare with")
def test_muon_agrees_with_torch() -> None:
    start, gradients = torch.randn(8, 12), [torch.randn(8, 12) for _ in range(3)]
    results = []
    for make in (
        lambda p: Muon([p], lr=0.1, weight_decay=0.05),
        lambda p: torch.optim.Muon([p], lr=0.1, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
    ):
        parameter = nn.Parameter(start.clone())
        optimizer = make(parameter)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        results.append(parameter.detach())
    # torch orthogonalises in bfloat16, and a step changes about 0.1 * 0.2 * sqrt(12) * 0.3.
    torch.testing.assert_close(results[0], results[1], atol=3e-3, rtol=0)


def test_muon_refuses_what_is_not_a_matrix() -> None:
    with pytest.raises(ValueError, match=r"expected matrices, got .* \[3\]"):
        Muon([nn.Parameter(torch.zeros(3))])


def steps_of_muon() -> list[torch.Tensor]:
    """Matrices after two steps; one of them has no gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 12), (12, 8), (4, 30), (3, 3), (5, 7)]
    matrices = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    optimizer = Muon(matrices, lr=0.1)
    for _ in range(2):
        for matrix in matrices[:-1]:
            matrix.grad = torch.randn(matrix.shape, generator=generator)
        optimizer.step()
    return [matrix.detach() for matrix in matrices]


def save_steps_of_muon(root: Path) -> None:
    torch.save(steps_of_muon(), root / f"{comm.get_rank()}.pt")


def test_muon_shared_by_processes_takes_the_same_steps(
    tmp_path: Path, launch_two: Callable[..., None]
) -> None:
    launch_two(save_steps_of_muon, tmp_path)
    alone = steps_of_muon()
    for rank in range(2):
        assert all(map(torch.equal, torch.load(tmp_path / f"{rank}.pt"), alone))


def test_build_optimizers_groups_as_mask2former() -> None:
    model = Small()
    cfg = make_cfg(
        "SOLVER.OPTIMIZER", "ADAMW", "SOLVER.BASE_LR", "1e-2", "SOLVER.BACKBONE_MULTIPLIER", "0.1"
    )  # fmt: skip
    (optimizer,) = build_optimizers(cfg, model).values()
    groups = {id(g["params"][0]): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups}
    assert groups[id(model.backbone["fc"].weight)] == (pytest.approx(1e-3), 0.05)
    assert groups[id(model.backbone["norm"].weight)] == (pytest.approx(1e-3), 0.0)
    assert groups[id(model.queries.weight)] == (pytest.approx(1e-2), 0.0)
    assert groups[id(model.head.weight)] == (pytest.approx(1e-2), 0.05)
    assert len(groups) == len(list(model.parameters()))


def test_a_multiplier_of_zero_freezes_the_backbone() -> None:
    model = Small()
    (optimizer,) = build_optimizers(
        make_cfg("SOLVER.OPTIMIZER", "ADAMW", "SOLVER.BACKBONE_MULTIPLIER", "0.0"), model
    ).values()
    assert not any(p.requires_grad for p in model.backbone.parameters())
    learning = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert learning == {id(p) for p in (model.queries.weight, *model.head.parameters())}


def test_build_optimizers_spares_swin_v2s_positions() -> None:
    model = nn.Module()
    model.attn = nn.Module()
    model.attn.cpb_mlp = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4, bias=False))
    model.attn.logit_scale = nn.Parameter(torch.zeros(4, 1, 1))
    (optimizer,) = build_optimizers(make_cfg("SOLVER.OPTIMIZER", "MUON"), model).values()
    assert len(optimizer.param_groups) == 4
    assert all(group["weight_decay"] == 0 for group in optimizer.param_groups)


def test_build_optimizers_gives_linear_weights_to_muon() -> None:
    model = Small()
    optimizers = build_optimizers(make_cfg("SOLVER.OPTIMIZER", "MUON"), model)
    matrices = {id(g["params"][0]) for g in optimizers["matrix_optimizer"].param_groups}
    assert matrices == {id(model.backbone["fc"].weight), id(model.head.weight)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("WarmupMultiStepLR", [0.5, 1.0, 1.0, 0.1, 0.01]),
        ("WarmupCosineLR", [None, 0.5 * (1 + math.cos(0.1 * math.pi)), None, 0.5, None]),
        ("WarmupPolyLR", [None, 0.9**0.9, None, 0.5**0.9, None]),
    ],
)
def test_build_lr_scheduler_values(name: str, expected: list[float | None]) -> None:
    cfg = make_cfg(
        "SOLVER.LR_SCHEDULER_NAME", name, "SOLVER.MAX_ITER", "100", "SOLVER.STEPS", "(50, 80)",
        "SOLVER.WARMUP_ITERS", "10", "SOLVER.WARMUP_FACTOR", "0.0", "SOLVER.BASE_LR", "1.0",
    )  # fmt: skip
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_lr_scheduler(cfg, optimizer)
    factors = []
    for _ in range(100):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    for step, value in zip((5, 10, 49, 50, 80), expected, strict=True):
        if value is not None:
            assert factors[step] == pytest.approx(value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("OPTIMIZER", "SGD", "one of 'ADAMW', 'MUON', got 'SGD'"),
        ("LR_SCHEDULER_NAME", "StepLR", "one of 'WarmupMultiStepLR', .*, got 'StepLR'"),
        ("BASE_LR", "-1.0", "a number of at least 0, got -1.0"),
        ("BASE_LR", "fast", "of type float, such as .*, got fast of type str"),
        ("WEIGHT_DECAY", "-0.1", "a number of at least 0, got -0.1"),
        ("BACKBONE_MULTIPLIER", "-0.1", "a number of at least 0, got -0.1"),
        ("MAX_ITER", "0", "an integer of at least 1, got 0"),
        ("CHECKPOINT_PERIOD", "0", "an integer of at least 1, got 0"),
        ("STEPS", "('x',)", r"a list of numbers, got \('x',\)"),
        ("WARMUP_ITERS", "-1", "an integer of at least 0, got -1"),
    ],
)
def test_solver_names_a_bad_key(key: str, value: str, message: str) -> None:
    model = Small()
    with pytest.raises(ValueError, match=f"SOLVER.{key} must be {message}"):
        build_optimizers(make_cfg(f"SOLVER.{key}", value), model)
    cfg = make_cfg()
    cfg.SOLVER[key] = "nonsense"
    with pytest.raises(ValueError, match=f"SOLVER.{key} must be .*, got 'nonsense'"):
        build_lr_scheduler(cfg, torch.optim.SGD(model.parameters(), lr=1.0))

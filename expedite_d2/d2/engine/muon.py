"""The Muon optimizer in float32, for small models on CPUs, its work shared by processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from expedite_d2.d2.provider import comm

# Coefficients of the quintic Newton-Schulz iteration and its momentum, from Muon's author.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5
_MOMENTUM = 0.95
# Gives an update the root mean square of AdamW's, so that one learning rate serves both.
_ADAMW_RMS = 0.2


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for the weight matrices of hidden layers.

    ``torch.optim.Muon`` does the same in bfloat16. Its orthogonalisation took 3 to 5 times as long
    on a CPU without bfloat16 arithmetic (matrices of 96x384 to 384x1536). Source: Jordan et al.,
    "Muon: An optimizer for hidden layers in neural networks", 2024; step size after arXiv
    2502.16982.

    Args:
        params: matrices, or groups of them.
        lr: learning rate, on AdamW's scale.
        weight_decay: decoupled weight decay.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(
                        f"Muon: expected matrices, got a parameter of shape {[*parameter.shape]}"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pairs = [
            (group, parameter)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        targets = []
        for _, parameter in pairs:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            momentum = state["momentum_buffer"].lerp_(parameter.grad, 1 - _MOMENTUM)
            targets.append(parameter.grad.lerp(momentum, _MOMENTUM))
        for (group, parameter), update in zip(pairs, _orthogonalise_all(targets), strict=True):
            step_size = group["lr"] * _ADAMW_RMS * max(parameter.shape) ** 0.5
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-step_size)
        return loss


def _orthogonalise_all(matrices: list[Tensor]) -> list[Tensor]:
    """Each matrix orthogonalised; in a distributed run every process computes its share of them."""
    rank, world = comm.get_rank(), comm.get_world_size()
    if world == 1:
        return [orthogonalise(matrix) for matrix in matrices]
    # The largest first, each to the process with the least to do: Newton-Schulz of an (M, N) matrix
    # multiplies min(M, N) * M * N numbers.
    costs = [min(matrix.shape) * matrix.numel() for matrix in matrices]
    owners, loads = [0] * len(matrices), [0] * world
    for i in sorted(range(len(matrices)), key=costs.__getitem__, reverse=True):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]
    flat = torch.cat([matrix.flatten() for matrix in matrices]).zero_()
    results = [
        part.view_as(matrix)
        for part, matrix in zip(flat.split([m.numel() for m in matrices]), matrices, strict=True)
    ]
    for result, matrix, owner in zip(results, matrices, owners, strict=True):
        if owner == rank:
            result.copy_(orthogonalise(matrix))
    torch.distributed.all_reduce(flat)  # a sum with zeros: the same bits everywhere
    return results


def orthogonalise(matrix: Tensor) -> Tensor:
    """The matrix with singular values near 1, by five Newton-Schulz steps: (M, N) -> (M, N)."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.T if tall else x

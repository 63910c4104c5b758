"""The formulation of the method's released code, written plainly: dense and masked.

Distances of all N tokens to all K centres, of which a mask then leaves the neighbourhood; weights
of all K centres, of which a threshold leaves the topk; a product of that N x K matrix with the
centres. The weights are normalised as our operators do it, so that results can be compared.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _windows(x: Tensor, side: tuple[int, int]) -> Tensor:
    """(B, H, W, C) -> (B * windows, N, C); H and W are multiples of the window."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // side[0], side[0], width // side[1], side[1], channels)
    return x.transpose(2, 3).reshape(-1, side[0] * side[1], channels)


def _map(x: Tensor, side: tuple[int, int], shape: tuple[int, int, int]) -> Tensor:
    """(B * windows, N, C) -> (B, H, W, C)."""
    batch, height, width = shape
    x = x.view(batch, height // side[0], width // side[1], side[0], side[1], -1)
    return x.transpose(2, 3).reshape(batch, height, width, -1)


def _tau(temperature: float, spread: Tensor | None, windows: int) -> Tensor | float:
    if spread is None:
        return temperature
    return (temperature / spread).repeat_interleave(windows // spread.shape[0])[:, None, None]


def _distances(z: Tensor, s: Tensor) -> Tensor:
    return torch.cdist(z, s, compute_mode="use_mm_for_euclid_dist").square()


def cluster(
    tokens: Tensor,
    clusters: tuple[int, int],
    window: tuple[int, int] | None,
    iterations: int,
    neighbourhood: int,
    temperature: float,
    spread: Tensor | None,
) -> Tensor:
    """Centres as `token_cluster` gives them, through dense masked N x K matrices."""
    batch, height, width, channels = tokens.shape
    side = window or (height, width)
    z = _windows(tokens.float(), side)
    grid = z.transpose(1, 2).unflatten(2, side)
    s = torch.nn.functional.adaptive_avg_pool2d(grid, clusters).flatten(2).transpose(1, 2)
    far = []
    for length, cells in zip(side, clusters, strict=True):
        home = torch.arange(length, device=z.device) * cells // length
        cell = torch.arange(cells, device=z.device)
        far.append((home[:, None] - cell).abs() > neighbourhood // 2)
    mask = far[0][:, None, :, None] | far[1][None, :, None, :]
    mask = mask.reshape(side[0] * side[1], clusters[0] * clusters[1])
    tau = _tau(temperature, spread, z.shape[0])
    for _ in range(iterations):
        logits = (-tau * _distances(z, s)).masked_fill(mask, -torch.inf)
        q = logits.softmax(2).transpose(1, 2)
        s = q @ z / q.sum(2, keepdim=True).clamp_min(1e-30)
    size = (height // side[0] * clusters[0], width // side[1] * clusters[1])
    return _map(s, clusters, (batch, *size)).to(tokens.dtype)


def dense_weights(
    tokens: Tensor,
    centres: Tensor,
    clusters: tuple[int, int],
    window: tuple[int, int] | None,
    topk: int,
    temperature: float,
    spread: Tensor | None,
) -> Tensor:
    """Weights of all centres for each token, (B * windows, N, K), zero but for the topk nearest."""
    z = _windows(tokens.float(), window or (tokens.shape[1], tokens.shape[2]))
    s = _windows(centres.float(), clusters)
    logits = -_tau(temperature, spread, z.shape[0]) * _distances(z, s)
    least = logits.topk(topk, dim=2).values[..., -1:]
    return logits.masked_fill(logits < least, -torch.inf).softmax(2)


def reconstruct(
    refined: Tensor,
    weights: Tensor,
    clusters: tuple[int, int],
    window: tuple[int, int] | None,
    tokens: Tensor,
    centres: Tensor,
) -> Tensor:
    """Tokens plus what their centres gained, through a product with the dense weights."""
    batch, height, width, _ = tokens.shape
    gained = _windows(refined.float() - centres.float(), clusters)
    spread = _map(weights @ gained, window or (height, width), (batch, height, width))
    return (tokens.float() + spread).to(tokens.dtype)

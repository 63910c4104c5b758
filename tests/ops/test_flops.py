"""The operators' formulas in torch's own counter, by the definition of what they do."""

from __future__ import annotations

import math

import deform_cases
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from expedite_d2 import ops
from expedite_d2.ops.pairs import candidate_pairs, match_pairs

GRID, CHANNELS, CLUSTERS = (24, 20), 3, (5, 4)
each_window = pytest.mark.parametrize("window", [None, (8, 8)])
each_device = pytest.mark.parametrize("device", ["cpu", "meta"])


def counted(run) -> dict[str, int]:
    """Multiply-adds by operator, of which torch counts two each."""
    with FlopCounterMode(display=False) as counter:
        run()
    flops = counter.get_flop_counts()["Global"]
    assert all(count % 2 == 0 for count in flops.values())
    return {str(name).removeprefix("expedite_d2."): count // 2 for name, count in flops.items()}


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


def work(window) -> tuple[int, int, int]:
    """Values of a batch of two, of its candidate pairs, and of all pairs of a window."""
    near, every = (brute_force_pairs(GRID, CLUSTERS, window or GRID, n) for n in (3, 99))
    return (2 * CHANNELS * math.prod(GRID), 2 * CHANNELS * near, 2 * CHANNELS * every)


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
    assert candidate_pairs(grid, clusters, window, neighbourhood) == brute_force_pairs(
        grid, clusters, window, neighbourhood
    )
    everything = 2 * max(clusters) + 1
    assert match_pairs(grid, clusters, window) == brute_force_pairs(
        grid, clusters, window, everything
    )


def test_flops_are_known_of_every_operator():
    names = {
        name.removeprefix("expedite_d2::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("expedite_d2::")
    }
    assert {"token_cluster", "_ms_deform_attn_backward"} < names
    for name in names:
        assert getattr(torch.ops.expedite_d2, name) in flop_registry, name


@each_window
@each_device
def test_flops_of_each_step(window, device):
    tokens = torch.ones(2, *GRID, CHANNELS, device=device)

    def hourglass() -> None:
        spread = ops.token_spread(tokens, CLUSTERS, window=window, neighbourhood=3)
        common = {"window": window, "temperature": 8.0, "spread": spread}
        centres = ops.token_cluster(tokens, CLUSTERS, iterations=2, neighbourhood=3, **common)
        indices, weights = ops.token_match(tokens, centres, CLUSTERS, topk=4, **common)
        ops.token_reconstruct(centres, indices, weights, tokens=tokens, centres=centres)

    values, near, every = work(window)
    assert counted(hourglass) == {
        "token_spread": values + near,
        "token_cluster": values + 2 * 2 * near,
        "token_match": every,
        "token_reconstruct": 4 * values,
    }


@each_window
@each_device
@pytest.mark.parametrize("automatic", [False, True])
def test_flops_of_a_reduction_are_those_of_its_parts(window, device, automatic):
    tokens = torch.ones(2, *GRID, CHANNELS, device=device)
    settings = {"window": window, "iterations": 2, "neighbourhood": 3, "temperature": 8.0}
    found = counted(lambda: ops.token_reduce(tokens, CLUSTERS, automatic=automatic, **settings))
    values, near, every = work(window)
    spread = values + near if automatic else 0
    assert found == {"token_reduce": spread + values + 2 * 2 * near + every}


@each_device
def test_flops_of_gradients(device):
    tokens = torch.ones(2, *GRID, CHANNELS, device=device, requires_grad=True)

    def train() -> None:
        reduced = ops.token_reduce(
            tokens, CLUSTERS, iterations=2, neighbourhood=3, topk=4, temperature=8.0
        )
        ops.token_reconstruct(reduced.centres, reduced.indices, reduced.weights).sum().backward()

    values, near, every = work(None)
    assert counted(train) == {
        "token_reduce": values + 2 * 2 * near + every,
        "token_reconstruct": 4 * values,
        "_token_reconstruct_backward": 4 * values,
        # The assignments are found again, and what they gather is now the gradient.
        "_token_cluster_backward": values + 2 * 2 * near,
    }


@each_device
def test_flops_of_merging(device):
    # 13 tokens of 5 channels: 7 even ones, 6 odd ones.
    tokens = torch.ones(2, 13, 5, device=device, requires_grad=True)
    sizes = torch.ones(2, 13, device=device)

    def merge(number: int) -> None:
        merged = ops.token_merge(tokens, sizes, number)
        ops.token_pool(tokens, merged.places, 13 - number).sum().backward()

    # Lengths, cosines, scores, and each of what merges with its partner.
    cost = 2 * 5 * (13 + 7 * 6 + 7 + 2 * 4)
    assert counted(lambda: merge(4)) == {"token_merge": cost, "token_pool": 2 * 13 * 5}
    assert counted(lambda: merge(0)) == {"token_merge": 0, "token_pool": 2 * 13 * 5}


@each_device
def test_flops_of_deformable_attention(device):
    case = deform_cases.CASES["odd"]
    value, _, _, locations, weights = (
        x.to(device).requires_grad_() if isinstance(x, torch.Tensor) else x
        for x in deform_cases.make_args(case)
    )
    shapes = list(case.shapes)
    found = counted(
        lambda: ops.ms_deform_attn(value, shapes, None, locations, weights).sum().backward()
    )
    # Images, queries, heads, levels, points, channels: a blend of four values each.
    sampled = 4 * (2 * 7 * 3 * 2 * 3 * 9)
    assert found == {"ms_deform_attn": sampled, "_ms_deform_attn_backward": 4 * sampled}

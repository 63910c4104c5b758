"""Merging: its settings, its arithmetic by hand, and how it is undone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from expedite_d2.reducers import Grid, Merge, Points, Reduction, State


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((-1, 0.8), "at must be an integer >= 0, or several, got -1"),
        ((1.5, 0.8), "at must be an integer >= 0, or several, got 1.5"),
        (((), 0.8), r"at must be an integer >= 0, or several, got \(\)"),
        (((1, True), 0.8), "at must be an integer"),
        ((1, 0.4), "keep must be at least 0.5 and less than 1, got 0.4"),
        ((1, 1), "keep must be at least 0.5 and less than 1, got 1"),
        ((1, float("nan")), "keep must be at least 0.5"),
        ((1, "half"), "keep must be at least 0.5 and less than 1, got 'half'"),
        ((1, 0.8, -1), "rounds must be an integer >= 0, got -1"),
    ],
)
def test_merge_refuses(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Merge(*settings)


def test_several_places_are_as_many_merges() -> None:
    several = Reduction(Merge([1, np.int64(4)], np.float32(0.5), rounds=np.int32(2)))  # type: ignore
    assert several == Reduction((Merge(1, 0.5, 2), Merge(4, 0.5, 2)))
    assert [type(step.at) for step in several.steps] == [int, int] and several.alpha == 1


def test_number_of_merged_tokens_is_that_of_the_decimal_share() -> None:
    # 1 - 0.8, 1 - 0.71 and 1 - 0.7 are a little off in binary.
    counts = {(0.8, 10): 2, (0.8, 15): 3, (0.71, 100): 29, (0.7, 10): 3, (0.5, 7): 3, (0.9, 9): 0}
    assert {case: Merge(0, case[0]).merged(case[1]) for case in counts} == counts


# Even tokens at places 0, 2, 4: their partners are at 1, 1, 3 with cosines 1, 0.6, 1.
LINE = [[[2.0, 0.0]], [[1.0, 0.0]], [[0.6, 0.8]], [[0.0, 3.0]], [[0.0, 1.0]]]


def test_merge_by_hand() -> None:
    z = torch.tensor(LINE).transpose(0, 1).view(1, 5, 1, 2)
    reduction = Reduction(Merge(0, 0.6))
    low, state = reduction.enter(z, State.of_image(5, 1), 0, None)
    # Left are the even token 2, and the odd ones with what became part of them.
    torch.testing.assert_close(low, torch.tensor([[[0.6, 0.8], [1.5, 0.0], [0.0, 2.0]]]))
    assert isinstance(state.layout, Points) and state.layout.groups is None
    assert state.layout.sizes.tolist() == [[1.0, 2.0, 2.0]]
    changed = low + torch.tensor([[[10.0, 0.0], [20.0, 0.0], [30.0, 0.0]]])
    expected = z.flatten(1, 2).clone()
    expected[0, :, 0] += torch.tensor([20.0, 20.0, 10.0, 30.0, 30.0])
    torch.testing.assert_close(state.reconstruct(changed), expected)


def test_replace_gives_each_token_its_mean() -> None:
    z = torch.tensor(LINE).transpose(0, 1).view(1, 5, 1, 2)
    low, state = Reduction(Merge(0, 0.6), "replace").enter(z, State.of_image(5, 1), 0, None)
    assert torch.equal(state.reconstruct(low), low[:, [1, 1, 0, 2, 2]])


def test_merges_in_a_row_weigh_by_size_and_are_undone_in_reverse() -> None:
    z = tokens(2, 6, 5, 4)
    reduction = Reduction(Merge((0, 1), 0.7))
    x, state = reduction.enter(z, State.of_image(6, 5), 0, None)
    first = x
    x, state = reduction.enter(x.sin(), state, 1, None)
    assert x.shape == (2, 15, 4) and isinstance(state.layout, Points)  # 30 -> 21 -> 15
    assert state.layout.sizes.sum(1).tolist() == [30.0, 30.0]
    # Nothing was added after the second merge: its undoing gives back what entered it.
    torch.testing.assert_close(
        state.reconstruct(x), state.steps[0].reconstruct(first.sin()), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_rounds_group_the_kept_tokens(rounds: int) -> None:
    z = tokens(2, 8, 8, 6)
    low, state = Reduction(Merge(0, 0.75, rounds)).enter(z, State.of_image(8, 8), 0, None)
    assert low.shape == (2, 48, 6) and isinstance(state.layout, Points) and state.layout.groups
    places, count = state.layout.groups
    # Each round leaves n - (n // 2 - 1) of n: 48, 25, 14, 8.
    assert count == [25, 14, 8][rounds - 1] and places.shape == (2, 48)
    assert all(sorted(set(image.tolist())) == list(range(count)) for image in places)


def test_groups_of_a_round_hold_what_is_alike() -> None:
    ways = torch.eye(4).repeat_interleave(4, 0)  # four tokens of each of four directions
    z = (ways + 0.01 * tokens(16, 4)).view(1, 4, 4, 4)
    _, state = Reduction(Merge(0, 0.9, 2)).enter(z, State.of_image(4, 4), 0, None)
    assert isinstance(state.layout, Points) and state.layout.groups
    low, _ = Reduction(Merge(0, 0.9)).enter(z, State.of_image(4, 4), 0, None)
    places, direction = state.layout.groups.places[0], low[0].argmax(1)
    for group in set(places.tolist()):
        assert len(set(direction[places == group].tolist())) == 1


def test_tokens_around_are_groups_of_their_own() -> None:
    z = tokens(1, 4, 4, 3)
    _, state = Reduction(Merge(0, 0.75, 1)).enter(z, State.of_image(4, 4), 0, None)
    assert isinstance(state.layout, Points) and state.layout.groups
    groups = state.layout.groups
    places, count = groups.between(2, 1)
    assert count == groups.total + 3 and places.dtype == torch.int32
    assert places[0].tolist() == [0, 1, *(groups.places[0] + 2).tolist(), count - 1]


def test_too_few_tokens_run_unreduced_with_a_warning() -> None:
    z = tokens(1, 2, 2, 3)
    with pytest.warns(UserWarning, match="4 tokens are too few to keep 0.9 of them"):
        low, state = Reduction(Merge(0, 0.9)).enter(z, State.of_image(2, 2), 0, None)
    assert torch.equal(low, z.flatten(1, 2)) and torch.equal(state.reconstruct(low), low)


def test_windows_are_refused() -> None:
    with pytest.raises(ValueError, match="Merge takes encoders without windows alone"):
        Merge(0, 0.8).reduce(tokens(1, 4, 4, 3), Grid(4, 4), (2, 2), True)

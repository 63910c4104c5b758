"""Settings: what they may be, as values, and in files."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from settings_cases import clustered

from expedite_d2.reducers import Cluster, Merge, Reduction


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"at": -1}, r"at \(alpha\) must be an integer >= 0, got -1"),
        ({"at": 1.0}, r"at \(alpha\) must be an integer >= 0, got 1.0"),
        ({"at": True}, r"at \(alpha\) must be an integer >= 0, got True"),
        ({"iterations": -1}, "iterations must be an integer >= 0, got -1"),
        ({"neighbourhood": 4}, "neighbourhood must be odd, got 4"),
        ({"neighbourhood": -1}, "neighbourhood must be an integer >= 1, got -1"),
        ({"topk": 0}, "topk must be an integer >= 1, got 0"),
        ({"temperature": -0.5}, "temperature must be a finite number >= 0 .*, got -0.5"),
        ({"temperature": float("nan")}, "temperature must be a finite number .*, got nan"),
        ({"temperature": float("inf")}, "temperature must be a finite number .*, got inf"),
        ({"temperature": "auto"}, "temperature must be a finite number .*, got 'auto'"),
        ({"grid": (8,)}, r"grid \(clusters\) must be two sizes >= 1.*, got \(8,\)"),
        ({"grid": 8}, r"grid \(clusters\) must be two sizes >= 1.*, got 8"),
        ({"grid": (0, 8)}, r"grid \(clusters\) must be two sizes .*, got \(0, 8\)"),
        ({"grid": (8, 0.5)}, r"grid \(clusters\) must be two sizes .*, got \(8, 0.5\)"),
        ({"grid": (1.0, 0.5)}, r"two ratios between 0 and 1.*, got \(1.0, 0.5\)"),
        ({"grid": (True, 8)}, r"grid \(clusters\) must be two sizes .*, got \(True, 8\)"),
    ],
)
def test_cluster_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cluster(**{"at": 3, "grid": (8, 8), **changes})


def test_reduction_is_a_value() -> None:
    reduction = clustered(3, [8, 6])  # type: ignore[arg-type]  # as a YAML gives it
    assert reduction == clustered(3, (8, 6)) and hash(reduction) == hash(clustered(3, (8, 6)))
    assert pickle.loads(pickle.dumps(reduction)) == reduction
    with pytest.raises(dataclasses.FrozenInstanceError):
        reduction.steps = ()  # type: ignore[misc]


@pytest.mark.parametrize(
    ("clusters", "size", "expected"),
    [
        ((8, 6), (12, 12), (8, 6)),
        ((0.5, 0.5), (12, 7), (6, 4)),
        ((0.66, 0.34), (12, 12), (8, 4)),
        ((0.1, 0.9), (4, 10), (1, 9)),
    ],
)
def test_reduction_grid(clusters: Any, size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert clustered(0, clusters).cluster.cells(*size) == expected


def test_reduction_tells_what_is_left_of_an_image() -> None:
    assert clustered(1, (5, 6)).cluster.reduced(6, 6) == (5, 6)
    assert clustered(1, (5, 6)).cluster.reduced(3, 11) == (5, 6)
    assert clustered(1, (5, 6)).cluster.reduced(3, 10) == (3, 10)
    assert clustered(1, (0.5, 0.25)).cluster.reduced(6, 8) == (3, 2)


@pytest.mark.parametrize(
    ("steps", "mode", "message"),
    [
        ((), "residual", r"one or more, each before a later block than the last, got \[\]"),
        (3, "residual", "steps must be a Cluster, or one or more Merges, got 3"),
        (((8, 8),), "residual", "steps must be a Cluster, or one or more Merges"),
        ((Cluster(3, (8, 8)), Cluster(3, (4, 4))), "residual", r"each before a later .*\[3, 3\]"),
        ((Cluster(3, (8, 8)), Cluster(5, (4, 4))), "residual", "no other step beside a Cluster"),
        ((Cluster(3, (8, 8)), Merge(5, 0.8)), "residual", "no other step beside a Cluster"),
        (Merge((5, 3), 0.8), "residual", r"each before a later block than the last, got \[5, 3\]"),
        (Cluster(3, (8, 8)), "mean", "reconstruction must be 'residual' or 'replace', got 'mean'"),
    ],
)
def test_reduction_refuses(steps: Any, mode: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reduction(steps, mode)


@pytest.mark.parametrize(
    "settings",
    [
        (np.arange(4, 8)[2], (8, 8)),
        (6, tuple(np.array([8, 8]))),
        (np.int32(6), list(np.array([8, 8], np.uint8))),
        (6, tuple(np.linspace(0.5, 0.5, 2))),
        (6, tuple(np.float32([0.5, 0.5]))),
    ],
    ids=str,
)
def test_numbers_of_numpy_are_taken(settings: Any) -> None:
    cluster = Cluster(*settings, temperature=np.float32(0.5), topk=np.int64(4))
    grid = (8, 8) if cluster.grid[0] == 8 else (0.5, 0.5)
    assert cluster == Cluster(6, grid, temperature=0.5)
    values = (cluster.at, *cluster.grid, cluster.temperature, cluster.topk)
    assert {type(value) for value in values} <= {int, float}


def test_a_single_step_may_be_given_by_itself() -> None:
    assert Reduction(Cluster(3, (8, 8))) == clustered(3, (8, 8))  # type: ignore[arg-type]
    assert clustered(3, (8, 8)).alpha == 3
    assert clustered(3, (8, 8)).with_temperature(0.5) == clustered(3, (8, 8), temperature=0.5)


# ---- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reduction",
    [
        clustered(9, (8, 8)),
        clustered(0, (0.5, 0.66), "replace", iterations=1, neighbourhood=3, topk=1),
        clustered(6, (8, 6), temperature=0.0542),
        Reduction(Merge((1, 4, 7), 0.8)),
        Reduction((Merge(2, 0.9), Merge(5, 0.5, rounds=2)), "replace"),
    ],
    ids=str,
)
def test_settings_round_trip_through_a_file(reduction: Reduction, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    reduction.save(path)
    assert Reduction.load(path) == reduction
    assert sorted(tmp_path.iterdir()) == [path]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte-order mark
    assert Reduction.load(str(path)) == reduction


def test_settings_by_hand_may_leave_out_what_has_a_default() -> None:
    text = "version: 1\nsteps: [{cluster: {at: 9, grid: [8, 8]}}]\n"
    assert Reduction.from_yaml(text) == clustered(9, (8, 8))


ONE = "version: 1\nsteps: [{cluster: {at: 9, grid: [8, 8]}}]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "",
            "the settings must be a mapping of correction, .* version, got None",
        ),
        ("- 1", "the settings must be a mapping"),
        ("{", "settings are not YAML"),
        ("steps: []", "settings must be of version 1, got None"),
        (ONE.replace("1", "2", 1), "settings must be of version 1, got 2"),
        (ONE + "alpha: 9\n", "the settings may have .*, got 'alpha'"),
        ("version: 1", "steps must be a list of steps, got None"),
        ("version: 1\nsteps: []", "steps must be one or more"),
        (ONE.replace("at", "art"), "cluster may have .*, got 'art'"),
        (ONE.replace("at: 9, ", ""), "cluster must have at, got"),
        (ONE.replace("cluster", "closter"), "a step may have cluster, merge, got 'closter'"),
        (ONE.replace("9", "-9"), r"at \(alpha\) must be an integer >= 0, got -9"),
        (ONE.replace("9", "x"), r"at \(alpha\) must be an integer >= 0, got 'x'"),
        (ONE + "reconstruction: mean\n", "reconstruction must be 'residual' or 'replace'"),
        (ONE.replace("cluster: {at: 9, grid: [8, 8]}", "merge: {at: 1}"), "merge must have keep"),
        (ONE + "correction: ../a.safetensors\n", "correction must be a file in the folder of"),
        (ONE + "correction: 1\n", "correction must be a file in the folder of the settings, got 1"),
        ("!!python/object/apply:os.getcwd []", "settings are not YAML"),
    ],
)
def test_settings_files_are_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"(?s)settings.yaml: .*{message}"):
        Reduction.load(path)


def test_settings_files_that_are_not_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="settings.yaml"):
        Reduction.load(path)
    with pytest.raises(FileNotFoundError):
        Reduction.load(tmp_path / "none.yaml")


def test_steps_that_a_file_does_not_know_are_not_written(tmp_path: Path) -> None:
    class Own(NamedTuple):
        at: int

        def reduce(self, tokens: Any, layout: Any, window: Any, residual: bool) -> Any:
            return tokens

    with pytest.raises(ValueError, match="a file holds cluster, merge alone, got Own"):
        Reduction((Own(1),)).save(tmp_path / "settings.yaml")
    assert not list(tmp_path.iterdir())

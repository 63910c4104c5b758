"""The settings of an hourglass: which steps reduce the tokens, and how they are undone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

from torch import Tensor, nn

from expedite_d2.reducers import settings_file
from expedite_d2.reducers.cluster import Cluster
from expedite_d2.reducers.correction import Correction
from expedite_d2.reducers.merge import Merge
from expedite_d2.reducers.state import Grid, Points, State, Undo

Reconstruction = Literal["residual", "replace"]


@runtime_checkable
class Step(Protocol):
    """One reduction of the tokens before one block: a frozen value, compared by its settings."""

    @property
    def at(self) -> int:
        """Number of the block, counted from the first of the encoder, which is 0."""

    def reduce(
        self,
        tokens: Tensor,
        layout: Grid | Points,
        window: tuple[int, int] | None,
        residual: bool,
    ) -> tuple[Tensor, Grid | Points, Undo]:
        """Reduces the number of tokens.

        Args:
            tokens: (B, H, W, C) on a grid, or (B, N, C) after a step that left no grid.
            layout: how they are laid out.
            window: rows and columns of the windows that the encoder attends in, or None.
            residual: whether the tokens keep their own detail when the step is undone.

        Returns:
            The reduced tokens, (B, h, w, C) or (B, n, C), their layout, and how the step is undone.
        """


@dataclass(frozen=True)
class Reduction:
    """How, and from which block on, an encoder runs on fewer tokens.

    Attributes:
        steps: the reductions in the order of their blocks; a single one need not be in a tuple.
        reconstruction: "residual" adds to each token what the blocks added to its clusters;
            "replace", as in the paper, replaces the token by its clusters.
        correction: the detail maps that `calibrate` fitted to one encoder, for "residual".
    """

    steps: tuple[Step, ...]
    reconstruction: Reconstruction = "residual"
    correction: Correction | None = None

    if TYPE_CHECKING:  # it takes more than what it keeps

        def __init__(
            self,
            steps: Step | Merge | Iterable[Step | Merge],
            reconstruction: Reconstruction = "residual",
            correction: Correction | None = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        steps: Any = self.steps
        steps = (steps,) if isinstance(steps, Step) else steps
        if not isinstance(steps, Iterable) or not all(isinstance(s, Step) for s in steps):
            raise ValueError(f"steps must be a Cluster, or one or more Merges, got {steps!r}")
        steps = tuple(
            single
            for step in steps
            for single in (step.each() if isinstance(step, Merge) else (step,))
        )
        places = [step.at for step in steps]
        if not places or any(a >= b for a, b in zip(places, places[1:], strict=False)):
            raise ValueError(
                f"steps must be one or more, each before a later block than the last, got {places}"
            )
        if len(steps) > 1 and any(isinstance(step, Cluster) for step in steps):
            raise ValueError(f"steps must hold no other step beside a Cluster, got {len(steps)}")
        if self.reconstruction not in get_args(Reconstruction):
            expected = " or ".join(repr(mode) for mode in get_args(Reconstruction))
            raise ValueError(f"reconstruction must be {expected}, got {self.reconstruction!r}")
        if self.correction is not None:
            self._check_correction(steps)
        object.__setattr__(self, "steps", steps)

    def _check_correction(self, steps: tuple[Step, ...]) -> None:
        if not isinstance(self.correction, Correction):
            raise ValueError(f"correction must be a Correction, got {self.correction!r}")
        if self.reconstruction != "residual":
            raise ValueError("correction must be None with reconstruction 'replace'")
        for number, (weights, _) in self.correction.maps.items():
            before = sum(step.at <= number for step in steps)
            if len(weights) != before or not before:
                raise ValueError(
                    f"correction must have a map of each step before block {number}, of which "
                    f"there are {before}, got {len(weights)}"
                )

    @property
    def alpha(self) -> int:
        """Number of blocks that run at full resolution, those before the first step."""
        return self.steps[0].at

    def enter(
        self, tokens: Tensor, state: State, number: int, window: tuple[int, int] | None
    ) -> tuple[Tensor, State]:
        """Runs the step that precedes a block, if there is one.

        Args:
            tokens: (B, H, W, C) or (B, N, C), without prefixes.
            state: the state of the tokens.
            number: the number of the block.
            window: rows and columns of the windows that the encoder attends in, or None.
        """
        for step in self.steps:
            if step.at == number:
                residual = self.reconstruction == "residual"
                tokens, layout, undo = step.reduce(tokens, state.layout, window, residual)
                steps = (*state.steps, undo)
                state = state._replace(layout=layout, steps=steps, positions=None)
        return tokens, state

    @property
    def cluster(self) -> Cluster:
        """The first step, which must be a Cluster.

        Raises:
            ValueError: it is another step.
        """
        step = self.steps[0]
        if not isinstance(step, Cluster):
            raise ValueError(f"this encoder takes a Cluster alone, got {type(step).__name__}")
        return step

    def with_temperature(self, temperature: float) -> Reduction:
        """Returns the same settings with another temperature of the Cluster."""
        return replace(self, steps=(replace(self.cluster, temperature=temperature),))

    def to_yaml(self) -> str:
        """Returns the settings as the text of a YAML file, which `from_yaml` reads."""
        return settings_file.to_yaml(self)

    @staticmethod
    def from_yaml(text: str) -> Reduction:
        """Reads the text of a settings file.

        Raises:
            ValueError: not YAML, another version, unknown keys, or invalid settings.
        """
        return settings_file.from_yaml(text)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the settings to a YAML file, and the tensors of a correction beside it.

        Both appear whole or not at all.
        """
        settings_file.save(self, Path(path))

    @staticmethod
    def load(path: str | PathLike[str]) -> Reduction:
        """Reads the settings from a YAML file.

        Raises:
            FileNotFoundError: there is no such file, or no file of the tensors that it names.
            ValueError: not a file of settings; the message names it.
        """
        return settings_file.load(Path(path))


class Expeditable(ABC):
    """An encoder that runs on fewer tokens by itself, without overrides.

    Attributes:
        reduction: its settings, None where it runs on all tokens; may be set at any time.
    """

    reduction: Reduction | None

    @abstractmethod
    def reducible_blocks(self) -> Sequence[nn.Module]:
        """Returns the blocks that a step may precede, from the first of the encoder on."""

    @abstractmethod
    def read_outs(self) -> Sequence[int]:
        """Returns the numbers of the blocks whose outputs are reconstructed, in order."""

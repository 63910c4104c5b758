"""The settings of an hourglass: which steps reduce the tokens, and how they are undone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from torch import Tensor, nn

from expedite_d2.files import replacing
from expedite_d2.reducers.cluster import Cluster
from expedite_d2.reducers.state import Grid, Points, State, Undo

Reconstruction = Literal["residual", "replace"]

# Version of the YAML files, incremented when an older reader would misunderstand a newer file.
VERSION = 1


@runtime_checkable
class Step(Protocol):
    """One reduction of the tokens before one block: a frozen value, compared by its settings."""

    @property
    def at(self) -> int:
        """Number of the block, counted from the first of the encoder, which is 0."""

    def reduce(
        self, tokens: Tensor, window: tuple[int, int] | None, residual: bool
    ) -> tuple[Tensor, Grid | Points, Undo]:
        """Reduces the number of tokens.

        Args:
            tokens: (B, H, W, C) on a grid, or (B, N, C) after a step that left no grid.
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
    """

    steps: tuple[Step, ...]
    reconstruction: Reconstruction = "residual"

    def __post_init__(self) -> None:
        steps: Any = self.steps
        steps = (steps,) if isinstance(steps, Step) else steps
        if not isinstance(steps, Iterable) or not all(isinstance(s, Step) for s in steps):
            raise ValueError(f"steps must be a Cluster or another step, or several, got {steps!r}")
        steps = tuple(steps)
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
        object.__setattr__(self, "steps", steps)

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
                tokens, layout, undo = step.reduce(tokens, window, residual)
                state = state._replace(layout=layout, steps=(*state.steps, undo))
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
        import yaml

        steps = []
        for step in self.steps:
            name = _STEP_NAMES.get(type(step))
            if name is None:
                raise ValueError(f"a file holds {', '.join(_STEPS)} alone, got {step!r}")
            values = asdict(step)  # type: ignore[call-overload]
            plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
            steps.append({name: plain})
        content = {"version": VERSION, "steps": steps, "reconstruction": self.reconstruction}
        return yaml.safe_dump(content, sort_keys=False, default_flow_style=None)

    @classmethod
    def from_yaml(cls, text: str) -> Reduction:
        """Reads the text of a settings file.

        Raises:
            ValueError: not YAML, another version, unknown keys, or invalid settings.
        """
        import yaml

        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"settings are not YAML: {error}") from error
        content = _known("the settings", content, {"version", "steps", "reconstruction"})
        if content.get("version") != VERSION:
            raise ValueError(
                f"settings must be of version {VERSION}, got {content.get('version')!r}"
            )
        listed = content.get("steps")
        if not isinstance(listed, list):
            raise ValueError(f"steps must be a list of steps, got {listed!r}")
        steps = []
        for entry in listed:
            named = _known("a step", entry, set(_STEPS))
            if len(named) != 1:
                raise ValueError(f"a step must have one name, {' or '.join(_STEPS)}, got {entry!r}")
            ((name, values),) = named.items()
            kind = _STEPS[name]
            values = _known(name, values, set(kind.__dataclass_fields__))
            missing = [field for field in ("at", "grid") if field not in values]
            if missing:
                raise ValueError(f"{name} must have {' and '.join(missing)}, got {values!r}")
            steps.append(kind(**values))
        return cls(tuple(steps), content.get("reconstruction", "residual"))

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the settings to a YAML file, which appears whole or not at all."""
        text = self.to_yaml()
        with replacing(Path(path)) as partial:
            partial.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Reduction:
        """Reads the settings from a YAML file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: not a file of settings; the message names it.
        """
        try:
            return cls.from_yaml(Path(path).read_text(encoding="utf-8-sig"))
        except (UnicodeDecodeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error


class Expeditable(ABC):
    """An encoder that runs on fewer tokens by itself, without overrides.

    Attributes:
        reduction: its settings, None where it runs on all tokens; may be set at any time.
    """

    reduction: Reduction | None

    @abstractmethod
    def reducible_blocks(self) -> Sequence[nn.Module]:
        """Returns the blocks that a step may precede, from the first of the encoder on."""


_STEPS: dict[str, type[Cluster]] = {"cluster": Cluster}
_STEP_NAMES: dict[type, str] = {kind: name for name, kind in _STEPS.items()}


def _known(what: str, value: Any, keys: set[str]) -> Mapping[str, Any]:
    """Returns a value that is a mapping with no other keys than these."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} must be a mapping of {', '.join(sorted(keys))}, got {value!r}")
    unknown = [key for key in value if key not in keys]
    if unknown:
        raise ValueError(f"{what} may have {', '.join(sorted(keys))}, got {unknown[0]!r}")
    return value

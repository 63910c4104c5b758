"""What trainers wrap around weights: keys that they stand below, words before their names."""

from __future__ import annotations

import logging
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from expedite_d2.d2.checkpoint.unpickling import PickledArray

logger = logging.getLogger(__name__)

# The keys that weights stand below. Where a file has several, the first is taken: the model as it
# was trained before averages of it, and a teacher, itself an average, before its student.
CONTAINERS = (
    "model", "state_dict", "model_state_dict", "model_state", "net", "network", "module",
    "model_ema", "ema", "ema_state_dict", "state_dict_ema", "teacher", "student",
)  # fmt: skip
# Containers in one another are two at most in what trainers write; a pickle may hold itself.
_DEPTH = 3


def state_dict_in(path: Path, content: Any) -> Mapping[Any, Any]:
    """The names and weights among what a file holds, below one or more of ``CONTAINERS`` or bare.

    Raises:
        ValueError: there are none.
    """
    found = list(_state_dicts(content, _DEPTH))
    if not found:
        raise ValueError(f"{path} holds no state dict: {_instead(content)}")
    keys, state = found[0]
    if len(found) > 1:
        others = ", ".join(_below(others) for others, _ in found[1:])
        logger.info("%s: taken are the weights below %s, not %s", path, _below(keys), others)
    return state


def _state_dicts(content: Any, depth: int) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    if not isinstance(content, Mapping) or not depth:
        return
    contained = False
    for key in CONTAINERS:
        for below, state in _state_dicts(content.get(key), depth - 1):
            contained = True
            yield (key, *below), state
    if not contained and _holds_weights(content):
        yield (), content


def _holds_weights(content: Any) -> bool:
    return isinstance(content, Mapping) and any(
        isinstance(value, Tensor | PickledArray) for value in content.values()
    )


def _below(keys: tuple[str, ...]) -> str:
    return " > ".join(map(repr, keys))


def _instead(content: Any) -> str:
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        return f"expected names and tensors, got {kind if kind != 'Inert' else 'something else'}"
    keys = ", ".join(map(reprlib.repr, list(content)[:8])) or "none"
    text = f"there is no tensor among its entries ({keys})"
    other = next((key for key, value in content.items() if _holds_weights(value)), None)
    if other is None:
        return text
    return f"{text}, and {other!r} is none of the keys that weights stand below: {CONTAINERS[:3]} …"


class _Reading(NamedTuple):
    taken_off: str
    state: Mapping[str, Tensor]


# What torch's own wrappers put into names: DDP, torch.compile, FSDP, activation checkpointing.
_WRAPPERS = re.compile(
    r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


def unwrapped(
    path: Path, state: Mapping[str, Tensor], fit: Callable[[Mapping[str, Tensor]], int]
) -> Mapping[str, Tensor]:
    """The weights with the names that the model was given before others wrapped it.

    Taken off are words before all names, such as ``model.``, and what torch's wrappers put into
    names, wherever it stands; but only where the names fit the model better without them.

    Args:
        path: the file, for the log.
        state: names and weights.
        fit: how well names and weights fit the model: the more, the better.
    """
    readings = list(_readings(state))
    if len(readings) == 1:
        return state
    best = max(readings, key=lambda reading: fit(reading.state))  # the first of equals
    if best.taken_off:
        logger.info("%s: its names are read without %s", path, best.taken_off)
    return best.state


def _readings(state: Mapping[str, Tensor]) -> Iterator[_Reading]:
    yield _Reading("", state)
    yield from _without_first_words(_weights(state), "")
    bare = {_WRAPPERS.sub("", name): tensor for name, tensor in state.items()}
    if bare.keys() != state.keys() and len(bare) == len(state):
        text = " and ".join(sorted({word for name in state for word in _WRAPPERS.findall(name)}))
        yield _Reading(text, _weights(bare))
        yield from _without_first_words(_weights(bare), f"{text} and ")


def _without_first_words(state: Mapping[str, Tensor], before: str) -> Iterator[_Reading]:
    prefix = ""
    while len(words := {name.partition(".")[0] for name in state}) == 1:
        word = words.pop() + "."
        if any(len(name) <= len(word) for name in state):
            return
        prefix += word
        state = _weights({name[len(word) :]: tensor for name, tensor in state.items()})
        yield _Reading(f"{before}the prefix {prefix}", state)


def _weights(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Without counters beside the model, such as that of torch's AveragedModel."""
    return {
        name: tensor
        for name, tensor in state.items()
        if "." in name or tensor.numel() != 1 or tensor.is_floating_point()
    }

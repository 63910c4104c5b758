"""Weights into a model, whoever saved them."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from expedite_d2.checkpoint.dpt import DPT_FORMATS
from expedite_d2.checkpoint.files import read_checkpoint
from expedite_d2.checkpoint.names import FORMATS, Format
from expedite_d2.checkpoint.segmenter import SEGMENTER_FORMATS
from expedite_d2.checkpoint.wrappings import unwrapped

logger = logging.getLogger(__name__)

# Parts that serve training alone: a checkpoint may have them or not.
_TRAINING_ONLY = re.compile(r"^(sem_aux|criterion)\.")
# What classification weights of a backbone lack: everything else, and the norms of its outputs.
_NOT_CLASSIFICATION = re.compile(r"^(?!backbone\.)|^backbone\.norm\d+\.")


def load_weights(model: nn.Module, path: str | os.PathLike) -> None:
    """Load a checkpoint into ``model``; all of it, or nothing.

    Known are Mask2Former's, Segmenter's and DPT's own checkpoints, transformers' directories,
    Swin's classification weights (backbone alone) and this project's files; see
    ``read_checkpoint`` for the kinds of file. An empty path keeps the random weights, with a
    warning.

    Raises:
        FileNotFoundError: there is no such file or directory.
        ValueError: a file that cannot be read, or the checkpoint of another model.
    """
    if not os.fspath(path):
        logger.warning("MODEL.WEIGHTS is empty: the model keeps its random weights")
        return
    own = model.state_dict()
    source = unwrapped(Path(path), read_checkpoint(Path(path)), lambda state: _matches(state, own))
    fmt = _format_of(source)
    state = fmt.translate(source)

    matched = [name for name in state if name in own]
    missing = [name for name in own if name not in state and not is_training_only(name)]
    left_over = [name for name in state if name not in own and not is_training_only(name)]
    fresh = []
    if fmt.backbone_only:
        fresh = [name for name in missing if _NOT_CLASSIFICATION.match(name)]
        missing = [name for name in missing if not _NOT_CLASSIFICATION.match(name)]
    count = f"{len(matched)} of the model's {len(own)} names matched"
    if missing or left_over:
        raise ValueError(
            f"{path} is a checkpoint of another model: {count}, missing are {_first(missing)}, "
            f"left over are {_first(left_over)}"
        )
    different = [
        f"{name} {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in matched
        if state[name].shape != own[name].shape
    ]
    if different:
        raise ValueError(
            f"{path} is a checkpoint of another model: {count}, but {len(different)} of them "
            f"differ in shape: {_first(different, '; ')}"
        )
    numbers = [
        f"{name} {state[name].dtype}, expected {own[name].dtype}"
        for name in matched
        if state[name].is_floating_point() != own[name].is_floating_point()
    ]
    if numbers:
        raise ValueError(f"{path} has other kinds of numbers: {_first(numbers, '; ')}")
    model.load_state_dict({name: state[name] for name in matched}, strict=False)
    logger.info("loaded %s (%s weights): %s", path, fmt.title, count)
    if fresh:
        logger.warning("%s has a backbone alone: %d names stay random", path, len(fresh))


def _format_of(state: Mapping[str, Tensor]) -> Format:
    formats = [*DPT_FORMATS, *SEGMENTER_FORMATS, *FORMATS]
    return next(fmt for fmt in formats if fmt.recognises(state))


def _matches(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> int:
    """How many of a model's names a checkpoint would fill, whatever its format."""
    try:
        return len(own.keys() & _format_of(state).translate(state).keys())
    except ValueError:
        return 0


def is_training_only(name: str) -> bool:
    """Whether a name belongs to a part that evaluation never uses."""
    return _TRAINING_ONLY.match(name) is not None


def _first(names: Iterable[str], separator: str = ", ") -> str:
    names = list(names)
    if not names:
        return "none"
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return separator.join(names[:3]) + rest

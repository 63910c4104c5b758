"""How a checkpoint's names and shapes meet a model's, and what to do where they do not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from expedite_d2.d2.checkpoint.tables import Table, resize_table

# Parts that serve training alone: a checkpoint may have them or not.
_TRAINING_ONLY = re.compile(r"^(sem_aux|criterion)\.")
# What classification weights of a backbone lack: everything else, and the norms of its outputs.
_NOT_CLASSIFICATION = re.compile(r"^(?!backbone\.)|^backbone\.norm\d+\.")
# A training may begin from another head, not from another backbone: half of it must fit.
_ENOUGH = 0.5

_CLASSES, _OBJECT_CLASSES = "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "MODEL.ROI_HEADS.NUM_CLASSES"
# Which setting gives a parameter its shape, and how the shape tells its value.
_SETTINGS: list[tuple[re.Pattern[str], str, Callable[[tuple[int, ...]], int]]] = [
    (re.compile(pattern), key, value)
    for pattern, key, value in (
        # One row is "no object", or the background.
        (r"^(class_predictor|criterion\.empty_weight)\b", _CLASSES, lambda shape: shape[0] - 1),
        (r"^roi_heads\..*\.cls_score\.", _OBJECT_CLASSES, lambda shape: shape[0] - 1),
        (r"^roi_heads\..*\.mask_fcn_logits\.", _OBJECT_CLASSES, lambda shape: shape[0]),
        (r"^(sem_aux|\w+\.predictor)\.", _CLASSES, lambda shape: shape[0]),
        (r"^decoder\.(mask_norm|head)\.", _CLASSES, lambda shape: shape[0]),
        (r"^decoder\.cls_emb$", _CLASSES, lambda shape: shape[1]),
        (
            r"^transformer_module\.queries_",
            "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES",
            lambda shape: shape[0],
        ),
    )
]


class Match(NamedTuple):
    """A checkpoint's state dict beside a model's.

    Attributes:
        state: the checkpoint's, under this project's names.
        own: the model's.
        tables: position tables of another size than the model's, by name.
        missing: names that the checkpoint lacks.
        absent: names that it lacks because it holds classification weights of a backbone.
        left_over: names that the model lacks.
        different: names whose shapes differ.
    """

    state: Mapping[str, Tensor]
    own: Mapping[str, Tensor]
    tables: Mapping[str, Table]
    missing: list[str]
    absent: list[str]
    left_over: list[str]
    different: list[str]

    def fitting(self, resize: bool) -> dict[str, Tensor]:
        """What can be loaded; with ``resize`` also the position tables, in the model's sizes."""
        resized = {name: table.resized for name, table in self.tables.items()}
        fits = {
            name: tensor
            for name, tensor in self.state.items()
            if name in self.own and name not in self.different
        }
        return fits | resized if resize else fits

    def begins_training(self) -> bool:
        """Whether enough of the backbone fits for a training to begin from it."""
        backbone = [name for name in self.own if name.startswith("backbone.")] or list(self.own)
        fits = self.fitting(resize=True)
        return sum(name in fits for name in backbone) >= _ENOUGH * len(backbone)

    def why_not_whole(self, resize: bool) -> str | None:
        """What keeps the model from being the checkpoint's, and a remedy; None if nothing does.

        Args:
            resize: whether position tables of other sizes are no obstacle.
        """
        different = [name for name in self.different if not (resize and name in self.tables)]
        if not (self.missing or self.left_over or different):
            return None
        both = sum(name in self.own for name in self.state)
        text = f"{both} of the model's {len(self.own)} names matched"
        if self.missing or self.left_over:
            text += f", missing are {first(self.missing)}, left over are {first(self.left_over)}"
        else:
            shapes = [
                f"{name} {tuple(self.state[name].shape)}, expected {tuple(self.own[name].shape)}"
                for name in different
            ]
            text += f", but {len(shapes)} of them differ in shape: {first(shapes, '; ')}"
            text += self._remedy(different)
        return text + "; a training may begin from what fits" * self.begins_training()

    def _remedy(self, different: list[str]) -> str:
        """The settings that the checkpoint was trained with, if they explain all differences."""
        settings: dict[str, int] = {}
        for name in different:
            found = self._setting(name)
            if found is None or settings.setdefault(found[0], found[1]) != found[1]:
                return ""
        return "; to evaluate it, set " + " and ".join(f"{k} to {v}" for k, v in settings.items())

    def _setting(self, name: str) -> tuple[str, int] | None:
        if name in self.tables:
            return self.tables[name].key, self.tables[name].value
        theirs, ours = tuple(self.state[name].shape), tuple(self.own[name].shape)
        # Only one side may differ, or it is the width of a layer.
        sides = [i for i, pair in enumerate(zip(theirs, ours, strict=False)) if len(set(pair)) > 1]
        for pattern, key, value in _SETTINGS:
            if len(theirs) == len(ours) and len(sides) == 1 and pattern.search(name):
                return key, value(theirs)
        return None


def match(model: nn.Module, state: Mapping[str, Tensor], backbone_only: bool) -> Match:
    """Hold a checkpoint of this project's names against a model.

    Args:
        model: the model.
        state: names and tensors of the checkpoint.
        backbone_only: whether it holds classification weights, and lacks the rest of a model.
    """
    own = model.state_dict()
    different = [n for n, tensor in state.items() if n in own and tensor.shape != own[n].shape]
    tables = {
        name: table
        for name in different
        if (table := resize_table(model, name, state[name], own[name])) is not None
    }
    lacking = [name for name in own if name not in state and not is_training_only(name)]
    absent = [name for name in lacking if backbone_only and _NOT_CLASSIFICATION.match(name)]
    left_over = [name for name in state if name not in own and not is_training_only(name)]
    missing = [name for name in lacking if name not in absent]
    return Match(state, own, tables, missing, absent, left_over, different)


def is_training_only(name: str) -> bool:
    """Whether a name belongs to a part that evaluation never uses."""
    return _TRAINING_ONLY.match(name) is not None


def first(names: Iterable[str], separator: str = ", ") -> str:
    """The first three, and how many more there are."""
    names = list(names)
    if not names:
        return "none"
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return separator.join(names[:3]) + rest

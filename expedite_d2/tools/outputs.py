"""What a model makes of an image, and how far that is from what it would have made."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

#: Picks, of what a model returns, the tensors that count.
Select = Callable[[Any], Any]

# Parts of the names by which transformers returns what lies within a model, beside its results; and
# the name of what is the result of a model without a head.
_WITHIN = ("hidden_state", "attentions", "pooler_output")
_FEATURES = "last_hidden_state"
# Keywords by which transformers' models take the truth; SAM's "input_labels" are of its prompts.
_LABELS = ("labels", "label_ids")
_PROMPTS = "input_"


def checked(images: Iterable[Any]) -> Iterator[Any]:
    """Yields a model's inputs, once it is seen that each is one.

    Args:
        images: the inputs, one per call of the model: tensors (B, 3, H, W), mappings of keywords,
            or whatever else the model takes, such as Detectron2's lists of dicts.

    Raises:
        ValueError: paths, images without the first axis, or images with labels.
    """
    if isinstance(images, (str, bytes, Mapping)) or not isinstance(images, Iterable):
        raise ValueError(f"images must be a list of a model's inputs, got {type(images).__name__}")
    if isinstance(images, Tensor) and images.dim() == 4:
        images = images.split(1)
    for image in images:
        _check(image)
        yield image


def _check(image: Any) -> None:
    if isinstance(image, (str, bytes, PathLike)):
        raise ValueError(f"images must each be an input of the model, got the path {image!r}")
    if isinstance(image, Tensor) and image.dim() not in (4, 5):  # 5: a video
        raise ValueError(
            f"images must each be (B, 3, H, W), got a tensor of shape {list(image.shape)}"
        )
    if isinstance(image, tuple) and len(image) > 1:
        raise ValueError(
            f"images must each be one input of the model, got a tuple of {len(image)}: such as an "
            "image and its labels, which are not needed"
        )
    if isinstance(image, Mapping):
        names = [str(name) for name in image if not str(name).startswith(_PROMPTS)]
        labels = [name for name in names if name.endswith(_LABELS)]
        if labels:
            raise ValueError(f"images must come without labels, got {', '.join(labels)}")


def call(model: nn.Module, image: Any) -> Any:
    """Calls a model on one of its inputs; a mapping is its keywords."""
    if isinstance(image, Mapping):
        return model(**image)
    return model(*image) if isinstance(image, tuple) else model(image)


def outputs_of(
    model: nn.Module, encoder: nn.Module, image: Any, select: Select | None = None
) -> list[Tensor]:
    """Returns a model's floating point outputs; those of its encoder if it has none.

    Args:
        model: the model.
        encoder: its encoder.
        image: an input of the model.
        select: picks what counts of what the model returns; by default all but hidden states,
            attentions and pooled features; of a model without a head its last hidden state.

    Raises:
        ValueError: `select` picks nothing.
    """
    features: list[Any] = []
    hook = encoder.register_forward_hook(lambda module, args, out: features.append(out))
    try:
        returned = call(model, image)
    finally:
        hook.remove()
    if select is not None and not callable(select):
        raise ValueError(f"outputs must be a function of what the model returns, got {select!r}")
    if select is not None:
        selected = _floats(select(returned))
        if not selected:
            raise ValueError("outputs must pick floating point tensors, got none")
        return selected
    if isinstance(returned, Mapping):
        results = [v for k, v in returned.items() if not any(part in str(k) for part in _WITHIN)]
        headless, every = returned.get(_FEATURES), list(returned.values())
        return _floats(results) or _floats(headless) or _floats(every) or _floats(features)
    return _floats(returned) or _floats(features)


def _floats(outputs: Any) -> list[Tensor]:
    leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.is_floating_point()]


def distance(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Returns the relative distance (L2) of outputs to others, over those whose shapes agree.

    That of anything to zeros, such as a map on which nothing was detected, is 1; that of what is
    not finite is infinity.

    Raises:
        ValueError: no shapes agree, as those of detected boxes, whose number varies; or the others
            are not finite.
    """
    pairs = [(a, b) for a, b in zip(outputs, expected, strict=False) if a.shape == b.shape]
    if not pairs or len(outputs) != len(expected):
        shapes = [[list(x.shape) for x in some] for some in (outputs, expected)]
        raise ValueError(
            f"the model's outputs cannot be compared, whose shapes are {shapes[0]} and plain "
            f"{shapes[1]}: pick some of a fixed shape by outputs=, such as scores before detection"
        )
    difference = sum((a.double() - b.double()).square().sum().item() for a, b in pairs)
    scale = sum(b.double().square().sum().item() for _, b in pairs)
    if not math.isfinite(scale):
        raise ValueError("outputs of the plain model must be finite, got NaN or infinity")
    if not math.isfinite(difference):
        return math.inf
    return (difference / scale) ** 0.5 if scale else float(difference > 0)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context in which a model is in evaluation mode, without gradients, and not compiled.

    What observes it is a torch function mode, under which torch.compile refuses to run.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode

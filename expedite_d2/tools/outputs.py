"""What a model makes of an image, and how far that is from what it would have made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

#: Picks, of what a model returns, the tensors that count.
Select = Callable[[Any], Any]

# Parts of the names by which transformers returns what lies within a model, beside its results.
_WITHIN = ("hidden_state", "attentions")
# Keywords by which transformers' models take the truth.
_LABELS = ("labels", "label_ids")


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
        labels = [name for name in image if str(name).endswith(_LABELS)]
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
        select: picks what counts of what the model returns; by default all but hidden states and
            attentions, if there is anything else.
    """
    features: list[Any] = []
    hook = encoder.register_forward_hook(lambda module, args, out: features.append(out))
    try:
        returned = call(model, image)
    finally:
        hook.remove()
    if select is not None:
        return _floats(select(returned))
    if isinstance(returned, Mapping):
        results = [v for k, v in returned.items() if not any(part in str(k) for part in _WITHIN)]
        return _floats(results) or _floats(list(returned.values())) or _floats(features)
    return _floats(returned) or _floats(features)


def _floats(outputs: Any) -> list[Tensor]:
    leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.is_floating_point()]


def distance(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Returns the relative distance (L2) of outputs to others, of shapes alike in pairs.

    That of anything to zeros, such as a map on which nothing was detected, is 1.
    """
    pairs = [(a, b) for a, b in zip(outputs, expected, strict=False) if a.shape == b.shape]
    difference = sum((a.double() - b.double()).square().sum().item() for a, b in pairs)
    scale = sum(b.double().square().sum().item() for _, b in pairs)
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

"""Settings that no shape shows, as a checkpoint's source has them, held against the model."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from expedite_d2.d2.checkpoint.names import Format
from expedite_d2.d2.checkpoint.segmenter import SEGMENTER_RELEASE

logger = logging.getLogger(__name__)

# What the Segmenter release calls the normalisation of images: MODEL.PIXEL_MEAN and PIXEL_STD.
_NORMALIZATIONS = {
    "vit": ([127.5, 127.5, 127.5], [127.5, 127.5, 127.5]),
    "deit": ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),
}


class _VariantLoader(yaml.SafeLoader):
    """Plain YAML, and the tuples that the release's training writes."""


_VariantLoader.add_constructor("tag:yaml.org,2002:python/tuple", yaml.SafeLoader.construct_yaml_seq)


def check_agreement(model: nn.Module, fmt: Format, path: Path) -> None:
    """Hold a model against what comes with its weights.

    That is the epsilon of a format's LayerNorms, a Segmenter release's ``variant.yml`` and the
    ``config.json`` of a transformers directory.

    Args:
        model: the model that is to run the weights.
        fmt: the checkpoint's format.
        path: the file, or the directory.

    Raises:
        ValueError: a setting is another, so that the model would compute something else.
    """
    backbone: Any = getattr(model, "backbone", None)
    if backbone is None:
        return
    epsilons = {norm.eps for norm in backbone.modules() if isinstance(norm, nn.LayerNorm)}
    if fmt.norm_eps is not None and epsilons != {fmt.norm_eps}:
        sentence = (
            f"{path} holds {fmt.title} weights, whose LayerNorms have the epsilon {fmt.norm_eps}: "
            f"MODEL.VIT.NORM_EPS must be that, got {_words(epsilons)}"
        )
        if not fmt.norm_eps_may_vary:
            raise ValueError(sentence)
        logger.warning("%s; ignore it if they were trained so", sentence)
    if path.is_dir():
        told = _told_epsilon(path / "config.json")
        if told is not None and epsilons != {told}:
            logger.warning(
                "%s was made with LayerNorms of epsilon %s, the model's backbone has %s; a ViT's "
                "is MODEL.VIT.NORM_EPS",
                path, told, _words(epsilons),
            )  # fmt: skip
    variant = (path if path.is_dir() else path.parent) / "variant.yml"
    if fmt is SEGMENTER_RELEASE and variant.is_file():
        _check_variant(model, variant)


def _told_epsilon(config: Path) -> float | None:
    """``layer_norm_eps`` of transformers' backbone, if the file tells it."""
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        inner = settings.get("backbone_config") or {}
        return float(settings.get("layer_norm_eps", inner.get("layer_norm_eps")))
    except (OSError, ValueError, TypeError, AttributeError):
        return None  # nothing is read of the file but this, which it may lack


def _check_variant(model: Any, path: Path) -> None:
    network = _network_of(path)
    heads = model.backbone.vit.blocks[0].attn.num_heads
    if network.get("n_heads", heads) != heads:
        raise ValueError(
            f"{path}: n_heads is {network['n_heads']}: MODEL.VIT.NUM_HEADS must be that, got "
            f"{heads}"
        )
    theirs = _NORMALIZATIONS.get(str(network.get("normalization")))
    mean, std = (
        [round(value, 3) for value in getattr(model, name).flatten().tolist()]
        for name in ("pixel_mean", "pixel_std")
    )
    if theirs not in (None, (mean, std)):
        raise ValueError(
            f"{path}: normalization is {network['normalization']}: MODEL.PIXEL_MEAN and PIXEL_STD "
            f"must be {theirs[0]} and {theirs[1]}, got {mean} and {std}"
        )


def _network_of(path: Path) -> Mapping[str, Any]:
    try:
        network = yaml.load(path.read_text(encoding="utf-8"), _VariantLoader)["net_kwargs"]
    except Exception as error:  # beside yaml's own errors, what its constructors happen to raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f'{path} does not describe a Segmenter: expected YAML with "net_kwargs" ({reason})'
        ) from error
    if not isinstance(network, Mapping):
        raise ValueError(f"{path}: net_kwargs must be keys and values, got {network!r}")
    return network


def _words(epsilons: set[float]) -> str:
    return " and ".join(map(str, sorted(epsilons))) or "none"

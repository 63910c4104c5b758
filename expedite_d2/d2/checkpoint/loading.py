"""Weights into a model, whoever saved them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from torch import Tensor, nn

from expedite_d2.d2.checkpoint.addresses import local_path
from expedite_d2.d2.checkpoint.agreement import check_agreement
from expedite_d2.d2.checkpoint.dpt import DPT_FORMATS
from expedite_d2.d2.checkpoint.files import read_checkpoint
from expedite_d2.d2.checkpoint.matching import Match, first, is_training_only, match
from expedite_d2.d2.checkpoint.names import FORMATS, Format
from expedite_d2.d2.checkpoint.segmenter import SEGMENTER_FORMATS
from expedite_d2.d2.checkpoint.tables import pretraining_windows
from expedite_d2.d2.checkpoint.wrappings import unwrapped

logger = logging.getLogger(__name__)


def load_weights(model: nn.Module, path: str | os.PathLike, strict: bool = True) -> None:
    """Load a checkpoint into ``model``: all of it or, as the start of a training, what fits.

    Known are Mask2Former's, Segmenter's and DPT's own checkpoints, MMSegmentation's Segmenter,
    transformers' directories, Swin's classification weights and timm's (backbone alone) and this
    project's files; see ``read_checkpoint`` for the kinds of file, ``local_path`` for addresses. An
    empty path keeps the random weights, with a warning.

    Where a training begins, and wherever a checkpoint has a backbone alone, position tables of
    other sizes (another window of a Swin, another image size of a ViT) are interpolated, with a
    warning. In a whole model to evaluate they would make another model of it, and are refused.

    Args:
        model: the model; after an error it is as it was.
        path: file, directory or address.
        strict: whether the checkpoint must be this model's. If not, what fits is loaded and the log
            lists the rest; at least half of the backbone's names must fit.

    Raises:
        FileNotFoundError: there is no such file or directory.
        OSError: an address that cannot be fetched.
        ValueError: a file that cannot be read, the checkpoint of another model, or one that asks
            for other settings.
    """
    if not os.fspath(path):
        logger.warning("MODEL.WEIGHTS is empty: the model keeps its random weights")
        return
    local = local_path(path)
    own = model.state_dict()
    source = unwrapped(local, read_checkpoint(local), lambda state: _fit(state, own))
    fmt = _format_of(source)
    met = match(model, fmt.translate(source), fmt.backbone_only)
    resize = fmt.backbone_only or not strict
    obstacle = met.why_not_whole(resize)
    if obstacle is not None and (strict or not met.begins_training()):
        raise ValueError(f"{path} is a checkpoint of another model: {obstacle}")
    check_agreement(model, fmt, local)
    windows = pretraining_windows(model, source)

    fitting = met.fitting(resize)
    numbers = [
        f"{name} {tensor.dtype}, expected {own[name].dtype}"
        for name, tensor in fitting.items()
        if tensor.is_floating_point() != own[name].is_floating_point()
    ]
    if numbers:
        raise ValueError(f"{path} has other kinds of numbers: {first(numbers, '; ')}")
    model.load_state_dict(fitting, strict=False)
    count = f"{len(fitting)} of the model's {len(own)} names matched"
    idle = sum(name not in fitting and is_training_only(name) for name in own)
    if idle:
        count += f", and {idle} serve training alone"
    logger.info("loaded %s (%s weights): %s", path, fmt.title, count)
    _tell(path, met)
    if windows is not None:
        logger.warning(
            "%s measures positions in other windows than the model: set "
            "MODEL.SWIN.PRETRAINED_WINDOW_SIZES to %s for it",
            path,
            windows,
        )


def _format_of(state: Mapping[str, Tensor]) -> Format:
    formats = [*DPT_FORMATS, *SEGMENTER_FORMATS, *FORMATS]
    return next(fmt for fmt in formats if fmt.recognises(state))


def _fit(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> int:
    """How many of a checkpoint's names are the model's, less those that are not."""
    try:
        names = _format_of(state).translate(state).keys()
    except ValueError:
        return -len(state)
    return len(names & own.keys()) - len(names - own.keys())


def _tell(path: str | os.PathLike, met: Match) -> None:
    """Log what of a checkpoint, or of the model, did not find its like."""
    if met.absent:
        logger.warning("%s has a backbone alone: %d names stay random", path, len(met.absent))
    if met.tables:
        settings = sorted({f"{table.key} {table.value}" for table in met.tables.values()})
        logger.warning(
            "%s was trained with %s: %d position tables were interpolated",
            path,
            " and ".join(settings),
            len(met.tables),
        )
    random = [*met.missing, *(name for name in met.different if name not in met.tables)]
    for names, what in (
        (random, "lacks, or has in other shapes, %d names of the model, which are as they were"),
        (met.left_over, "has %d names that the model lacks"),
    ):
        if names:
            logger.warning("%s " + what + ": %s", path, len(names), first(names))
            if len(names) > 3:
                logger.info("all of these names: %s", ", ".join(names))

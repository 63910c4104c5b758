"""The model that a config describes."""

from __future__ import annotations

import re

from torch import nn

from expedite_d2.d2 import provider
from expedite_d2.d2.provider import CfgNode

# How fvcore's registries, Detectron2's among them, tell of a name; a table of all names follows.
_UNKNOWN_NAME = re.compile(r"No object named '(.*)' found in '(\w+)' registry")
_REGISTRIES = {"META_ARCH": provider.META_ARCH_REGISTRY, "BACKBONE": provider.BACKBONE_REGISTRY}


def build_model(cfg: CfgNode) -> nn.Module:
    """The model that a config describes, on ``MODEL.DEVICE``; loads nothing.

    Args:
        cfg: the full config.

    Raises:
        ValueError: settings that no model can have, or names that no registry knows.
    """
    try:
        return provider.build_model(cfg)
    except KeyError as error:
        unknown = _UNKNOWN_NAME.match(str(error.args[0]) if error.args else "")
        if unknown is None:
            raise
        name, registry = unknown.groups()
        known = ", ".join(sorted(key for key, _ in _REGISTRIES.get(registry, ())))
        raise ValueError(
            f"{name!r} is not in the registry {registry}: it is misspelt, or the module that "
            "registers it is not imported"
            + ", or it is Detectron2's own, which is not in use" * (provider.PROVIDER == "builtin")
            + (f"; known are {known}" if known else "")
        ) from error

"""How config files are found, merged, translated and checked."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from expedite_d2.d2.config.keys import add_expedite_config, check_keys
from expedite_d2.d2.config.rules import COMMON_KEYS, check
from expedite_d2.d2.provider import BACKBONE_REGISTRY, META_ARCH_REGISTRY, CfgNode, get_cfg

logger = logging.getLogger(__name__)

PROJECT = Path(__file__).resolve().parents[1]
WEIGHTS_PREFIX = "expedite_d2://"

_TYPE_MISMATCH = re.compile(
    r"Type mismatch \(<class '(\w+)'> vs\. <class '(\w+)'>\) with values \((.*) vs\. (.*)\) "
    r"for config key: (.*)",
    re.DOTALL,
)

# What an official YAML names, and what stands in where that class is not registered.
_BACKBONES = {"D2SwinTransformer": "ExpeditedSwinTransformer"}
_TRANSLATIONS = {
    "MODEL.META_ARCHITECTURE": (META_ARCH_REGISTRY, {"MaskFormer": "ExpeditedMask2Former"}),
    "MODEL.BACKBONE.NAME": (BACKBONE_REGISTRY, _BACKBONES),
    "MODEL.EXPEDITE.BACKBONE": (BACKBONE_REGISTRY, _BACKBONES),
}
# Meta-architectures of official YAMLs that nothing here stands in for, and what they are for.
_NOT_HERE = {"VideoMaskFormer": "video instance segmentation"}


def load_config(config_file: str | os.PathLike, opts: Sequence[Any] = ()) -> CfgNode:
    """Read a YAML file and ``KEY VALUE`` pairs into a checked, unfrozen config.

    Args:
        config_file: a path, or a path below ``configs/`` of the installed package.
        opts: keys and values in turn, as on train_net.py's command line, or numbers and arrays.

    Returns:
        The merged config. ``MODEL.DEVICE`` is "cpu" where "cuda" was asked for and there is none.

    Raises:
        FileNotFoundError: the file is in neither place.
        KeyError: a key that does not exist.
        ValueError: a value of the wrong type, an odd number of ``opts``, a file that is not YAML.
    """
    path = find_config(config_file)
    cfg = get_cfg()
    add_expedite_config(cfg)
    try:
        cfg.merge_from_file(str(path))
    except KeyError as error:
        raise KeyError(f"{path}: {error.args[0]}") from error
    except FileNotFoundError:
        raise
    except Exception as error:  # yaml's and yacs's errors have no common base
        raise ValueError(f"{path} is not a valid config: {_reason(error)}") from error
    settings = cfg.MODEL.EXPEDITE.SETTINGS
    if settings and not settings.startswith(WEIGHTS_PREFIX):
        cfg.MODEL.EXPEDITE.SETTINGS = str(_naming_settings(path).parent / settings)
    if len(opts) % 2:
        raise ValueError(
            f"config overrides are KEY VALUE pairs, got {len(opts)} words: "
            + " ".join(map(str, opts))
        )
    try:
        cfg.merge_from_list(_plain(list(opts)))
    except (AssertionError, KeyError) as error:
        raise KeyError(f"config override: {error}") from error
    except ValueError as error:
        raise ValueError(f"config override: {_reason(error)}") from error
    _translate_official_names(cfg)
    _check(cfg)
    cfg.MODEL.WEIGHTS = find_weights(cfg.MODEL.WEIGHTS)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.info("MODEL.DEVICE is %s and no GPU is visible: using cpu", cfg.MODEL.DEVICE)
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def _naming_settings(path: Path) -> Path:
    """Of a config and its bases, the file that names ``MODEL.EXPEDITE.SETTINGS``."""
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    node: Any = content
    for name in ("MODEL", "EXPEDITE", "SETTINGS"):
        node = (node or {}).get(name)
    base = content.get("_BASE_")
    return path if node or not base else _naming_settings(path.parent / Path(base).expanduser())


def _plain(value: Any) -> Any:
    """Python's own numbers and lists for numpy's and torch's, also within lists."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    return value.tolist() if hasattr(value, "tolist") else value


def _reason(error: Exception) -> str:
    """yacs's message about a value of another type in words; any other as it is."""
    match = _TYPE_MISMATCH.fullmatch(str(error))
    if match is None:
        return str(error)
    expected, actual, default, value, key = match.groups()
    return f"{key} must be of type {expected}, such as {default}, got {value} of type {actual}"


def find_config(path: str | os.PathLike) -> Path:
    """A config's path as given, else the same path below the package's ``configs/``."""
    given = Path(path)
    packaged = _packaged_configs() / Path(*[p for p in given.parts if p != "configs"])
    for candidate in (given, packaged):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"config file {given} not found, neither there nor at {packaged}")


def _packaged_configs() -> Path:
    """``configs/`` inside an installed wheel, or beside the package in a checkout."""
    inside = PROJECT / "configs"
    return inside if inside.is_dir() else PROJECT.parents[1] / "configs"


def find_weights(path: str) -> str:
    """Resolve ``expedite_d2://NAME`` to the weights that ship with the package."""
    if not path.startswith(WEIGHTS_PREFIX):
        return path
    return str(PROJECT / "weights" / path.removeprefix(WEIGHTS_PREFIX))


def _translate_official_names(cfg: CfgNode) -> None:
    for key, (registry, names) in _TRANSLATIONS.items():
        *parents, leaf = key.split(".")
        node = functools.reduce(getattr, parents, cfg)
        ours = names.get(node[leaf])
        if ours is not None and node[leaf] not in registry:
            logger.info("%s %s is not registered: using %s", key, node[leaf], ours)
            node[leaf] = ours
    name = cfg.MODEL.META_ARCHITECTURE
    if name in _NOT_HERE and name not in META_ARCH_REGISTRY:
        raise ValueError(
            f"MODEL.META_ARCHITECTURE {name} is for {_NOT_HERE[name]}, which is not part of this "
            "project: only a module that registers it can build it"
        )


def _check(cfg: CfgNode) -> None:
    check(cfg, COMMON_KEYS)
    check_keys(cfg, "MODEL.EXPEDITE")
    check_keys(cfg, "TEST")
    try:
        torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"MODEL.DEVICE must be a device of torch such as cpu, cuda or cuda:1, got "
            f"{cfg.MODEL.DEVICE!r}: {reason}"
        ) from error

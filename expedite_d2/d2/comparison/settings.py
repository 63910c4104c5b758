"""The settings that are compared: those of further configs, and how reports show them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os.path import commonprefix
from pathlib import Path
from typing import Any

from expedite_d2.d2.config import load_config
from expedite_d2.d2.modeling.backbone.settings import reduction_from_config
from expedite_d2.d2.provider import CfgNode
from expedite_d2.reducers import Cluster
from expedite_d2.reducers.settings_file import as_mapping

__all__ = [
    "BASELINE",
    "EXPEDITED",
    "describe_settings",
    "expedite_settings",
    "further_configs",
    "summarize_settings",
    "switched",
]

# What the models of the config itself are called, without and with its settings.
BASELINE = "baseline"
EXPEDITED = "expedited"

# Of all keys below MODEL.EXPEDITE, the one that says what the plain model is.
_BACKBONE = "MODEL.EXPEDITE.BACKBONE"
# Fields of the steps by the names that reports and configs have for them.
_FIELDS = {
    "cluster": {"at": "alpha", "grid": "clusters"},
    "merge": {"at": "merge at"},
}
_ESSENTIAL = ("alpha", "clusters", "merge at", "keep", "rounds")


def switched(cfg: CfgNode, enabled: bool) -> CfgNode:
    """A copy of a config whose model is the expedited one, or the plain one."""
    changed = cfg.clone()
    changed.defrost()
    changed.MODEL.EXPEDITE.ENABLED = enabled
    return changed


def further_configs(
    cfg: CfgNode, config_file: str, files: Sequence[str], opts: Sequence[str] = ()
) -> dict[str, CfgNode]:
    """The config with the ``MODEL.EXPEDITE`` of others in place of its own.

    Args:
        cfg: The config, from ``load_config(config_file, opts)``.
        config_file: Its file.
        files: Configs of the same model with other settings.
        opts: The config's overrides. Those below ``MODEL.EXPEDITE`` are its alone.

    Returns:
        One config for each file, by name: the part of the file's stem that it does not share with
        ``config_file``, "half" of ``x_half.yaml`` beside ``x_expedited.yaml``.

    Raises:
        ValueError: another model, no settings, or two of one name; the message names the file.
        FileNotFoundError: there is no such file.
    """
    pairs = list(zip(opts[::2], opts[1::2], strict=True))
    common = [w for key, value in pairs if not _is_setting(key) for w in (key, value)]
    found: dict[str, CfgNode] = {}
    for file in files:
        other = load_config(file, common)
        name = _name(Path(file).stem, Path(config_file).stem)
        if name in (BASELINE, EXPEDITED, *found):
            raise ValueError(
                f"--compare-with must name configs of different settings, got {file}, and there "
                f"is one called {name} already"
            )
        ours, theirs = dict(_plain_keys(cfg)), dict(_plain_keys(other))
        for key in [*ours, *theirs]:
            if ours.get(key) != theirs.get(key):
                raise ValueError(
                    f"--compare-with must name configs of the same model as {config_file}, whose "
                    f"{key} is {ours.get(key)!r}, got {file}, where it is {theirs.get(key)!r}"
                )
        if not other.MODEL.EXPEDITE.ENABLED:
            raise ValueError(
                "--compare-with must name configs with MODEL.EXPEDITE.ENABLED, got "
                f"{file}, where it is False"
            )
        found[name] = cfg.clone()
        found[name].defrost()
        found[name].MODEL.EXPEDITE = other.MODEL.EXPEDITE
    return found


def _is_setting(key: str) -> bool:
    return key.startswith("MODEL.EXPEDITE.") and key != _BACKBONE


def _name(stem: str, first: str) -> str:
    """What of a stem, in words between underscores, differs from the first one."""
    words = stem.split("_")
    shared = commonprefix([words, first.split("_")])
    return "_".join(words[len(shared) :]) or stem


def _plain_keys(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of all that the settings and the place of the output leave."""
    for name, value in node.items():
        key = f"{prefix}{name}"
        if isinstance(value, CfgNode):
            yield from _plain_keys(value, f"{key}.")
        elif key != "OUTPUT_DIR" and not _is_setting(key):
            yield key, value


def expedite_settings(cfg: CfgNode) -> dict[str, Any]:
    """The settings of ``MODEL.EXPEDITE``, or of the file that it names, as JSON has them.

    Returns:
        What the YAML file of the settings holds; for a cluster first its "alpha" and "clusters".
        "correction", where there is one, is what the file of its tensors is recognised by.
    """
    reduction = reduction_from_config(switched(cfg, True))
    assert reduction is not None  # it is switched on
    (first, *_) = reduction.steps
    settings: dict[str, Any] = {}
    if isinstance(first, Cluster):
        settings = {"alpha": first.at, "clusters": list(first.grid)}
    settings |= as_mapping(reduction)
    if reduction.correction is not None:
        settings["correction"] = reduction.correction.digest[:12]
    return settings


def describe_settings(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values of settings, as words.

    Args:
        settings: What ``expedite_settings`` returned.
    """
    (kind,) = settings["steps"][0]  # steps of one kind, as a Reduction has them
    steps = [step[kind] for step in settings["steps"]]
    described = []
    for field in steps[0]:
        # What all steps have in common is told once.
        values = dict.fromkeys(_words(field, step[field]) for step in steps)
        described.append((_FIELDS[kind].get(field, field), ", ".join(values)))
    described.append(("reconstruction", settings["reconstruction"]))
    if "correction" in settings:
        described.append(("detail maps", settings["correction"]))
    return described


def summarize_settings(settings: Mapping[str, Any]) -> str:
    """What of settings decides the cost, in one line."""
    described = describe_settings(settings)
    return ", ".join(f"{name} {words}" for name, words in described if name in _ESSENTIAL)


def _words(field: str, value: Any) -> str:
    if field == "grid":
        return "x".join(map(str, value))
    if field == "temperature" and value == 0:
        return "automatic"
    return f"{value:.4g}" if isinstance(value, float) else str(value)

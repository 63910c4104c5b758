"""A Reduction's file: YAML, and beside it the tensors of its correction as safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expedite_d2.files import replacing
from expedite_d2.reducers.cluster import Cluster
from expedite_d2.reducers.correction import Correction
from expedite_d2.reducers.merge import Merge

if TYPE_CHECKING:
    from expedite_d2.reducers.reduction import Reduction

# Incremented when an older reader would misunderstand a newer file.
VERSION = 1

_STEPS: dict[str, type[Cluster | Merge]] = {"cluster": Cluster, "merge": Merge}
_STEP_NAMES: dict[type, str] = {kind: name for name, kind in _STEPS.items()}


def as_mapping(reduction: Reduction) -> dict[str, Any]:
    """Returns what the YAML file of settings holds, but for the file of a correction's tensors.

    Raises:
        ValueError: a step of a kind that files do not hold.
    """
    steps = []
    for step in reduction.steps:
        name = _STEP_NAMES.get(type(step))
        if name is None:
            raise ValueError(f"a file holds {', '.join(_STEPS)} alone, got {step!r}")
        values = asdict(step)  # type: ignore[call-overload]
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        steps.append({name: plain})
    return {"version": VERSION, "steps": steps, "reconstruction": reduction.reconstruction}


def to_yaml(reduction: Reduction, tensors: str | None = None) -> str:
    """Returns settings as the text of a file.

    Args:
        reduction: the settings.
        tensors: name of the file of the correction's tensors, in the same folder.

    Raises:
        ValueError: a step of a kind that files do not hold, or a correction without a file.
    """
    import yaml

    if reduction.correction is not None and tensors is None:
        raise ValueError("a correction does not fit into a text: save() writes it beside the file")
    content = as_mapping(reduction)
    if reduction.correction is not None:
        content["correction"] = tensors
    return yaml.safe_dump(content, sort_keys=False, default_flow_style=None)


def from_yaml(text: str, folder: Path | None = None) -> Reduction:
    """Reads the text of a file.

    Args:
        text: YAML.
        folder: where the file of the tensors lies, if the text names one.

    Raises:
        ValueError: not YAML, another version, unknown keys, or invalid settings.
        FileNotFoundError: there is no file of the name.
    """
    import yaml

    from expedite_d2.reducers.reduction import Reduction

    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"settings are not YAML: {error}") from error
    keys = {"version", "steps", "reconstruction", "correction"}
    content = _known("the settings", content, keys)
    if content.get("version") != VERSION:
        raise ValueError(f"settings must be of version {VERSION}, got {content.get('version')!r}")
    listed = content.get("steps")
    if not isinstance(listed, list):
        raise ValueError(f"steps must be a list of steps, got {listed!r}")
    correction = None
    if content.get("correction") is not None:
        correction = _read_correction(content["correction"], folder)
    reconstruction = content.get("reconstruction", "residual")
    return Reduction(tuple(map(_step, listed)), reconstruction, correction)


def save(reduction: Reduction, path: Path) -> None:
    """Writes the YAML and, first, the tensors; each appears whole or not at all."""
    correction = reduction.correction
    if correction is None:
        text = to_yaml(reduction)
    else:
        from safetensors import TensorSpec, serialize  # safetensors.torch needs numpy to write

        # Of its own name: a YAML that is there goes on with the tensors that it names.
        name = f"{path.stem}-{correction.digest[:12]}.safetensors"
        text = to_yaml(reduction, name)
        tensors = {key: tensor.contiguous() for key, tensor in correction.tensors().items()}
        specs = {
            key: TensorSpec(
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=list(tensor.shape),
                data_ptr=tensor.data_ptr(),
                data_len=tensor.nbytes,
            )
            for key, tensor in tensors.items()
        }
        with replacing(path.with_name(name)) as partial:
            # Not serialize_file, whose files are for their owner alone.
            partial.write_bytes(serialize(specs))
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def load(path: Path) -> Reduction:
    """Reads a file.

    Raises:
        FileNotFoundError: there is no such file, or no file of the tensors that it names.
        ValueError: not a file of settings; the message names it.
    """
    try:
        return from_yaml(path.read_text(encoding="utf-8-sig"), path.parent)
    except (UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _step(entry: Any) -> Cluster | Merge:
    named = _known("a step", entry, set(_STEPS))
    if len(named) != 1:
        raise ValueError(f"a step must have one name, {' or '.join(_STEPS)}, got {entry!r}")
    ((name, values),) = named.items()
    kind = _STEPS[name]
    values = _known(name, values, set(kind.__dataclass_fields__))
    fields = kind.__dataclass_fields__.values()
    needed = [field.name for field in fields if field.default is MISSING]
    missing = [field for field in needed if field not in values]
    if missing:
        raise ValueError(f"{name} must have {' and '.join(missing)}, got {values!r}")
    return kind(**values)


def _read_correction(name: Any, folder: Path | None) -> Correction:
    """Reads the tensors from a file beside the YAML."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if folder is None:
        raise ValueError(f"correction names a file, {name!r}: load() reads it beside its YAML")
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError(f"correction must be a file in the folder of the settings, got {name!r}")
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"the correction of the settings, {path}, does not exist")
    try:
        return Correction.from_tensors(load_file(path))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"correction {name} cannot be read: {error}") from error


def _known(what: str, value: Any, keys: set[str]) -> Mapping[str, Any]:
    """Returns a value that is a mapping with no other keys than these."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} must be a mapping of {', '.join(sorted(keys))}, got {value!r}")
    unknown = [key for key in value if key not in keys]
    if unknown:
        raise ValueError(f"{what} may have {', '.join(sorted(keys))}, got {unknown[0]!r}")
    return value

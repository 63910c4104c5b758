"""Fields of the records in COCO's annotation files, each in the one form that COCO gives it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


class Fault(ValueError):
    """What is wrong with an entry, in words that do not name its file yet."""


def each(parent: Mapping[str, Any], key: str, take: Callable[[Entry], None]) -> None:
    """Hands every record of a list to `take`, and adds its place to what is wrong with it."""
    records = parent.get(key)
    if records is None:
        raise Fault(f"it lacks {key!r}")
    if not isinstance(records, list):
        raise Fault(f"{key!r} must be a list, got {_shown(records)}")
    for place, record in enumerate(records):
        try:
            if not isinstance(record, dict):
                raise Fault(f"must be an object, got {_shown(record)}")
            take(record)
        except Fault as fault:
            raise Fault(f"{key}[{place}]{_known_as(record)}: {fault}") from fault


def identifier(record: Mapping[str, Any], key: str) -> int | str:
    """The id of an image: a whole number, or a name as in Cityscapes."""
    value = _present(record, key)
    if type(value) is int or (isinstance(value, str) and value):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    raise Fault(f"{key!r} must be a whole number or a name, got {_shown(value)}")


def file_name(record: Mapping[str, Any]) -> str:
    """The name of a file, perhaps below folders."""
    value = _present(record, "file_name")
    if not isinstance(value, str) or not Path(value).name:
        raise Fault(f"'file_name' must be the name of a file, got {_shown(value)}")
    return value


def whole(record: Mapping[str, Any], key: str, least: int = 0, most: int | None = None) -> int:
    """A whole number, which may be written as 7.0 or "7"."""
    value = _present(record, key)
    number: int | None = None
    if type(value) is int:
        number = value
    elif isinstance(value, float) and value.is_integer():
        number = int(value)
    elif isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
        number = int(value)
    if number is None or number < least or (most is not None and number > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise Fault(f"{key!r} must be a whole number {limits}, got {_shown(value)}")
    return number


def flag(record: Mapping[str, Any], key: str, default: int) -> int:
    """0 or 1, which may be written as false or true."""
    value = record.get(key)
    if value is None:
        return default
    return int(value) if isinstance(value, bool) else whole(record, key, most=1)


def category(record: Mapping[str, Any], known: Collection[int]) -> int:
    """A category among those that are known."""
    number = whole(record, "category_id")
    if number not in known:
        limits = f"{min(known)} to {max(known)}" if known else "none"
        raise Fault(
            f"'category_id' must be listed in the data set's metadata ({limits}), got {number}"
        )
    return number


def box(value: Any) -> list[float] | None:
    """[x, y, width, height] in pixels if it is one, None if not."""
    if not isinstance(value, list) or len(value) != 4 or not all(map(_finite, value)):
        return None
    return value if min(value[2:]) >= 0 else None


def area(value: Any) -> float | None:
    """An area in pixels if it is one, None if not."""
    return float(value) if _finite(value) and value >= 0 else None


def _finite(value: Any) -> bool:
    # Compared, because math.isfinite fails for integers beyond all floats; false for NaN.
    return type(value) in (int, float) and -sys.float_info.max <= value <= sys.float_info.max


def _present(record: Mapping[str, Any], key: str) -> Any:
    value = record.get(key)
    if value is None:
        raise Fault(f"lacks {key!r}")
    return value


def _known_as(record: Any) -> str:
    for field in ("id", "image_id"):
        if isinstance(record, dict) and isinstance(record.get(field), (int, str)):
            return f" ({field} {_shown(record[field])})"
    return ""


def _shown(value: Any) -> str:
    return " ".join(repr(value)[:60].split())

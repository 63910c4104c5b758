"""Pictures and label maps from files: one reader for data sets and for one's own images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

# What brings a picture upright, by its orientation tag.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Those that make its height its width.
_QUARTER_TURNS = (5, 6, 7, 8)


@contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """Context of Pillow's image of a file; what goes wrong becomes a sentence that names it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that is not an image, or a broken one.
    """
    try:
        # Given a name, Pillow maps the file, and scrambles a TIFF that is turned by 90 degrees.
        with open(path, "rb") as file, Image.open(file) as image:
            yield image
    except FileNotFoundError:
        raise FileNotFoundError(f"image {path} not found") from None
    except UnidentifiedImageError:
        raise ValueError(f"image {path} cannot be read: it is not an image file") from None
    except Exception as error:  # Pillow's decoders meet broken files with errors of every kind
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"image {path} cannot be read: {reason.splitlines()[0]}") from error


def read_image(path: str | Path, image_format: str = "RGB") -> NDArray[np.uint8]:
    """Reads any image that Pillow knows as 8-bit colours, upright; of several frames the first.

    The camera's orientation is applied, and transparency laid over white. Grey of 16 bits is
    divided by 257; grey of 32 bits and of floats is stretched from the range of values that the
    picture holds, NaN taken as 0. Colours of 16 bits are cut to their upper 8 by Pillow. Colour
    profiles are not applied.

    Args:
        path: The file.
        image_format: The order of the channels, "RGB" or "BGR".

    Returns:
        (H, W, 3) uint8.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that is not an image, or a broken one; the message names it.
    """
    with open_image(path) as image:
        pixels = np.array(_to_rgb(_upright(image)))
    return pixels[:, :, ::-1] if image_format == "BGR" else pixels


def read_labels(path: str | Path) -> NDArray[Any]:
    """Reads a label or segment PNG as it is stored, (H, W) or (H, W, C).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that is not an image, or a broken one.
    """
    with open_image(path) as image:
        return np.asarray(image)


def read_label_map(path: str | Path, size: tuple[int, int], colours: bool = False) -> NDArray[Any]:
    """Reads the labels of an image's pixels.

    Args:
        path: a PNG of whole numbers; an image file.
        size: (H, W) of the image.
        colours: whether three channels hold a number, as in panoptic PNGs.

    Returns:
        (H, W), or (H, W, 3 or 4) with `colours`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a map of labels, or of another size.
    """
    labels = read_labels(path)
    channels = [(3,), (4,)] if colours else [()]
    if (
        labels.shape[:2] != size
        or labels.shape[2:] not in channels
        or labels.dtype.kind not in "iu"
    ):
        kind = "colours" if colours else "whole numbers"
        raise ValueError(
            f"{path} must hold {kind} of {size[0]}x{size[1]} pixels, the size of its image "
            f"upright, got {labels.dtype} values of shape {labels.shape}"
        )
    return labels


def read_classes(entry: Mapping[str, Any], size: tuple[int, int]) -> NDArray[Any]:
    """Reads the semantic classes of an image's pixels.

    Args:
        entry: a dataset dict with "sem_seg_file_name", and with "sem_seg_classes" where the labels
            in its files are not the classes: the class of each label, from 0 on.
        size: (H, W) of the image.

    Returns:
        (H, W).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a map of labels, of another size, or with labels that have no class.
    """
    path, lookup = entry["sem_seg_file_name"], entry.get("sem_seg_classes")
    labels = read_label_map(path, size)
    if lookup is None:
        return labels
    if labels.size and not 0 <= int(labels.min()) <= int(labels.max()) < len(lookup):
        raise ValueError(f"{path} must hold labels from 0 to {len(lookup) - 1}, got {labels.max()}")
    return np.asarray(lookup, dtype=np.uint8)[labels]


def image_size(path: str | Path) -> tuple[int, int]:
    """(H, W) that ``read_image`` gives, from what stands before the pixels.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that is not an image.
    """
    with open_image(path) as image:
        width, height = image.size
        # Pillow tells a TIFF's size upright. A PNG's own getexif would decode its pixels.
        turned = image.format != "TIFF" and _orientation(image) in _QUARTER_TURNS
    return (width, height) if turned else (height, width)


def labels_size(path: str | Path) -> tuple[int, int]:
    """(H, W) that ``read_labels`` gives, from the file's header alone.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that is not an image.
    """
    with open_image(path) as image:
        width, height = image.size
    return height, width


def is_turned(path: str | Path) -> bool:
    """Whether an image's orientation tag makes its stored height its width.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that is not an image.
    """
    with open_image(path) as image:
        return _orientation(image) in _QUARTER_TURNS


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> Any:
    """The orientation tag; 1, which is upright, where there is none."""
    try:
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken tags do not make the pixels unreadable
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        values = np.where(np.isnan(values), 0.0, values)
        finite = values[np.isfinite(values)]
        low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
        span = max(high - low, np.finfo(np.float64).tiny)
        scaled = np.round(255 * (values.clip(low, high) - low) / span)
        return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")

"""The one reader of pictures: every kind of pixel, orientation and damage."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, TiffImagePlugin
from PIL.TiffTags import TAGS_V2

from expedite_d2.d2.data import images, mappers
from expedite_d2.d2.data.images import image_size, is_turned, labels_size, read_image, read_labels
from expedite_d2.d2.engine import predict

HEIGHT, WIDTH = 4, 6
COLOURS = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
GREY = COLOURS[..., 0]
ALPHA = np.where(np.arange(WIDTH) < 3, 255, 0).astype(np.uint8) * np.ones((HEIGHT, 1), np.uint8)
DEEP = GREY.astype(np.uint16) * 257


def three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, 2)


def on_white(colours: np.ndarray) -> np.ndarray:
    return np.where(ALPHA[..., None] == 255, colours, 255)


def rgba() -> Image.Image:
    return Image.fromarray(np.dstack([COLOURS, ALPHA]))


def palette() -> Image.Image:
    """Indices that stand for the reversed greys."""
    image = Image.fromarray(GREY, mode="P")
    image.putpalette(np.repeat(np.arange(256)[::-1], 3).astype(np.uint8).tobytes())
    return image


def test_one_reader_serves_all() -> None:
    assert mappers.read_image is images.read_image is predict.read_image


# Every picture with the pixels that it shows.
EXACT: dict[str, tuple[Callable[[], Image.Image], dict[str, Any], np.ndarray]] = {
    "RGB.png": (lambda: Image.fromarray(COLOURS), {}, COLOURS),
    "RGB.tif": (lambda: Image.fromarray(COLOURS), {}, COLOURS),
    "RGB-lzw.tif": (lambda: Image.fromarray(COLOURS), {"compression": "tiff_lzw"}, COLOURS),
    "RGB.bmp": (lambda: Image.fromarray(COLOURS), {}, COLOURS),
    "RGB.webp": (lambda: Image.fromarray(COLOURS), {"lossless": True}, COLOURS),
    "RGB.ppm": (lambda: Image.fromarray(COLOURS), {}, COLOURS),
    "RGB.jp2": (lambda: Image.fromarray(COLOURS), {}, COLOURS),
    "L.png": (lambda: Image.fromarray(GREY), {}, three(GREY)),
    "L.pgm": (lambda: Image.fromarray(GREY), {}, three(GREY)),
    "LA.png": (
        lambda: Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)]),
        {},
        on_white(three(GREY)),
    ),
    "RGBA.png": (rgba, {}, on_white(COLOURS)),
    "RGBA.tga": (rgba, {}, on_white(COLOURS)),
    "RGBA.webp": (rgba, {"lossless": True, "exact": True}, on_white(COLOURS)),
    "P.png": (palette, {}, three(255 - GREY)),
    "P.gif": (palette, {}, three(255 - GREY)),
    "1.png": (lambda: Image.fromarray(GREY > 100), {}, three(255 * (GREY > 100)).astype(np.uint8)),
    "I;16.png": (lambda: Image.fromarray(DEEP), {}, three(GREY)),
    "I;16.tif": (lambda: Image.fromarray(DEEP), {}, three(GREY)),
    "I;16B.tif": (
        lambda: Image.frombytes("I;16B", (WIDTH, HEIGHT), DEEP.astype(">u2").tobytes()),
        {},
        three(GREY),
    ),
    "RGBX.tif": (lambda: Image.fromarray(COLOURS).convert("RGBX"), {}, COLOURS),
    "CMYK.tif": (
        lambda: Image.fromarray(np.dstack([255 - COLOURS, 0 * GREY]), mode="CMYK"), {}, COLOURS,
    ),
    # What the index stands for does not show: transparency is white.
    "P-index.png": (
        palette, {"transparency": int(GREY[1, 1])},
        np.where(three(GREY) == GREY[1, 1], 255, three(255 - GREY)),
    ),
    "P-bytes.png": (
        palette, {"transparency": bytes(np.where(np.arange(256) < 128, 0, 255).tolist())},
        np.where(three(GREY) < 128, 255, three(255 - GREY)),
    ),
    "L-value.png": (
        lambda: Image.fromarray(GREY), {"transparency": int(GREY[2, 2])},
        np.where(three(GREY) == GREY[2, 2], 255, three(GREY)),
    ),
    "RGB-tuple.png": (
        lambda: Image.fromarray(COLOURS), {"transparency": tuple(COLOURS[0, 0].tolist())},
        np.where((COLOURS == COLOURS[0, 0]).all(2, keepdims=True), 255, COLOURS),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_read_image_gives_the_pixels_that_a_viewer_shows(name: str, tmp_path: Path) -> None:
    make, options, expected = EXACT[name]
    path = tmp_path / name
    make().save(path, **options)
    found = read_image(path)
    assert found.dtype == np.uint8 and found.flags.writeable
    assert np.array_equal(found, expected)
    assert np.array_equal(read_image(path, "BGR"), expected[..., ::-1])
    assert image_size(path) == labels_size(path) == (HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("name", "mode"),
    [("YCbCr.jpg", "RGB"), ("YCbCr.tif", "YCbCr"), ("CMYK.jpg", "CMYK"), ("LAB.tif", "LAB")],
)
def test_read_image_of_other_colour_spaces_is_close(name: str, mode: str, tmp_path: Path) -> None:
    smooth = np.dstack([np.full((16, 16), 200), np.full((16, 16), 120), np.full((16, 16), 40)])
    image = Image.fromarray(smooth.astype(np.uint8))
    image.convert(mode).save(tmp_path / name)
    with Image.open(tmp_path / name) as stored:
        assert stored.mode == ("YCbCr" if name == "YCbCr.tif" else mode)
    assert np.abs(read_image(tmp_path / name).astype(int) - smooth).max() <= 4


def tiff(pixels: np.ndarray, **tags: int) -> bytes:
    """An uncompressed TIFF of kinds that Pillow reads but does not write."""
    height, width, channels = pixels.shape
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    names = {tag.name: number for number, tag in TAGS_V2.items()}
    values: dict[str, Any] = {
        "ImageWidth": width, "ImageLength": height, "RowsPerStrip": height,
        "BitsPerSample": (8 * pixels.itemsize,) * channels, "SamplesPerPixel": channels,
        "Compression": 1, "PhotometricInterpretation": 2,
        # Pillow counts the strip's place from the end of the directory.
        "StripOffsets": 0, "StripByteCounts": pixels.nbytes,
    }  # fmt: skip
    for name, value in (values | tags).items():
        directory[names[name]] = value
    return b"II*\0\x08\0\0\0" + directory.tobytes(8) + pixels.tobytes()


def test_read_image_of_16_bit_colours_takes_their_upper_bits(tmp_path: Path) -> None:
    wide = COLOURS.astype("<u2") * 256 + 77
    (tmp_path / "wide.tif").write_bytes(tiff(wide))
    assert np.array_equal(read_image(tmp_path / "wide.tif"), COLOURS)


def test_read_image_of_premultiplied_colours(tmp_path: Path) -> None:
    half = np.dstack([COLOURS // 2, np.full_like(GREY, 128)])
    (tmp_path / "RGBa.tif").write_bytes(tiff(half, ExtraSamples=1))
    with Image.open(tmp_path / "RGBa.tif") as stored:
        assert stored.mode == "RGBA"
    over_white = COLOURS // 2 + 127.0
    assert np.abs(read_image(tmp_path / "RGBa.tif") - over_white).max() <= 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 257, 65535], [0, 1, 255]),
        ([256, 513, 65279], [0, 1, 254]),
    ],
)
def test_read_image_divides_16_bits_by_257(
    values: list[int], expected: list[int], tmp_path: Path
) -> None:
    Image.fromarray(np.array([values], dtype=np.uint16)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png")[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([5.0, 5.0, 5.0], [0, 0, 0]),
        ([-3e38, 0.0, 3e38], [0, 128, 255]),
        ([np.nan, 1.0, 2.0], [0, 128, 255]),
        ([np.nan, np.nan, np.nan], [0, 0, 0]),
        ([1.0, np.inf, 3.0], [0, 255, 255]),
        ([1.0, -np.inf, 3.0], [0, 0, 255]),
        ([np.inf, np.inf, -np.inf], [0, 0, 0]),
    ],
)
def test_read_image_stretches_floats(
    values: list[float], expected: list[int], tmp_path: Path
) -> None:
    Image.fromarray(np.array([values], dtype=np.float32)).save(tmp_path / "x.tif")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(tmp_path / "x.tif")[0, :, 1].tolist() == expected


def test_read_image_stretches_32_bits(tmp_path: Path) -> None:
    Image.fromarray(np.array([[-(2**31), 0, 2**31 - 1]], dtype=np.int32)).save(tmp_path / "x.tif")
    assert read_image(tmp_path / "x.tif")[0, :, 1].tolist() == [0, 128, 255]


@pytest.mark.parametrize("name", ["moving.gif", "moving.png", "moving.webp", "moving.tif"])
def test_read_image_takes_the_first_frame(name: str, tmp_path: Path) -> None:
    first, second = palette(), Image.fromarray(GREY, mode="P")
    second.putpalette(bytes(768))
    frames = (
        [first, second] if name == "moving.gif" else [f.convert("RGB") for f in (first, second)]
    )
    options = {"lossless": True} if name == "moving.webp" else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    assert np.array_equal(read_image(tmp_path / name), three(255 - GREY))


def test_read_image_applies_no_colour_profile(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    Image.fromarray(COLOURS).save(tmp_path / "x.png", icc_profile=profile)
    assert np.array_equal(read_image(tmp_path / "x.png"), COLOURS)


# EXIF's orientations: what the stored picture must undergo.
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["RGB.png", "I;16.png", "I;16.tif", "L.tif", "RGB.webp"])
def test_read_image_turns_a_picture_upright(orientation: int, kind: str, tmp_path: Path) -> None:
    make, options, pixels = EXACT[kind] if kind in EXACT else EXACT["L.png"]
    exif = Image.Exif()
    exif[0x0112] = orientation
    make().save(tmp_path / kind, exif=exif, **options)
    expected = TURNS[orientation](pixels)
    assert np.array_equal(read_image(tmp_path / kind), expected)
    assert image_size(tmp_path / kind) == expected.shape[:2]
    assert is_turned(tmp_path / kind) == (orientation > 4)


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp"])
@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"Exif\0\0",
        b"Exif\0\0garbage that is no directory",
        b"Exif\0\0MM\0*\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + 40 * b"\xff",
        # Orientation 0, 9 and a text.
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\0\0\0\0\0\0\0",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x09\0\0\0\0\0\0",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x02six\0\0\0\0\0",
    ],
)
def test_read_image_with_broken_tags_is_as_it_is_stored(
    name: str, exif: bytes, tmp_path: Path
) -> None:
    Image.fromarray(COLOURS).save(tmp_path / f"plain_{name}")
    Image.fromarray(COLOURS).save(tmp_path / name, exif=exif)
    plain = read_image(tmp_path / f"plain_{name}")
    assert np.array_equal(read_image(tmp_path / name), plain)
    assert image_size(tmp_path / name) == (HEIGHT, WIDTH)


def test_labels_stay_as_they_are_stored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(GREY).save(tmp_path / "labels.png", exif=exif)
    assert np.array_equal(read_labels(tmp_path / "labels.png"), GREY)
    assert labels_size(tmp_path / "labels.png") == (HEIGHT, WIDTH)


READERS = [read_image, read_labels, image_size, labels_size, is_turned]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", None])
def test_what_is_no_image_is_named(reader: Callable, content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "broken.png"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="^image .*broken.png cannot be read: .") as caught:
        reader(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reader", READERS)
def test_a_missing_image_is_named(reader: Callable, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="^image .*absent.png not found$"):
        reader(tmp_path / "absent.png")
    with pytest.raises((ValueError, OSError), match="image .*n.png cannot be read: File name too"):
        reader(tmp_path / f"{300 * 'n'}.png")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(), ZeroDivisionError("division by zero"), EOFError(), IndexError("no byte"),
        AssertionError(), Image.DecompressionBombError("Image size exceeds limit"),
        Image.DecompressionBombWarning("Image size exceeds limit"), KeyError("tag"),
        SyntaxError("broken PNG file\nwith two lines"), OverflowError("too large"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_every_error_of_a_decoder_becomes_a_sentence(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "x.png")

    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(ValueError, match="^image .*x.png cannot be read: .") as caught:
        read_image(tmp_path / "x.png")
    assert "\n" not in str(caught.value)

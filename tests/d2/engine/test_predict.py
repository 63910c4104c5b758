from __future__ import annotations

import errno
import itertools
import os
import pydoc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from expedite_d2.__main__ import main
from expedite_d2.d2.config import load_config
from expedite_d2.d2.engine.predict import find_images, output_names, predict_image

TINY = """
MODEL:
  META_ARCHITECTURE: "ExpeditedMask2Former"
  DEVICE: "cpu"
  WEIGHTS: ""
  BACKBONE: {NAME: "ExpeditedSwinTransformer"}
  SWIN: {EMBED_DIM: 16, DEPTHS: [1, 1, 2, 1], NUM_HEADS: [1, 2, 4, 8], WINDOW_SIZE: 4}
  EXPEDITE: {ENABLED: True, ALPHA: 3, CLUSTERS: [2, 2]}
  SEM_SEG_HEAD:
    NAME: "MaskFormerHead"
    PIXEL_DECODER_NAME: "MSDeformAttnPixelDecoder"
    IN_FEATURES: ["res2", "res3", "res4", "res5"]
    NUM_CLASSES: 3
    CONVS_DIM: 32
    MASK_DIM: 32
    TRANSFORMER_ENC_LAYERS: 1
  MASK_FORMER:
    TRANSFORMER_IN_FEATURE: "multi_scale_pixel_decoder"
    HIDDEN_DIM: 32
    NUM_OBJECT_QUERIES: 5
    DIM_FEEDFORWARD: 32
    DEC_LAYERS: 2
INPUT: {FORMAT: "RGB", MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 128}
DATASETS: {TRAIN: (), TEST: ()}
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return str(path)


@pytest.fixture(autouse=True)
def one_seed() -> None:
    torch.manual_seed(0)


def save(path: Path, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def run(config: str, output: Path, *inputs: Path | str) -> None:
    main(
        ["predict", "--config-file", config, "--input", *map(str, inputs), "--output", str(output)]
    )


def failure(config: str, output: Path, *inputs: Path | str) -> int:
    with pytest.raises(SystemExit) as caught:
        run(config, output, *inputs)
    return int(caught.value.code or 0)


def test_find_images_in_files_folders_and_patterns(tmp_path: Path) -> None:
    a, b, c = (save(tmp_path / name) for name in ("a.png", "sub/b.JPG", "sub/c[1].png"))
    (tmp_path / "sub" / "notes.txt").write_text("x")
    (tmp_path / "sub" / ".hidden.png").write_text("x")
    found, problems = find_images(
        [str(tmp_path / "*.png"), str(tmp_path / "sub"), str(c), str(a), str(tmp_path / "no*.gif")]
    )
    assert found == [a, b, c]
    assert problems == [f"no file matches {tmp_path / 'no*.gif'}"]


def test_find_images_tells_what_is_missing(tmp_path: Path) -> None:
    found, problems = find_images([str(tmp_path), str(tmp_path / "gone.png")])
    assert found == []
    assert problems == [
        f"{tmp_path} is a folder without images", f"{tmp_path / 'gone.png'} does not exist",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "images, names",
    [
        (["a/x.jpg", "a/y.jpg"], ["x.png", "y.png"]),
        (["a/x.jpg", "b/x.jpg", "b/y.png"], ["a_x.png", "b_x.png", "y.png"]),
        (["a/x.jpg", "a/x.png", "b/x.png"], ["a_x_jpg.png", "a_x_png.png", "b_x_png.png"]),
        (["p/a/x.jpg", "q/a/x.jpg"], ["x_1.png", "x_2.png"]),
        (["a/x.jpg", "b/X.jpg"], ["a_x.png", "b_X.png"]),
        (["a/x.jpg", "b/x.jpg", "c/a_x.jpg"], ["a_x_jpg.png", "b_x_jpg.png", "a_x.png"]),
        (["a/x.1.jpg"], ["x.1.png"]),
    ],
)
def test_output_names_are_distinct(images: list[str], names: list[str]) -> None:
    assert output_names([Path(image) for image in images]) == names


@pytest.mark.parametrize("image_format, first", [("RGB", 0), ("BGR", 2)])
def test_predict_image_gives_the_model_what_the_evaluation_would(
    config: str, image_format: str, first: int
) -> None:
    seen = []

    class Model(torch.nn.Module):
        def forward(self, batch: list) -> list:
            seen.extend(batch)
            return [{}]

    cfg = load_config(config, ["INPUT.FORMAT", image_format])
    image = np.zeros((30, 90, 3), dtype=np.uint8)
    image[..., 0] = 200
    predict_image(Model(), cfg, image)
    # The shorter side would become 64, but then the longer one would exceed 128.
    assert seen[0]["image"].shape == (3, 43, 128) and seen[0]["image"].dtype == torch.uint8
    assert (seen[0]["height"], seen[0]["width"]) == (30, 90)
    assert seen[0]["image"][first].float().mean() == 200


def test_main_draws_every_image_at_its_own_size(config: str, tmp_path: Path) -> None:
    output = tmp_path / "out" / "deep"
    inputs = [
        save(tmp_path / "a" / "x.png", (40, 30)),
        save(tmp_path / "b" / "x.jpg", (70, 20), "L"),
        save(tmp_path / "b" / "thin.png", (3, 50), "RGBA"),
    ]
    run(config, output, *inputs)
    sizes = {path.name: Image.open(path).size for path in output.iterdir()}
    assert sizes == {"a_x.png": (40, 30), "b_x.png": (70, 20), "thin.png": (3, 50)}


def test_main_draws_panoptic_predictions(config: str, tmp_path: Path) -> None:
    arguments = ["predict", "--config-file", config, "--input", str(save(tmp_path / "x.png"))]
    main(
        arguments
        + ["--output", str(tmp_path / "out"), "DATASETS.TEST", "('scenes_val',)"]
        + ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "16", "MODEL.MASK_FORMER.TEST.PANOPTIC_ON", "True"]
    )
    assert os.listdir(tmp_path / "out") == ["x.png"]


def test_main_replaces_its_own_results_only(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = save(tmp_path / "x.jpg"), tmp_path / "out"
    run(config, output, source)
    before = (output / "x.png").stat().st_mtime_ns
    run(config, output, source)
    assert (output / "x.png").stat().st_mtime_ns > before
    other = save(output / "x.png")
    content = other.read_bytes()
    assert failure(config, output, source) == 2
    assert "was not written by this command" in capsys.readouterr().err
    assert other.read_bytes() == content and os.listdir(output) == ["x.png"]


def test_main_never_overwrites_an_input(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save(tmp_path / "photos" / "x.png")
    content = source.read_bytes()
    assert failure(config, tmp_path / "photos", source) == 2
    assert "one of the input images" in capsys.readouterr().err
    assert failure(config, tmp_path / "photos", tmp_path / "photos") == 2
    assert "another folder" in capsys.readouterr().err
    assert source.read_bytes() == content and os.listdir(source.parent) == ["x.png"]


def test_main_goes_on_after_unreadable_images(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = save(tmp_path / "good.png"), tmp_path / "bad.png"
    bad.write_text("not an image")
    assert failure(config, tmp_path / "out", bad, tmp_path / "gone.png", good) == 2
    assert os.listdir(tmp_path / "out") == ["good.png"]
    printed = capsys.readouterr()
    assert f"image {bad} cannot be read" in printed.err and "gone.png does not exist" in printed.err
    assert "2 of the inputs could not be read" in printed.err
    assert "Traceback" not in printed.err
    assert "1 of 2 pictures written" in printed.out


@pytest.mark.parametrize(
    "stem", [251 * "n", 240 * "n", 83 * "日", 125 * "é", 62 * "🙂", os.fsdecode(251 * b"\xff")]
)
def test_main_draws_images_with_the_longest_names(stem: str, config: str, tmp_path: Path) -> None:
    sources = [save(tmp_path / f"{stem}.png"), save(tmp_path / "b" / "x.png")]
    run(config, tmp_path / "out", tmp_path, sources[1])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{stem}.png", "x.png"}


def test_output_names_fit_however_long_the_images_are_called() -> None:
    stems = [251 * "n", 83 * "日", 250 * "m"]
    images = [Path(f"{folder}/{stem}{end}") for stem in stems for folder, end in
              [("a", ".tif"), ("a", ".jpg"), ("b", ".jpg"), ("b", ""), ("x/b", "")]]  # fmt: skip
    names = output_names(images)
    assert names == output_names(images) and len({name.casefold() for name in names}) == len(images)
    assert all(len(os.fsencode(name)) <= 255 and name.endswith(".png") for name in names)
    # A name of 255 bytes without a suffix leaves no room for one.
    (name,) = output_names([Path(255 * "n")])
    assert name.startswith(200 * "n") and name.endswith(".png") and len(name) == 255


@pytest.mark.parametrize(
    "reason", [errno.ENAMETOOLONG, errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO]
)
@pytest.mark.parametrize("where", ["tempfile.mkdtemp", "PIL.Image.Image.save", "os.replace"])
def test_main_goes_on_after_a_picture_that_cannot_be_written(
    where: str,
    reason: int,
    config: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sources = [save(tmp_path / f"{name}.jpg") for name in "abc"]
    output = tmp_path / "out"
    run(config, output, sources[1])
    before = (output / "b.png").read_bytes()
    module, _, name = where.rpartition(".")
    real = getattr(pydoc.locate(module), name)
    calls = itertools.count()

    def second_fails(*args: object, **kwargs: object) -> object:
        if next(calls) == 1:
            raise OSError(reason, os.strerror(reason))
        return real(*args, **kwargs)

    monkeypatch.setattr(where, second_fails)
    assert failure(config, output, *sources) == 2
    printed = capsys.readouterr()
    assert f"error: {output / 'b.png'} cannot be written: {os.strerror(reason)}" in printed.err
    assert "2 of 3 pictures written" in printed.out and "Traceback" not in printed.err
    assert sorted(os.listdir(output)) == ["a.png", "b.png", "c.png"]
    assert (output / "b.png").read_bytes() == before


def test_main_goes_on_after_inputs_that_cannot_be_looked_up(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, long = save(tmp_path / "good.png"), tmp_path / (300 * "n" + ".png")
    assert failure(config, tmp_path / "out", long, f"{long}/*.png", good) == 2
    printed = capsys.readouterr()
    assert f"{long} does not exist" in printed.err and "no file matches" in printed.err
    assert os.listdir(tmp_path / "out") == ["good.png"]


def test_main_without_any_image_stops_before_building_the_model(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failure(config, tmp_path / "out", tmp_path / "gone.png") == 2
    assert "no image to predict on" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_main_with_a_file_as_output_says_so(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save(tmp_path / "x.jpg")
    (tmp_path / "out").write_text("x")
    assert failure(config, tmp_path / "out", source) == 2
    assert "--output must be a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["MODEL.NO_SUCH_KEY", "1"], "NO_SUCH_KEY"),
        (["MODEL.WEIGHTS", "no/such/file.pth"], "no/such/file.pth"),
        (["MODEL.EXPEDITE.ALPHA", "99"], "alpha"),
    ],
)
def test_main_with_a_bad_config_is_one_sentence(
    config: str,
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = save(tmp_path / "x.jpg")
    with pytest.raises(SystemExit) as caught:
        main(
            ["predict", "--config-file", config, "--input", str(source)]
            + ["--output", str(tmp_path / "out"), *words]
        )
    assert caught.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "out").exists()

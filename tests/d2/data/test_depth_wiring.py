"""KITTI and NYUv2 from their folders through loaders, DPT and evaluator, whole and broken."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import expedite_d2.d2.modeling  # noqa: F401 - registers the model that the config names
from expedite_d2.d2 import CfgNode, DatasetCatalog, MetadataCatalog, build_model
from expedite_d2.d2.config import load_config
from expedite_d2.d2.data import build_test_loader, build_train_loader
from expedite_d2.d2.data.kitti import register_kitti
from expedite_d2.d2.data.nyuv2 import register_nyuv2
from expedite_d2.d2.engine import do_test
from expedite_d2.d2.evaluation import build_evaluators, inference_on_dataset

TINY = Path(__file__).parents[1] / "modeling/dpt_tiny.yaml"
KITTI_SIZE, NYU_SIZE = (376, 1241), (480, 640)
DRIVE = "2011_09_26/2011_09_26_drive_0002_sync/image_02/data"
TRUTH = "2011_09_26_drive_0002_sync/proj_depth/groundtruth/image_02"
NAMES = [f"{data}_{split}" for data in ("kitti_eigen", "nyuv2") for split in ("train", "test")]


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def truth(size: tuple[int, int], scale: int) -> np.ndarray:
    """Depth that grows from 1 m on the right to 9 m on the left; nothing in every third row."""
    metres = (
        np.broadcast_to(np.linspace(9, 1, size[1]), size) * (np.arange(size[0]) % 3 > 0)[:, None]
    )
    return (metres * scale).astype(np.uint16)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A folder for DETECTRON2_DATASETS with two images of each data set, in both splits."""
    noise = np.random.default_rng(0)
    for number in (1, 2):
        kitti = tmp_path / "kitti"
        pixels = noise.integers(0, 256, (*KITTI_SIZE, 3), dtype=np.uint8)
        save(kitti / "raw" / DRIVE / f"{number}.png", pixels)
        save(kitti / "data_depth_annotated/val" / TRUTH / f"{number}.png", truth(KITTI_SIZE, 256))
        for folder in ("sync", "official_splits/test"):
            kitchen = tmp_path / "nyu_depth_v2" / folder / "kitchen"
            pixels = noise.integers(0, 256, (*NYU_SIZE, 3), dtype=np.uint8)
            save(kitchen / f"rgb_{number}.jpg", pixels)
            save(kitchen / f"sync_depth_{number}.png", truth(NYU_SIZE, 1000))
    for split in ("train", "test"):
        write_list(
            tmp_path / f"kitti/eigen_{split}_files_with_gt.txt",
            [f"{DRIVE}/{n}.png {TRUTH}/{n}.png 721.5" for n in (1, 2)] + [f"{DRIVE}/3.png None 1"],
        )
        write_list(
            tmp_path / f"nyu_depth_v2/nyudepthv2_{split}_files_with_gt.txt",
            [f"/kitchen/rgb_{n}.jpg /kitchen/sync_depth_{n}.png 518.8" for n in (1, 2)],
        )
    kept = {name: (DatasetCatalog[name], MetadataCatalog.get(name)) for name in NAMES}
    forget()
    register_kitti(tmp_path)
    register_nyuv2(tmp_path)
    yield tmp_path
    forget()
    for name, (load, metadata) in kept.items():
        DatasetCatalog.register(name, load)
        MetadataCatalog[name] = metadata


def write_list(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines) + "\n")


def forget() -> None:
    for name in NAMES:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def make_cfg(data: str, *opts: str) -> CfgNode:
    words = ["DATASETS.TRAIN", f"('{data}_train',)", "DATASETS.TEST", f"('{data}_test',)"]
    words += ["DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "2", "SEED", "3"]
    return load_config(TINY, [*words, *opts])


class Constant(nn.Module):
    """Says the same depth of every pixel, in the size that it is asked for."""

    def forward(self, batch: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
        return [{"depth": torch.full((item["height"], item["width"]), 4.0)} for item in batch]


def rmse(depth: np.ndarray, scale: float, rows: slice, columns: slice) -> float:
    metres = depth[rows, columns] * scale
    return float(np.sqrt(np.mean((metres[metres > 0] - 4.0) ** 2)))


# --- loaders ----------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["kitti_eigen", "nyuv2"])
def test_train_loader_gives_crops_with_their_depth(root: Path, data: str) -> None:
    opts = ["INPUT.CROP.ENABLED", "True", "INPUT.CROP.TYPE", "absolute"]
    opts += ["INPUT.CROP.SIZE", "[96, 128]", "INPUT.RANDOM_FLIP", "none"]
    opts += ["MODEL.DPT.TEST_SIZE", "[480, 640]" if data == "nyuv2" else "[352, 1216]"]
    cfg = make_cfg(data, *opts)
    batch = next(iter(build_train_loader(cfg)))
    assert len(batch) == 2
    for sample in batch:
        assert sample["image"].shape == (3, 96, 128) and sample["image"].dtype == torch.uint8
        depth = sample["depth"]
        assert depth.shape == (96, 128) and depth.dtype == torch.float32
        measured = depth[depth > 0]
        assert 1 <= measured.min() < measured.max() <= 9
        # From left to right the depth falls, as in the whole image.
        row = depth[depth[:, 0] > 0][0]
        assert (row.diff() <= 0).all() and row[0] > row[-1]
    losses = build_model(cfg).train()(batch)
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize(
    ("data", "size"), [("kitti_eigen", (352, 1216)), ("nyuv2", NYU_SIZE)], ids=["kitti", "nyuv2"]
)
def test_inference_comes_back_in_the_size_that_counts(
    root: Path, data: str, size: tuple[int, int]
) -> None:
    cfg = make_cfg(data)
    model = build_model(cfg).eval()
    for batch in build_test_loader(cfg, cfg.DATASETS.TEST[0]):
        assert all(side % 32 == 0 for side in batch[0]["image"].shape[1:])
        with torch.no_grad():
            (output,) = model(batch)
        assert output["depth"].shape == size and output["depth"].dtype == torch.float32


# --- evaluation -------------------------------------------------------------------------------


def test_kitti_is_measured_in_gargs_part_of_the_whole_image(root: Path) -> None:
    cfg = make_cfg("kitti_eigen")
    name = cfg.DATASETS.TEST[0]
    results = inference_on_dataset(
        Constant(), build_test_loader(cfg, name), build_evaluators(cfg, name)
    )
    # Garg's shares of 376 x 1241, inside the benchmark's 352 x 1216 at the bottom centre.
    rows, columns = slice(max(153, 24), 372), slice(max(44, 12), 1196)
    expected = rmse(truth(KITTI_SIZE, 256), 1 / 256, rows, columns)
    assert results["depth"]["RMSE"] == pytest.approx(expected, rel=1e-5)


def test_nyuv2_is_measured_inside_its_frame(root: Path) -> None:
    cfg = make_cfg("nyuv2")
    name = cfg.DATASETS.TEST[0]
    results = inference_on_dataset(
        Constant(), build_test_loader(cfg, name), build_evaluators(cfg, name)
    )
    expected = rmse(truth(NYU_SIZE, 1000), 1 / 1000, slice(45, 471), slice(41, 601))
    assert results["depth"]["RMSE"] == pytest.approx(expected, rel=1e-5)


def test_engine_evaluates_both(root: Path, tmp_path: Path) -> None:
    opts = ["OUTPUT_DIR", str(tmp_path), "DATASETS.TEST", "('kitti_eigen_test', 'nyuv2_test')"]
    cfg = make_cfg("nyuv2", *opts)
    results = do_test(cfg, build_model(cfg).eval())
    assert list(results) == ["kitti_eigen_test", "nyuv2_test"]
    for tasks in results.values():
        assert set(tasks["depth"]) == {
            "RMSE", "RMSE_log", "AbsRel", "SqRel", "d1", "d2", "d3", "SILog",
        }  # fmt: skip
        assert all(value is not None and value >= 0 for value in tasks["depth"].values())


# --- what may be wrong ------------------------------------------------------------------------


def change_first(pattern: str, pixels: np.ndarray | None) -> Callable[[Path], None]:
    """Replace the first image's file, or write text into it."""

    def change(root: Path) -> None:
        for path in root.rglob(pattern):
            if pixels is None:
                path.write_text("no image")
            else:
                Image.fromarray(pixels).save(path)

    return change


def fill_lists(content: bytes) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for path in root.glob("*/*_files_with_gt.txt"):
            path.write_bytes(content)

    return change


def remove(pattern: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for path in list(root.rglob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


KITTI_TRUTH, NYU_TRUTH = "groundtruth/image_02/1.png", "sync_depth_1.png"
GREY = np.ones(NYU_SIZE, np.uint8)


@pytest.mark.parametrize(
    ("data", "change", "message"),
    [
        ("kitti_eigen", remove("kitti"), "kitti/eigen_.*_files_with_gt.txt not found; set DETEC"),
        ("kitti_eigen", remove("raw"), "kitti/raw not found; set DETECTRON2_DATASETS"),
        ("kitti_eigen", remove(KITTI_TRUTH), "groundtruth/image_02/1.png not found; set DETEC"),
        ("kitti_eigen", fill_lists(b""), "'kitti_eigen_.*' is empty"),
        ("kitti_eigen", fill_lists(b"a.png None 1\n"), "'kitti_eigen_.*' is empty"),
        ("kitti_eigen", fill_lists(b"a.png\n"), "line 1 of .*gt.txt must name an image and a dep"),
        ("kitti_eigen", fill_lists(b"\xff\x89PNG\n"), "_files_with_gt.txt is not a text file"),
        ("nyuv2", remove("rgb_1.jpg"), "rgb_1.jpg not found"),
        ("nyuv2", change_first("rgb_1.jpg", None), "rgb_1.jpg cannot be read"),
        ("nyuv2", change_first(NYU_TRUTH, None), "sync_depth_1.png cannot be read"),
        ("nyuv2", change_first(NYU_TRUTH, GREY), "sync_depth_1.png is not a depth map: .*uint8"),
        (
            "nyuv2",
            change_first(NYU_TRUTH, np.stack([GREY] * 3, -1)),
            r"sync_depth_1.png is not a depth map: .*\(480, 640, 3\)",
        ),
        (
            "nyuv2",
            change_first(NYU_TRUTH, np.ones((240, 320), np.uint16)),
            r"sync_depth_1.png must have the image's size \(480, 640\), got \(240, 320\)",
        ),
        # As large as the benchmark's crop or larger, it would pass unnoticed out of its place.
        (
            "kitti_eigen",
            change_first(KITTI_TRUTH, np.ones((400, 1300), np.uint16)),
            r"1.png must have the image's size \(376, 1241\), got \(400, 1300\)",
        ),
        (
            "kitti_eigen",
            change_first("data/1.png", np.ones((300, 1241, 3), np.uint8)),
            "must have the image's size|must be at least 352x1216",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(
    root: Path, data: str, change: Callable[[Path], None], message: str
) -> None:
    change(root)
    cfg = make_cfg(data)
    name = cfg.DATASETS.TEST[0]
    with pytest.raises((ValueError, OSError), match=message):
        inference_on_dataset(Constant(), build_test_loader(cfg, name), build_evaluators(cfg, name))
    with pytest.raises((ValueError, OSError), match=message):
        next(iter(build_train_loader(cfg)))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("CROP.TYPE", "square", "INPUT.CROP.TYPE must be one of .*got 'square'"),
        ("CROP.SIZE", "[0, 64]", r"INPUT.CROP.SIZE must be .*got \[0, 64\]"),
        ("CROP.SIZE", "[0.5, 0.5]", r"INPUT.CROP.SIZE must be .*got \[0.5, 0.5\]"),
        ("RANDOM_FLIP", "vertical", "INPUT.RANDOM_FLIP must be .*got 'vertical'"),
    ],
)
def test_wrong_settings_of_the_training_mapper_are_named(
    root: Path, key: str, value: str, message: str
) -> None:
    opts = ["INPUT.CROP.ENABLED", "True", "INPUT.CROP.TYPE", "absolute"]
    opts += ["INPUT.CROP.SIZE", "[64, 64]", f"INPUT.{key}", value]
    with pytest.raises(ValueError, match=message):
        build_train_loader(make_cfg("nyuv2", *opts))


def test_training_dpt_needs_the_depth_mapper(root: Path) -> None:
    cfg = make_cfg("nyuv2")
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match="inputs with 'depth', as INPUT.DATASET_MAPPER_NAME"):
        build_model(cfg).train()([{"image": image}])

"""The embedded scenes: deterministic, consistent in all formats, written once and whole."""

from __future__ import annotations

import json
import multiprocessing
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from expedite_d2.__main__ import main
from expedite_d2.d2 import MetadataCatalog
from expedite_d2.d2.data.scenes import (
    STUFF_CLASSES,
    THING_CLASSES,
    ensure_split,
    render,
    render_scene,
    writer,
)
from expedite_d2.d2.data.scenes.dataset import load_scenes
from expedite_d2.d2.data.scenes.render import FARTHEST, LEAST_AREA

STUFF_START = len(THING_CLASSES)


def test_render_scene_is_deterministic() -> None:
    np.random.seed(0)
    state = np.random.get_state()[1].copy()
    first = render_scene(5, 3)
    np.random.seed(1)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        again = pool.apply(render_scene, (5, 3))
    np.random.seed(0)
    render_scene(5, 4)
    assert (np.random.get_state()[1] == state).all()
    for name in ("image", "segments", "depth"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert first.infos == again.infos
    assert not np.array_equal(first.image, render_scene(5, 4).image)
    assert not np.array_equal(first.image, render_scene(6, 3).image)


@pytest.mark.parametrize("index", range(8))
def test_render_scene_is_consistent(index: int) -> None:
    scene = render_scene(11, index)
    assert scene.image.shape == (384, 384, 3) and scene.image.dtype == np.uint8
    assert [one.id for one in scene.infos] == list(range(1, len(scene.infos) + 1))
    areas = np.bincount(scene.segments.ravel(), minlength=len(scene.infos) + 1)
    assert len(areas) == len(scene.infos) + 1
    assert (areas[1:] >= LEAST_AREA).all()
    stuff = [one.category for one in scene.infos if not one.isthing]
    assert len(stuff) == len(set(stuff))
    for one in scene.infos:
        assert one.isthing == (one.category < STUFF_START)
        depth = scene.depth[scene.segments == one.id]
        if one.category == STUFF_START + STUFF_CLASSES.index("sky"):
            assert (depth == 0).all()
        else:
            assert depth.min() > 0.2 and depth.max() <= FARTHEST


@pytest.mark.parametrize("index", range(12))
def test_every_pixel_is_painted(index: int) -> None:
    """What no surface covered would be black, and labelled as the first class."""
    rng = np.random.default_rng(index)
    canvas = render._Canvas(rng, horizon=140.3, focal=400.0, camera=1.5, light=0.5)
    render._lay_stuff(canvas)
    assert canvas.image.any(0).all()


def test_render_scene_draws_every_class_at_every_scale() -> None:
    seen: set[int] = set()
    sides: list[float] = []
    for index in range(24):
        scene = render_scene(2, index)
        areas = np.bincount(scene.segments.ravel())
        seen |= {one.category for one in scene.infos}
        sides += [float(areas[one.id]) ** 0.5 for one in scene.infos if one.isthing]
    assert seen == set(range(len(THING_CLASSES) + len(STUFF_CLASSES)))
    assert min(sides) < 24 and max(sides) > 130


def test_ground_depth_grows_towards_the_horizon() -> None:
    scene = render_scene(2, 1)
    ground = [
        one.id
        for one in scene.infos
        if one.category >= STUFF_START
        and STUFF_CLASSES[one.category - STUFF_START] in ("grass", "sand", "water", "wood floor")
    ]
    column = scene.depth[:, 200][np.isin(scene.segments[:, 200], ground)]
    assert len(column) > 20 and (np.diff(column) <= 0).all()


def test_files_agree_with_one_another(scenes_cache: Path) -> None:
    folder = scenes_cache / f"scenes-{writer.VERSION}" / "val"
    panoptic = json.loads((folder / "panoptic.json").read_text())
    instances = json.loads((folder / "instances.json").read_text())
    assert [c["isthing"] for c in panoptic["categories"]] == [1] * 10 + [0] * 6
    assert len(panoptic["images"]) == len(panoptic["annotations"]) == 3
    assert [one["id"] for one in instances["annotations"]] == list(
        range(1, len(instances["annotations"]) + 1)
    )
    for image, annotation in zip(panoptic["images"], panoptic["annotations"], strict=True):
        scene = render_scene(writer.SPLITS["val"].seed, image["id"])
        png = np.asarray(Image.open(folder / "panoptic" / annotation["file_name"])).astype(int)
        ids = png @ [1, 256, 65536]
        assert np.array_equal(ids, scene.segments)
        labels = np.asarray(Image.open(folder / "semantic" / annotation["file_name"]))
        assert (labels[ids == 0] == 255).all()
        objects = {
            coco_mask.decode(one["segmentation"]).tobytes(): one["category_id"]
            for one in instances["annotations"]
            if one["image_id"] == image["id"]
        }
        for segment in annotation["segments_info"]:
            mask = ids == segment["id"]
            assert segment["area"] == mask.sum()
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            size = [columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
            assert segment["bbox"] == [columns[0], rows[0], *size]
            assert (labels[mask] == segment["category_id"] - 1).all()
            if segment["category_id"] <= STUFF_START:
                key = np.asfortranarray(mask, dtype=np.uint8).tobytes()
                assert objects.pop(key) == segment["category_id"]
        assert not objects
        depth = Image.open(folder / "depth" / annotation["file_name"])
        assert depth.mode == "I;16"
        assert np.abs(np.asarray(depth) / 256.0 - scene.depth).max() < 1 / 256
        jpeg = np.asarray(Image.open(folder / "images" / image["file_name"])).astype(int)
        assert np.abs(jpeg - scene.image).mean() < 6


def test_load_scenes_has_every_field(scenes_cache: Path) -> None:
    metadata = MetadataCatalog.get("scenes_val")
    entries = load_scenes("val", scenes_cache, metadata.as_dict())
    assert len(entries) == 3
    for entry in entries:
        for field in ("file_name", "pan_seg_file_name", "sem_seg_file_name", "depth_file_name"):
            assert Path(entry[field]).is_file()
        assert (entry["height"], entry["width"]) == (384, 384)
        things = [s["category_id"] for s in entry["segments_info"] if s["isthing"]]
        assert things == [a["category_id"] for a in entry["annotations"]]
    assert metadata.thing_classes == THING_CLASSES
    assert metadata.stuff_classes == THING_CLASSES + STUFF_CLASSES
    assert metadata.evaluator_type == "coco_panoptic_seg"
    assert metadata.stuff_dataset_id_to_contiguous_id[16] == 15
    assert metadata.thing_dataset_id_to_contiguous_id == {n + 1: n for n in range(10)}


def test_ensure_split_writes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(writer.SPLITS, "val", writer.Split(1, 2))
    calls = []
    write = writer._write_split
    monkeypatch.setattr(writer, "_write_split", lambda *a: (calls.append(a), write(*a)))
    threads = [threading.Thread(target=ensure_split, args=("val", tmp_path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    folder = ensure_split("val", tmp_path)
    assert len(calls) == 1
    assert sorted(p.name for p in folder.parent.iterdir()) == [".val.lock", "val"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk full")])
def test_ensure_split_leaves_nothing_when_interrupted(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(split: str, directory: Path) -> None:
        (directory / "images").mkdir(parents=True)
        (directory / "images/000000.jpg").write_bytes(b"half")
        raise error

    monkeypatch.setattr(writer, "_write_split", write)
    with pytest.raises(type(error)):
        ensure_split("val", tmp_path)
    assert [p.name for p in tmp_path.glob("*/*")] == [".val.lock"]


def test_ensure_split_clears_what_a_killed_process_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / f"scenes-{writer.VERSION}" / ".val-part-123" / "images"
    left.mkdir(parents=True)
    monkeypatch.setattr(writer, "_write_split", lambda split, directory: directory.mkdir())
    assert ensure_split("val", tmp_path).is_dir()
    assert not left.exists()


def test_ensure_split_refuses_an_unknown_split() -> None:
    with pytest.raises(ValueError, match="train, val, tune, got 'test'"):
        ensure_split("test")


def test_cache_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPEDITE_D2_CACHE", "/somewhere")
    assert writer.cache_root() == Path("/somewhere")
    monkeypatch.delenv("EXPEDITE_D2_CACHE")
    assert writer.cache_root() == Path.home() / ".cache/expedite_d2"


def test_command_line_makes_a_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(writer.SPLITS, "val", writer.Split(1, 1))
    main(["scenes", "--split", "val", "--root", str(tmp_path)])
    folder = tmp_path / f"scenes-{writer.VERSION}/val"
    assert capsys.readouterr().out == f"{folder}\n"
    assert (folder / "images/000000.jpg").is_file()


def test_command_line_reports_a_root_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as caught:
        main(["scenes", "--root", str(tmp_path / "file")])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and len(message.strip().splitlines()) == 1

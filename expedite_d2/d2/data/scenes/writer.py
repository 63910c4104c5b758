"""Writes the scenes to the cache in the formats of real data sets, once.

Layout of ``<cache>/scenes-<version>/<split>/``: ``images/*.jpg``; ``panoptic/*.png`` (segment id =
R + 256 G + 65536 B) with ``panoptic.json`` (COCO panoptic); ``instances.json`` (COCO instances, RLE
masks); ``semantic/*.png`` (contiguous class ids, 255 = ignore); ``depth/*.png`` (16 bits, units of
1/256 m as in KITTI, 0 = no depth). A split appears under its name only when it is complete.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from expedite_d2.d2.data.scenes.render import SIZE, STUFF_CLASSES, THING_CLASSES, render_scene
from expedite_d2.d2.progress import progress

#: Part of the directory's name: must change whenever the pictures change.
VERSION = "v1"
IGNORE = 255


@dataclass(frozen=True)
class Split:
    """Seed of the series and number of scenes."""

    seed: int
    count: int


SPLITS = {
    "train": Split(seed=20221001, count=4000),
    "val": Split(seed=20221002, count=200),
    # Settings are measured and chosen on these, and reported on the ones above.
    "tune": Split(seed=20221003, count=64),
}

#: COCO-style categories; ids in the files are 1 more than the contiguous ids.
CATEGORIES: list[dict[str, Any]] = [
    {"id": number, "name": name, "supercategory": name, "isthing": int(name in THING_CLASSES)}
    for number, name in enumerate(THING_CLASSES + STUFF_CLASSES, 1)
]


def cache_root() -> Path:
    """Directory of everything that is cached: EXPEDITE_D2_CACHE, or ~/.cache/expedite_d2."""
    return Path(os.environ.get("EXPEDITE_D2_CACHE") or "~/.cache/expedite_d2").expanduser()


def split_directory(split: str, root: Path | None = None) -> Path:
    """Where a split lies or will lie; nothing is made.

    Raises:
        ValueError: if there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"scenes: split must be one of {', '.join(SPLITS)}, got {split!r}")
    return (root or cache_root()) / f"scenes-{VERSION}" / split


def ensure_split(split: str, root: Path | None = None) -> Path:
    """Makes a split unless it is there already.

    Safe to call from several processes at once: one makes it, the others wait for it.

    Args:
        split: "train", "val" or "tune".
        root: Cache directory; default: ``cache_root()``.

    Returns:
        The directory of the complete split.
    """
    final = split_directory(split, root)
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with _lock(final.parent / f".{split}.lock"):
        if final.is_dir():
            return final
        # The lock is ours, so what an earlier process left here belongs to nobody.
        for left in final.parent.glob(f".{split}-part-*"):
            shutil.rmtree(left, ignore_errors=True)
        partial_directory = final.parent / f".{split}-part-{os.getpid()}"
        try:
            _write_split(split, partial_directory)
            os.rename(partial_directory, final)
        except BaseException:
            shutil.rmtree(partial_directory, ignore_errors=True)
            raise
    return final


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _write_split(split: str, directory: Path) -> None:
    for name in ("images", "panoptic", "semantic", "depth"):
        (directory / name).mkdir(parents=True)
    seed, count = SPLITS[split].seed, SPLITS[split].count
    processes = max(1, min(len(os.sched_getaffinity(0)), count))
    images, panoptic, instances = [], [], []
    write = partial(_write_scene, directory, seed)
    # fork: the workers need numpy alone, and the caller's main module need not be importable.
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        scenes = pool.imap(write, range(count), chunksize=4)
        title = f"making scenes_{split}"
        with progress(scenes, title, unit="image", total=count) as made:
            for image, segments, objects in made:
                images.append(image)
                panoptic.append(segments)
                instances.extend(objects)
    for number, one in enumerate(instances, 1):
        one["id"] = number
    info = {"description": f"procedural scenes {VERSION}, split {split}, seed {seed}"}
    things = [category for category in CATEGORIES if category["isthing"]]
    _dump(directory / "panoptic.json", info, images, panoptic, CATEGORIES)
    _dump(directory / "instances.json", info, images, instances, things)


def _dump(path: Path, info: dict, images: list, annotations: list, categories: list) -> None:
    content = {
        "info": info,
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }
    path.write_text(json.dumps(content))


def _write_scene(directory: Path, seed: int, index: int) -> tuple[dict, dict, list[dict]]:
    """Renders and writes one scene; returns its image, panoptic and instance records."""
    scene = render_scene(seed, index)
    stem = f"{index:06d}"
    image = {"id": index, "file_name": f"{stem}.jpg", "height": SIZE, "width": SIZE}
    Image.fromarray(scene.image).save(directory / "images" / f"{stem}.jpg", quality=92)
    ids = scene.segments
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    Image.fromarray(colours).save(directory / "panoptic" / f"{stem}.png")
    classes = np.full(len(scene.infos) + 1, IGNORE, np.uint8)
    classes[1:] = [one.category for one in scene.infos]
    Image.fromarray(classes[ids]).save(directory / "semantic" / f"{stem}.png")
    depth = np.clip(scene.depth * 256.0 + 0.5, 0, 65535).astype(np.uint16)
    Image.fromarray(depth).save(directory / "depth" / f"{stem}.png")

    segments: list[dict] = []
    objects: list[dict] = []
    for one in scene.infos:
        rle = coco_mask.encode(np.asfortranarray(ids == one.id, dtype=np.uint8))
        area, box = int(coco_mask.area(rle)), [float(side) for side in coco_mask.toBbox(rle)]
        record = {"category_id": one.category + 1, "area": area, "bbox": box, "iscrowd": 0}
        segments.append({"id": one.id, **record})
        if one.isthing:
            counts = {"size": [SIZE, SIZE], "counts": rle["counts"].decode("ascii")}
            objects.append({"image_id": index, "segmentation": counts, **record})
    panoptic = {"image_id": index, "file_name": f"{stem}.png", "segments_info": segments}
    return image, panoptic, objects

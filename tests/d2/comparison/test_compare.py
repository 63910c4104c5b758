from __future__ import annotations

import contextlib
import errno
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from expedite_d2.d2 import CfgNode, DatasetCatalog, MetadataCatalog
from expedite_d2.d2.comparison import compare as comparing
from expedite_d2.d2.comparison.compare import build_models, compare
from expedite_d2.d2.comparison.cost import count_gflops
from expedite_d2.d2.config import load_config

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
INPUT: {FORMAT: "RGB", MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 256}
DATALOADER: {NUM_WORKERS: 0}
"""
METADATA: dict[str, Any] = {
    "evaluator_type": "sem_seg",
    "stuff_classes": ["a", "b", "c"],
    "ignore_label": 255,
}
SIZES = ((64, 64), (50, 40), (64, 64))


def tiny_config(folder: Path, dataset: str) -> CfgNode:
    path = folder / "tiny.yaml"
    path.write_text(TINY)
    overrides = ["DATASETS.TEST", f"('{dataset}',)", "OUTPUT_DIR", str(folder / "out")]
    torch.manual_seed(0)
    return load_config(path, overrides)


def tiny_images(folder: Path) -> list[dict[str, Any]]:
    """Data set dicts of three images with random labels."""
    random = np.random.default_rng(0)
    records = []
    for number, (height, width) in enumerate(SIZES):
        image, labels = (str(folder / f"{number}_{kind}.png") for kind in ("image", "labels"))
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(image)
        Image.fromarray(random.integers(0, 3, (height, width), dtype=np.uint8)).save(labels)
        records.append(
            {
                "file_name": image,
                "sem_seg_file_name": labels,
                "height": height,
                "width": width,
                "image_id": number,
            }
        )
    return records


@pytest.fixture
def cfg(tmp_path: Path, new_dataset: Callable[..., str]) -> CfgNode:
    return tiny_config(tmp_path, new_dataset(tiny_images(tmp_path), **METADATA))


def further(cfg: CfgNode, **settings: Any) -> CfgNode:
    """The config with other settings."""
    changed = cfg.clone()
    for key, value in settings.items():
        changed.MODEL.EXPEDITE[key] = value
    return changed


def test_models_share_their_parameters(cfg: CfgNode) -> None:
    half = further(cfg, CLUSTERS=[1, 1])
    baseline, *expedited = models = build_models(cfg, half)
    assert baseline.backbone.reduction is None
    assert [model.backbone.reduction.cluster.grid for model in expedited] == [(2, 2), (1, 1)]
    first, *others = (dict(model.named_parameters()) for model in models)
    for other in others:
        assert first.keys() == other.keys()
        assert all(first[name].data_ptr() == other[name].data_ptr() for name in first)
    assert not any(model.training for model in models)


def test_every_model_is_first_as_often_as_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Run:
        model = None

        def __init__(self, name: str) -> None:
            self.name = name

        def prepare(self, *args: Any) -> None:
            pass

        def measure(self, *args: Any) -> None:
            order.append(self.name)

    runs: Any = [Run(name) for name in "abc"]
    comparing._alternate(runs, [[{"image": torch.zeros(3, 4, 4)}]] * 4)
    assert "".join(order) == "abcbcacababc"


class Ran(NamedTuple):
    cfg: CfgNode
    comparison: dict[str, Any]
    printed: str


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """One comparison of two settings that several tests look at; the config's switch is off."""
    folder = tmp_path_factory.mktemp("compare")
    name = "compare_test"
    DatasetCatalog.register(name, lambda: tiny_images(folder))
    MetadataCatalog.get(name).set(**METADATA)
    cfg = tiny_config(folder, name)
    cfg.MODEL.EXPEDITE.ENABLED = False
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        comparison = compare(cfg, {"half": further(cfg, ALPHA=2)})
    yield Ran(cfg, comparison, printed.getvalue())
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_compare_writes_what_it_returns(ran: Ran) -> None:
    output = Path(ran.cfg.OUTPUT_DIR)
    files = {"comparison.json", "comparison.md", "comparison.png", "examples"}
    assert set(os.listdir(output)) == files
    assert json.loads((output / "comparison.json").read_text()) == ran.comparison
    table = (output / "comparison.md").read_text()
    for label in ("backbone GFLOPs", "model latency, ms", "mIoU"):
        assert label in table and label in ran.printed


def test_compare_writes_the_pictures_one_by_one(ran: Ran) -> None:
    folder = Path(ran.cfg.OUTPUT_DIR) / "examples"
    listed = json.loads((folder / "examples.json").read_text())
    assert len(listed) == len(SIZES)
    names = [panel["file"] for example in listed for panel in example["panels"]]
    assert sorted([*names, "examples.json"]) == sorted(os.listdir(folder))
    for example in listed:
        captions = [panel["caption"] for panel in example["panels"]]
        for found, expected in zip(
            captions,
            ["expedited: clusters", "baseline", "expedited", "expedited: ", "half: clusters"]
            + ["input", "half", "half: "],
            strict=True,
        ):
            assert found.startswith(expected)
        sizes = {Image.open(folder / panel["file"]).size for panel in example["panels"]}
        assert len(sizes) == 1


def test_compare_measures_all_models_on_all_images(ran: Ran) -> None:
    found = ran.comparison
    assert found["images"] == len(SIZES) and found["dtype"] == "float32"
    assert found["expedited"]["settings"]["alpha"] == 3
    (half,) = found["further"]
    assert half["name"] == "half" and half["expedited"]["settings"]["alpha"] == 2
    for side in (found["baseline"], found["expedited"], half["expedited"]):
        latency = side["latency_ms"]
        for part in ("backbone", "model"):
            assert 0 < latency[part]["min"] <= latency[part]["median"] <= latency[part]["max"]
        assert latency["backbone"]["median"] < latency["model"]["median"]
        assert set(side["metrics"]["sem_seg"]) >= {"mIoU", "pACC"}
    # Two of 64x64; 50x40 is resized to 80x64 and padded to 96x64.
    costs = [count_gflops(ran.cfg, *size)["model"] for size in ((64, 64), (96, 64))]
    assert found["baseline"]["gflops"]["model"] == pytest.approx((2 * costs[0] + costs[1]) / 3)
    assert half["ratio"]["gflops_backbone"] < found["ratio"]["gflops_backbone"] < 1


def test_compare_in_16_bits(cfg: CfgNode) -> None:
    cfg.TEST.DTYPE = "bfloat16"
    found = compare(cfg)
    assert found["dtype"] == "bfloat16" and found["ratio"]["gflops_backbone"] < 1
    assert "further" not in found


def test_compare_leaves_no_file_and_keeps_old_ones_when_it_fails(
    cfg: CfgNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Path(cfg.OUTPUT_DIR)
    output.mkdir()
    (output / "comparison.json").write_text("old")

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    module = "expedite_d2.d2.comparison.compare"
    monkeypatch.setattr(f"{module}.count_gflops", lambda *args: {"backbone": 1.0, "model": 2.0})
    monkeypatch.setattr(f"{module}.draw_comparison", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(cfg)
    assert os.listdir(output) == ["comparison.json"]
    assert (output / "comparison.json").read_text() == "old"


def test_compare_survives_a_picture_that_cannot_be_written(
    cfg: CfgNode,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    module = "expedite_d2.d2.comparison.compare"
    monkeypatch.setattr(f"{module}.count_gflops", lambda *args: {"backbone": 1.0, "model": 2.0})
    monkeypatch.setattr(f"{module}.draw_comparison", full)
    with caplog.at_level("WARNING", logger=module):
        compare(cfg)
    assert "comparison.png cannot be written: No space left on device" in caplog.text
    assert "backbone GFLOPs" in capsys.readouterr().out
    assert set(os.listdir(cfg.OUTPUT_DIR)) == {"comparison.json", "comparison.md", "examples"}


def test_compare_without_a_data_set_says_so(cfg: CfgNode) -> None:
    cfg.DATASETS.TEST = ()
    with pytest.raises(ValueError, match="DATASETS.TEST is empty"):
        compare(cfg)


def test_compare_with_an_empty_data_set_says_so(cfg: CfgNode, new_dataset: Callable) -> None:
    cfg.DATASETS.TEST = (new_dataset([], **METADATA),)
    with pytest.raises(ValueError, match="empty"):
        compare(cfg)


def compare_on_a_rank(folder: Path, records: list[dict[str, Any]]) -> None:
    DatasetCatalog.register("tiny_ranks", lambda: records)
    MetadataCatalog.get("tiny_ranks").set(**METADATA)
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "expedite_d2.d2.comparison.compare.count_gflops",
            lambda model, height, width: {"backbone": height, "model": width},
        )
        cfg = tiny_config(folder, "tiny_ranks")
        compare(cfg, {"half": further(cfg, ALPHA=2)})


@pytest.mark.slow
def test_compare_on_two_ranks_counts_every_image_once(
    tmp_path: Path, ran: Ran, launch_two: Callable[..., None]
) -> None:
    # Written here: one process would write what the other one reads.
    launch_two(compare_on_a_rank, tmp_path, tiny_images(tmp_path))
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["images"] == len(SIZES)
    sides = [
        [one["baseline"], one["expedited"], one["further"][0]["expedited"]]
        for one in (found, ran.comparison)
    ]
    for side, alone in zip(*sides, strict=True):
        assert side["metrics"]["sem_seg"] == pytest.approx(alone["metrics"]["sem_seg"])
        assert side["gflops"] == pytest.approx({"backbone": 224 / 3, "model": 64.0})

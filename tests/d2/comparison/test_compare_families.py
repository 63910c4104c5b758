"""Segmenter, DPT, HTC and Panoptic FPN the whole way: compare, predict, train, evaluate.

Tiny models with random weights on three scenes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from engine_cases import few_scenes
from PIL import Image
from torch import nn

from expedite_d2.__main__ import main
from expedite_d2.d2 import CfgNode, build_model
from expedite_d2.d2.comparison.compare import compare
from expedite_d2.d2.config import load_config
from expedite_d2.d2.data import build_test_loader
from expedite_d2.d2.engine import do_test, do_train

MODELS = Path(__file__).parents[1] / "modeling"
COMMON = [
    "INPUT.FORMAT", "RGB", "INPUT.MIN_SIZE_TEST", "64", "INPUT.IMAGE_SIZE", "64",
    "INPUT.MIN_SIZE_TRAIN", "(64,)", "DATALOADER.NUM_WORKERS", "0", "SEED", "1",
    "DATASETS.TRAIN", "('scenes_train',)", "DATASETS.TEST", "('scenes_val',)",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "16", "MODEL.ROI_HEADS.NUM_CLASSES", "10",
    "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2", "SOLVER.WARMUP_ITERS", "1",
]  # fmt: skip
PYRAMID = [
    "INPUT.DATASET_MAPPER_NAME", "coco_panoptic_lsj", "MODEL.MASK_FORMER.TEST.INSTANCE_ON", "True",
]  # fmt: skip


class Family(NamedTuple):
    config: str
    opts: list[str]
    metrics: dict[str, str]  # a metric of each task
    parts: tuple[str, ...]  # that training changes


FAMILIES = {
    "segmenter": Family(
        "segmenter_tiny.yaml",
        ["INPUT.CROP.SIZE", "(48, 48)"],
        {"sem_seg": "mIoU"},
        ("backbone", "decoder"),
    ),
    "dpt": Family(
        "dpt_tiny.yaml",
        [
            "DATASETS.TRAIN", "('scenes_depth_train',)", "DATASETS.TEST", "('scenes_depth_val',)",
            "MODEL.EXPEDITE.ALPHA", "1", "MODEL.EXPEDITE.CLUSTERS", "[2, 2]",
            "INPUT.CROP.ENABLED", "True", "INPUT.CROP.TYPE", "absolute",
            "INPUT.CROP.SIZE", "(64, 64)",
        ],
        {"depth": "RMSE"},
        ("backbone", "neck", "head"),
    ),
    "htc": Family(
        "detector_tiny.yaml",
        [
            *PYRAMID, "MODEL.META_ARCHITECTURE", "ExpeditedHTC",
            "MODEL.MASK_FORMER.TEST.SEMANTIC_ON", "False",
        ],
        {"segm": "AP", "bbox": "AP"},
        ("backbone", "fpn", "proposal_generator", "roi_heads", "semantic_branch"),
    ),
    "panoptic_fpn": Family(
        "detector_tiny.yaml",
        [
            *PYRAMID, "MODEL.META_ARCHITECTURE", "ExpeditedPanopticFPN",
            "MODEL.MASK_FORMER.TEST.PANOPTIC_ON", "True", "MODEL.SEM_SEG_HEAD.COMMON_STRIDE", "4",
        ],
        {"panoptic_seg": "PQ", "sem_seg": "mIoU", "segm": "AP", "bbox": "AP"},
        ("backbone", "fpn", "proposal_generator", "roi_heads", "sem_seg_head"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with few_scenes(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def make_cfg(family: Family, output: Path, *opts: str) -> CfgNode:
    output.mkdir(exist_ok=True)
    words = [*COMMON, *family.opts, "OUTPUT_DIR", str(output), *opts]
    return load_config(MODELS / family.config, words)


def build(cfg: CfgNode) -> Any:
    torch.manual_seed(0)
    return build_model(cfg).eval()


def outputs(model: nn.Module, batch: list[dict[str, Any]]) -> list[torch.Tensor]:
    """Every number of the model's output, tensor by tensor."""
    with torch.no_grad():
        (output,) = model(batch)
    found = [output[name] for name in ("depth", "sem_seg") if name in output]
    if "panoptic_seg" in output:
        found.append(output["panoptic_seg"][0])
    if "instances" in output:
        fields = output["instances"].get_fields()
        found += [getattr(fields[name], "tensor", fields[name]) for name in sorted(fields)]
    return found


def test_compare_measures_the_tasks_of_the_family(family: Family, tmp_path: Path) -> None:
    cfg = make_cfg(family, tmp_path / "out")
    torch.manual_seed(0)
    comparison = compare(cfg)
    assert comparison["images"] == 3
    for side in ("baseline", "expedited"):
        metrics = comparison[side]["metrics"]
        assert metrics.keys() == family.metrics.keys()
        for task, metric in family.metrics.items():
            assert math.isfinite(metrics[task][metric])
    ratio = comparison["ratio"]
    assert 0 < ratio["gflops_backbone"] < ratio["gflops_model"] < 1
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == comparison
    picture = np.asarray(Image.open(tmp_path / "out" / "comparison.png").convert("RGB"))
    assert min(picture.shape[:2]) > 400 and picture.std() > 10


@pytest.mark.parametrize("enabled", ["True", "False"])
def test_predict_draws_the_familys_output(family: Family, enabled: str, tmp_path: Path) -> None:
    source = tmp_path / "photo.jpg"
    pixels = np.random.default_rng(0).integers(0, 256, (37, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(source)
    torch.manual_seed(0)
    arguments = ["--config-file", str(MODELS / family.config), "--input", str(source)]
    arguments += ["--output", str(tmp_path / "out"), *COMMON, *family.opts]
    main(["predict", *arguments, "MODEL.EXPEDITE.ENABLED", enabled])
    with Image.open(tmp_path / "out" / "photo.png") as picture:
        assert picture.size == (80, 37)


@pytest.mark.parametrize("enabled", ["True", "False"])
def test_training_changes_every_part(family: Family, enabled: str, tmp_path: Path) -> None:
    cfg = make_cfg(family, tmp_path / "out", "MODEL.EXPEDITE.ENABLED", enabled)
    model = build(cfg)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    do_train(cfg, model)
    (record,) = (tmp_path / "out" / "training.jsonl").read_text().splitlines()
    losses = {k: v for k, v in json.loads(record).items() if "loss" in k}
    assert len(losses) > 1 and all(map(math.isfinite, losses.values()))
    after = model.state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(family.parts)


def test_the_plain_model_ignores_the_settings_of_the_expedited_one(
    family: Family, tmp_path: Path
) -> None:
    switch = "MODEL.EXPEDITE.ENABLED"
    cfg = make_cfg(family, tmp_path / "out", switch, "True")
    expedited = build(cfg)
    plain = build(make_cfg(family, tmp_path / "out", switch, "False", "MODEL.EXPEDITE.ALPHA", "99"))
    plain.load_state_dict(expedited.state_dict())
    assert plain.backbone.reduction is None
    (batch,) = list(build_test_loader(cfg, cfg.DATASETS.TEST[0]))[:1]
    with_clusters, expected = outputs(expedited, batch), outputs(plain, batch)
    expedited.backbone.reduction = None
    without = outputs(expedited, batch)
    assert len(without) == len(expected) > 0
    assert all(torch.equal(one, other) for one, other in zip(without, expected, strict=True))
    assert not all(
        one.shape == other.shape and torch.equal(one, other)
        for one, other in zip(with_clusters, expected, strict=True)
    )


# --- test-time augmentation -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["segmenter", "panoptic_fpn"])
@pytest.mark.parametrize(
    ("sizes", "flip"), [("(64,)", "False"), ("(48, 64)", "True")], ids=["as it is", "augmented"]
)
def test_augmented_evaluation_stands_beside_the_plain_one(
    name: str, sizes: str, flip: str, tmp_path: Path
) -> None:
    augmentation = {"ENABLED": "True", "MIN_SIZES": sizes, "MAX_SIZE": "1333", "FLIP": flip}
    opts = [word for key, value in augmentation.items() for word in (f"TEST.AUG.{key}", value)]
    cfg = make_cfg(FAMILIES[name], tmp_path / "out", *opts)
    results = do_test(cfg, build(cfg))["scenes_val"]
    assert set(results) == {*FAMILIES[name].metrics, "sem_seg_TTA"}
    plain, augmented = results["sem_seg"], results["sem_seg_TTA"]
    assert augmented.keys() == plain.keys()
    if flip == "False":
        assert augmented == plain
    else:
        assert augmented != plain and augmented["pACC"] is not None


# --- images and arithmetic --------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*runs unreduced")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_images_of_odd_sizes_in_every_arithmetic(
    family: Family, dtype: str, tmp_path: Path
) -> None:
    opts = ["MODEL.EXPEDITE.ENABLED", "True", "TEST.DTYPE", dtype]
    if list(family.metrics) == ["sem_seg"]:
        opts += ["TEST.SLIDING_WINDOW.ENABLED", "True"]  # crops of 32x32
    # At one channel a group, GroupNorm has nothing to normalise in a map of one cell.
    opts += ["MODEL.FPN.OUT_CHANNELS", "64", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "64"]
    model = build(make_cfg(family, tmp_path / "out", *opts))
    for height, width in ((1, 1), (37, 251), (90, 33)):
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        found = outputs(model, [{"image": image}])
        assert all(value.isfinite().all() for value in found if value.is_floating_point())
        maps = [value for value in found if value.dim() > 1 and value.shape[-1] != 4]
        assert maps and all(value.shape[-2:] == (height, width) for value in maps)

"""Samples in which nothing counts: losses are finite, and every parameter has its gradient.

DistributedDataParallel waits for the gradient of each parameter, whatever a rank's images show.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detector_cases import BACKGROUND, THINGS, register
from torch import nn

import expedite_d2.d2.modeling  # noqa: F401 (registers the architectures)
from expedite_d2.d2 import Instances, build_model
from expedite_d2.d2.config import load_config

HERE = Path(__file__).parent
SIZE = (64, 64)
IGNORED = 255

FAMILIES: dict[str, tuple[str, list[Any]]] = {
    "mask2former": ("mask2former_tiny.yaml", []),
    "mask2former-aux": ("mask2former_tiny.yaml", ["MODEL.MASK_FORMER.SEM_AUX_WEIGHT", 1.0]),
    "mask2former-last": ("mask2former_tiny.yaml", ["MODEL.MASK_FORMER.DEEP_SUPERVISION", False]),
    "segmenter": ("segmenter_tiny.yaml", []),
    "segmenter-linear": ("segmenter_tiny.yaml", ["MODEL.SEGMENTER.DECODER", "linear"]),
    "dpt": ("dpt_tiny.yaml", ["MODEL.DPT.GRADIENT_WEIGHT", 0.5]),
    "dpt-metres": ("dpt_tiny.yaml", ["MODEL.DPT.INVERSE", False]),
    "htc": ("detector_tiny.yaml", ["MODEL.META_ARCHITECTURE", "ExpeditedHTC"]),
    "htc-giou": (
        "detector_tiny.yaml",
        [
            *("MODEL.META_ARCHITECTURE", "ExpeditedHTC"),
            *("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "giou"),
        ],
    ),
    "htc-alone": (
        "detector_tiny.yaml",
        [
            *("MODEL.META_ARCHITECTURE", "ExpeditedHTC", "MODEL.HTC.SEMANTIC_ON", False),
            *("MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", False),
        ],
    ),
    "panoptic_fpn": (
        "detector_tiny.yaml",
        [
            *("MODEL.META_ARCHITECTURE", "ExpeditedPanopticFPN"),
            *("MODEL.SEM_SEG_HEAD.COMMON_STRIDE", 4),
        ],
    ),
}


@pytest.fixture(autouse=True)
def metadata() -> None:
    register()


def sample(kind: str, seed: int = 0) -> dict[str, Any]:
    """Noise with targets for every family.

    Args:
        kind: "full"; or "nothing" that counts, "stuff" alone, a "crowd" (labels without a mask),
            or objects whose masks are "hidden" (empty).
        seed: of the noise.
    """
    height, width = SIZE
    semantic = torch.full(SIZE, IGNORED)
    masks, classes = torch.zeros(0, *SIZE, dtype=torch.bool), torch.zeros(0, dtype=torch.int64)
    depth = torch.zeros(SIZE)
    if kind in ("full", "hidden"):
        masks, classes = torch.zeros(3, *SIZE, dtype=torch.bool), torch.tensor(THINGS)
    if kind == "full":
        for i, thing in enumerate(THINGS):
            masks[i, 10 * i : 10 * i + 16, 15 * i : 15 * i + 16] = True
            semantic[masks[i]] = thing
        depth += 5 + torch.arange(width) / width
    elif kind == "stuff":
        semantic[:] = BACKGROUND
        masks, classes = torch.ones(1, *SIZE, dtype=torch.bool), torch.tensor([BACKGROUND])
        depth[0, 0] = 3.0  # a single measure has no neighbour
    elif kind == "crowd":
        semantic[:20] = THINGS[0]
        depth += 1e6  # beyond MODEL.DPT.MAX_DEPTH
    instances = Instances(SIZE)
    instances.gt_masks, instances.gt_classes = masks, classes
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, *SIZE), generator=generator, dtype=torch.uint8)
    return {"image": image, "instances": instances, "sem_seg": semantic, "depth": depth}


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    """Each family's model, built once."""
    return {}


def built(models: dict[str, nn.Module], family: str) -> nn.Module:
    if family not in models:
        file, opts = FAMILIES[family]
        torch.manual_seed(0)
        models[family] = build_model(load_config(HERE / file, opts)).train()
    models[family].zero_grad(set_to_none=True)
    return models[family]


BATCHES = [
    *(["nothing"], ["stuff"], ["crowd"], ["hidden"]),
    *(["nothing", "nothing"], ["full", "nothing"], ["nothing", "full"], ["crowd", "full"]),
    *(["hidden", "stuff"], ["stuff", "nothing", "crowd"]),
]


@pytest.mark.parametrize("kinds", BATCHES, ids="-".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_training_without_targets_reaches_every_parameter(
    family: str, kinds: list[str], models: dict[str, nn.Module]
) -> None:
    model = built(models, family)
    expected = set(model([sample("full")]))
    losses = model([sample(kind, seed) for seed, kind in enumerate(kinds)])
    assert set(losses) == expected
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    sum(losses.values()).backward()
    learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert [name for name, p in learning if p.grad is None] == []
    assert [name for name, p in learning if not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("family", ["segmenter", "dpt"])
def test_nothing_to_learn_from_is_no_loss(family: str, models: dict[str, nn.Module]) -> None:
    model = built(models, family)
    losses = model([sample("nothing"), sample("nothing", 1)])
    sum(losses.values()).backward()
    assert all(loss == 0 for loss in losses.values())
    assert all((p.grad == 0).all() for p in model.parameters() if p.requires_grad)


INSTANCES = ["mask2former", "htc", "panoptic_fpn"]


@pytest.mark.parametrize("family", INSTANCES)
def test_without_objects_there_need_be_no_masks(family: str, models: dict[str, nn.Module]) -> None:
    """Detectron2's mapper makes none."""
    model = built(models, family)
    without = sample("nothing")
    without["instances"].remove("gt_masks")
    losses = [None, None]
    for number, inputs in enumerate((sample("nothing"), without)):
        torch.manual_seed(0)
        losses[number] = model([inputs, sample("full", 1)])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("family", INSTANCES)
@pytest.mark.parametrize(("masks", "name"), [(None, "NoneType"), ([[1.0]] * 3, "list")])
def test_masks_that_are_no_bitmaps_are_named(
    family: str, masks: Any, name: str, models: dict[str, nn.Module]
) -> None:
    inputs = sample("full")
    inputs["instances"].remove("gt_masks")
    if masks is not None:
        inputs["instances"].gt_masks = masks
    with pytest.raises(ValueError, match=f"gt_masks must be bitmaps .*got {name}"):
        built(models, family)([inputs])

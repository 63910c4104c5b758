"""Models and images that the tests of the detectors share."""

from __future__ import annotations

from pathlib import Path

import torch

import expedite_d2.d2.modeling  # noqa: F401 (registers the architectures)
from expedite_d2.d2 import Instances, MetadataCatalog, build_model
from expedite_d2.d2.config import load_config

TINY = Path(__file__).parent / "detector_tiny.yaml"
#: Contiguous ids of the three thing classes among the five classes of the semantic labels.
THINGS = (0, 2, 4)
BACKGROUND = 1


def register() -> None:
    catalog = MetadataCatalog.get("detector_tiny")
    catalog.thing_dataset_id_to_contiguous_id = {10 * (i + 1): c for i, c in enumerate(THINGS)}


def config(architecture, *opts):
    stride = 4 if architecture == "ExpeditedPanopticFPN" else 8
    return load_config(
        TINY,
        [
            *("MODEL.META_ARCHITECTURE", architecture),
            *("MODEL.SEM_SEG_HEAD.COMMON_STRIDE", stride),
            *opts,
        ],
    )


def build(architecture, *opts):
    torch.manual_seed(0)
    return build_model(config(architecture, *opts))


def image(height=64, width=64, things=3, seed=0):
    """Squares, one of each thing class, on noise; the noise is a segment, too."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 60, (3, height, width), generator=generator)
    masks = torch.zeros(things, height, width, dtype=torch.bool)
    semantic = torch.full((height, width), BACKGROUND)
    for i in range(things):
        top, left = int(height * (0.05 + 0.3 * i)), int(width * (0.1 + 0.25 * i))
        masks[i, top : top + height // 4, left : left + width // 4] = True
        pixels[i][masks[i]] += 150
        semantic[masks[i]] = THINGS[i]
    target = Instances((height, width))
    target.gt_masks = torch.cat([masks, (semantic == BACKGROUND)[None]])
    target.gt_classes = torch.tensor([*THINGS[:things], BACKGROUND])
    return {"image": pixels.to(torch.uint8), "instances": target, "sem_seg": semantic}


def train(model, inputs, steps):
    """Total loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    totals = []
    for _ in range(steps):
        loss = sum(model.train()(inputs).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(loss.item())
    return totals

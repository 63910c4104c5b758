"""What the official Mask2Former's checkpoints hold."""

from __future__ import annotations

import re
from pathlib import Path


def official_names():
    """{name: shape} of Mask2Former Swin-L on COCO panoptic; ``{0-8}`` in a line counts layers."""
    file = Path(__file__).parent / "mask2former_swin_large_coco_panoptic.txt"
    shapes = {}
    for line in file.read_text().splitlines():
        name, shape = line.split(" ")
        layers = re.search(r"\{(\d+)-(\d+)\}", name)
        span = range(int(layers[1]), int(layers[2]) + 1) if layers else [None]
        for layer in span:
            full = name if layer is None else name.replace(layers[0], str(layer))
            shapes[full] = tuple(int(side) for side in shape.split("x"))
    return shapes

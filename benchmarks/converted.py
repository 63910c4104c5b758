"""What a Mask2Former of ours loses when it is expedited as transformers' own class: nothing more.

    python -m benchmarks.converted --output benchmarks/results/cpu-converted.json

The small Mask2Former of the scenes is converted to Mask2FormerForUniversalSegmentation. Both are
evaluated plain and expedited by the same settings, on the same images and with the same
post-processing, which is ours. Detail maps know the weights that they were fitted to by the
tensors of the encoder, which are others in transformers' class: there they are fitted again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from tabulate import tabulate

from benchmarks.common import ROOT, Recorder, parser
from benchmarks.systems import outside
from expedite_d2 import Reduction, calibrate, describe, expedite, restore
from expedite_d2.d2 import build_model
from expedite_d2.d2.config import load_config
from expedite_d2.d2.data import build_test_loader
from expedite_d2.d2.engine import build_trained_model
from expedite_d2.d2.evaluation import build_evaluators, inference_on_dataset
from expedite_d2.d2.modeling.backbone.settings import reduction_from_config
from expedite_d2.errors import cli

CONFIG = "configs/scenes/panoptic/mask2former_swin_mini{}.yaml"
METRICS = (("panoptic_seg", "PQ"), ("sem_seg", "mIoU"), ("segm", "AP"))
# Images that detail maps are fitted to.
CALIBRATED = 16
MAPS = "half, detail map"


def config(device: str, variant: str = "") -> Any:
    """The plain config, or that of a variant."""
    fixed = ["MODEL.DEVICE", device, "DATALOADER.NUM_WORKERS", 0]
    return load_config(str(ROOT / CONFIG.format(variant)), fixed)


class Pair:
    """One model in two classes, both of which may be expedited.

    Args:
        cfg: the plain config.

    Attributes:
        models: by the library that the class is of.
        readers: what is evaluated, with our pre- and post-processing around either.
    """

    def __init__(self, cfg: Any) -> None:
        self.ours: Any = build_trained_model(cfg)
        theirs = outside(cfg, self.ours)
        reader: Any = build_model(cfg).eval()
        reader.logits = theirs.logits
        self.models: dict[str, Any] = {"expedite_d2": self.ours, "transformers": theirs.model}
        self.readers: dict[str, Any] = {"expedite_d2": self.ours, "transformers": reader}

    def calibrated(self, settings: Reduction, batches: Sequence[Any]) -> Reduction:
        """Settings with detail maps that were fitted to transformers' model."""
        images = [self.ours.preprocess([one["image"] for one in batch]) for batch in batches]
        model = expedite(self.models["transformers"], replace(settings, correction=None))
        return calibrate(model, [{"pixel_values": image.tensor} for image in images])


def settings(device: str) -> dict[str, Reduction | None]:
    """The settings by name: the demo's, and half of the blocks' multiply-adds."""
    demo, half = (reduction_from_config(config(device, f"_{v}")) for v in ("expedited", "half"))
    assert half is not None
    return {"plain": None, "expedited": demo, "half": replace(half, correction=None), MAPS: half}


@cli
def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--images", type=int, default=100, help="of scenes_val (default 100)")
    args = arguments.parse_args(argv)
    if args.quick:
        args.images = 2
    logging.getLogger("expedite_d2").setLevel(logging.ERROR)
    recorder = Recorder("converted", args)
    cfg = config(args.device)
    (dataset,) = cfg.DATASETS.TEST
    images = list(islice(build_test_loader(cfg, dataset), args.images))
    tune = build_test_loader(cfg, dataset.replace("_val", "_tune"))
    batches = list(islice(tune, CALIBRATED))
    pair = Pair(cfg)
    for name, reduction in settings(args.device).items():
        for library, model in pair.models.items():
            if recorder.late(f"{library} {name}"):
                continue
            if name == MAPS and library == "transformers":
                assert reduction is not None
                reduction = pair.calibrated(reduction, batches)
            restore(model)
            if reduction is not None:
                expedite(model, reduction)
            found: Any = inference_on_dataset(
                pair.readers[library], images, build_evaluators(cfg, dataset)
            )
            height, width = images[0][0]["image"].shape[-2:]
            recorder.add(
                {
                    "dataset": dataset,
                    "images": len(images),
                    "setting": name,
                    "library": library,
                    "share": describe(model, (height, width)).share_of_blocks,
                    "maps": bool(reduction and reduction.correction),
                    "metrics": {metric: found[task][metric] for task, metric in METRICS},
                }
            )
    recorder.finish(table(recorder.results))


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """One line per setting and metric."""
    found = {(row["setting"], row["library"]): row["metrics"] for row in results}
    rows = []
    for setting, library in found:
        if library != "transformers":
            continue
        ours, theirs = found[setting, "expedite_d2"], found[setting, library]
        for metric, value in theirs.items():
            line = {"setting": setting, "metric": metric, "expedite_d2": ours[metric]}
            rows.append({**line, library: value, "difference": value - ours[metric]})
    return tabulate(rows, headers="keys", floatfmt=".2f")


if __name__ == "__main__":
    main()

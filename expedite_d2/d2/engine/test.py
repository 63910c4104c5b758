"""Evaluation on the data sets of a config."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from torch import nn

from expedite_d2.d2.data import build_test_loader
from expedite_d2.d2.evaluation import (
    SemanticEvaluator,
    build_evaluators,
    inference_on_dataset,
)
from expedite_d2.d2.evaluation.evaluator import format_number
from expedite_d2.d2.evaluation.test_time_augmentation import SemanticSegmentorWithTTA
from expedite_d2.d2.provider import CfgNode, comm
from expedite_d2.files import replacing

logger = logging.getLogger(__name__)


def do_test(cfg: CfgNode, model: nn.Module) -> dict[str, dict[str, dict[str, float | None]]]:
    """Evaluate on every data set of ``DATASETS.TEST``; print and return {data set: {task: …}}.

    With ``TEST.AUG.ENABLED``, semantic segmentation is evaluated a second time with test-time
    augmentation, as the task "sem_seg_TTA". The main process also writes
    ``OUTPUT_DIR/metrics.json``.
    """
    results = {}
    for name in cfg.DATASETS.TEST:
        loader = build_test_loader(cfg, name)
        results[name] = inference_on_dataset(model, loader, build_evaluators(cfg, name))
        if cfg.TEST.AUG.ENABLED and comm.all_gather("sem_seg" in results[name])[0]:
            augmented = SemanticSegmentorWithTTA(cfg, model)
            tta = inference_on_dataset(augmented, loader, [SemanticEvaluator(name)])
            results[name] |= {f"{task}_TTA": metrics for task, metrics in tta.items()}
        if comm.is_main_process():
            for task, metrics in results[name].items():
                line = "  ".join(
                    f"{metric} {format_number(value, 4)}"
                    for metric, value in metrics.items()
                    if not isinstance(value, dict)
                )
                logger.info("%s %s: %s", name, task, line)
    if comm.is_main_process():
        with replacing(Path(cfg.OUTPUT_DIR) / "metrics.json") as path:
            path.write_text(json.dumps(results, indent=2) + "\n")
    return results

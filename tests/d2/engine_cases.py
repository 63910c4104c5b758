"""A tiny model, a handful of scenes and runs on them: what tests of training and evaluation share.

Its functions are what the processes of distributed tests run, so they take paths, not fixtures.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import expedite_d2.d2.modeling  # noqa: F401 - registers the model that the config names
from expedite_d2.d2 import (
    Boxes,
    CfgNode,
    DatasetCatalog,
    Instances,
    MetadataCatalog,
    build_model,
    comm,
    launch,
)
from expedite_d2.d2.comparison.compare import compare
from expedite_d2.d2.config import load_config
from expedite_d2.d2.data import build_test_loader
from expedite_d2.d2.data.depth import read_depth
from expedite_d2.d2.data.scenes import dataset, writer
from expedite_d2.d2.data.scenes.depth import register_scenes_depth
from expedite_d2.d2.engine import build_trained_model, do_test, do_train
from expedite_d2.d2.engine import train as training
from expedite_d2.d2.evaluation import build_evaluators, inference_on_dataset
from expedite_d2.d2.evaluation.panoptic import read_panoptic

CONFIG = "scenes/panoptic/mask2former_swin_mini_expedited.yaml"
SWIN = [
    "MODEL.SWIN.EMBED_DIM", "16", "MODEL.SWIN.DEPTHS", "[1, 1, 2, 1]",
    "MODEL.SWIN.NUM_HEADS", "[1, 1, 2, 2]", "MODEL.SWIN.WINDOW_SIZE", "4",
]  # fmt: skip
RUN = [
    "MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "2",
    "SOLVER.MAX_ITER", "4", "SOLVER.WARMUP_ITERS", "1", "SOLVER.CHECKPOINT_PERIOD", "2",
]  # fmt: skip
#: The model that comes with the package, on small images.
SHIPPED = [*RUN, "INPUT.IMAGE_SIZE", "96", "INPUT.MIN_SIZE_TEST", "128"]
TINY = [
    *RUN, *SWIN, "MODEL.WEIGHTS", "",
    "MODEL.EXPEDITE.ALPHA", "2", "MODEL.EXPEDITE.CLUSTERS", "[3, 3]",
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", "5", "MODEL.MASK_FORMER.DEC_LAYERS", "2",
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS", "32", "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", "1",
    "INPUT.IMAGE_SIZE", "64", "INPUT.MIN_SIZE_TEST", "64",
]  # fmt: skip


@contextlib.contextmanager
def few_scenes(cache: Path, others: int = 3) -> Iterator[None]:
    """The scenes' names stand for four training images and ``others`` of each kind in ``cache``."""
    with pytest.MonkeyPatch.context() as patch:
        for split, count in (("train", 4), ("val", others), ("tune", others)):
            patch.setitem(writer.SPLITS, split, writer.Split(writer.SPLITS[split].seed, count))
            writer.ensure_split(split, cache)
        patch.setenv("EXPEDITE_D2_CACHE", str(cache))
        use_scenes(cache)
        yield
    forget_scenes()
    dataset.register_scenes()
    register_scenes_depth()


def use_scenes(cache: Path) -> None:
    """Let this process take the scenes from ``cache``; "scenes_first" is the first one alone."""
    os.environ["EXPEDITE_D2_CACHE"] = str(cache)
    forget_scenes()
    dataset.register_scenes()
    register_scenes_depth()
    DatasetCatalog.register("scenes_first", lambda: DatasetCatalog.get("scenes_val")[:1])
    metadata = MetadataCatalog.get("scenes_val").as_dict()
    MetadataCatalog.get("scenes_first").set(**metadata | {"name": "scenes_first"})


def forget_scenes() -> None:
    for name in [name for name in DatasetCatalog.list() if name.startswith("scenes_")]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def free_port() -> int:
    """A port that will still be free when it is listened to.

    It lies below those that the system hands out by itself, and apart from those that tests in
    other processes find.
    """
    for port in range(12000 + os.getpid() * 97 % 20000, 32768):
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port")


def make_cfg(output: Path, *opts: str, config: str = CONFIG, tiny: list[str] = TINY) -> CfgNode:
    output.mkdir(exist_ok=True, parents=True)
    return load_config(config, [*tiny, "OUTPUT_DIR", str(output), *opts])


# --- evaluation -------------------------------------------------------------------------------


class NoisyOracle(nn.Module):
    """Predicts what the files of a scene say, with errors that depend on the image alone."""

    def forward(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [self.predict(item) for item in batch]

    def predict(self, item: dict[str, Any]) -> dict[str, Any]:
        rng = np.random.default_rng(item["image_id"])
        shift = tuple(rng.integers(-4, 5, 2))
        size = item["height"], item["width"]
        ids = read_panoptic(item["pan_seg_file_name"], size)
        ids = torch.from_numpy(np.roll(ids, shift, (0, 1)))
        segments = [s for s in item["segments_info"] if rng.random() < 0.9]
        ids[~torch.isin(ids, torch.tensor([s["id"] for s in segments]))] = 0
        scores = torch.zeros(len(MetadataCatalog.get("scenes_val").stuff_classes), *ids.shape)
        for segment in segments:
            scores[segment["category_id"]][ids == segment["id"]] = 1
        things = [s for s in segments if s["isthing"]]
        instances = Instances(tuple(ids.shape))
        instances.pred_masks = torch.stack([ids == s["id"] for s in things])
        corners = [[x, y, x + w, y + h] for x, y, w, h in (s["bbox"] for s in things)]
        instances.pred_boxes = Boxes(torch.tensor(corners, dtype=torch.float32))
        instances.scores = torch.from_numpy(rng.random(len(things)))
        instances.pred_classes = torch.tensor([s["category_id"] for s in things])
        depth = read_depth(item["depth_file_name"], 1 / 256) * rng.uniform(0.8, 1.2, ids.shape)
        return {
            "panoptic_seg": (ids, segments),
            "sem_seg": scores,
            "instances": instances,
            "depth": torch.from_numpy(depth),
        }


def as_it_is(item: dict[str, Any]) -> dict[str, Any]:
    return item


def evaluate(cache: Path, output: Path) -> None:
    """Evaluate everything there is; each process writes its results to ``rank<r>.json``."""
    use_scenes(cache)
    results: dict[str, Any] = {}
    with one_thread(), pytest.MonkeyPatch.context() as patch:
        # What a comparison costs most time with, and no other process has a part in.
        patch.setattr(
            "expedite_d2.d2.comparison.compare.count_gflops",
            lambda model, height, width: {"backbone": height, "model": width},
        )
        patch.setattr(
            "expedite_d2.d2.comparison.compare.draw_comparison",
            lambda comparison, examples, metadata, path: path.touch(),
        )
        for name in ("scenes_val", "scenes_first"):
            cfg = make_cfg(output / name, "DATASETS.TEST", f"('{name}',)", tiny=SHIPPED)
            tasks = (name, "scenes_depth_val")
            evaluators = [one for task in tasks for one in build_evaluators(cfg, task)]
            loader = build_test_loader(cfg, name, as_it_is)
            results[name] = {
                "oracle": inference_on_dataset(NoisyOracle(), loader, evaluators),
                "model": do_test(cfg, build_trained_model(cfg)).get(name),
                "comparison": compare(cfg),
            }
    (output / f"rank{comm.get_rank()}.json").write_text(json.dumps(results))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """As in processes that share the cores; how products are added up depends on the number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# --- training ---------------------------------------------------------------------------------


def train(
    cfg: CfgNode, resume: bool = False, before: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Train the config's model.

    Args:
        cfg: the config.
        resume: whether to go on from the last checkpoint.
        before: called before each iteration with how many this call has done.

    Returns:
        "state": the trained weights; "images": the ids of each batch of this process.
    """
    torch.manual_seed(comm.get_rank())
    model = build_model(cfg)
    images: list[list[int]] = []

    def watch(module: nn.Module, args: tuple) -> None:
        if before is not None:
            before(len(images))
        images.append([item["image_id"] for item in args[0]])

    model.register_forward_pre_hook(watch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "LOG_PERIOD", 1)
        do_train(cfg, model, resume=resume)
    return {"state": model.state_dict(), "images": images}


def die(iteration: int) -> None:
    """End the last process as the system does it, in the fourth iteration.

    That is one later than the checkpoint: only then it is certain to have been written.
    """
    if iteration == 3 and comm.get_rank() == comm.get_world_size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)


def train_whole_and_be_killed(cache: Path, output: Path) -> None:
    """One training from begin to end, and a second that the last process does not survive."""
    use_scenes(cache)
    save_training(output / "whole")
    save_training(output / "parts", before=die)


def train_on_a_machine(rank: int, address: str, cache: Path, output: Path) -> None:
    """One of two machines; on the second one, the process is killed."""
    start = functools.partial(mp.start_processes, start_method="fork")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mp, "start_processes", start)
        try:
            launch(train_whole_and_be_killed, 1, 2, rank, address, args=(cache, output))
        except Exception as error:
            (output / f"machine{rank}.txt").write_text(f"{type(error).__name__}: {error}")
            raise


def resume(cache: Path, output: Path) -> None:
    """Go on with the second training."""
    use_scenes(cache)
    save_training(output / "parts", resume=True)


def save_training(output: Path, **options: Any) -> None:
    torch.save(train(make_cfg(output), **options), output / f"rank{comm.get_rank()}.pt")


def resume_from_different_checkpoints(cache: Path, output: Path) -> None:
    """The second machine does not see the first one's checkpoints."""
    use_scenes(cache)
    train(make_cfg(output if comm.is_main_process() else output / "elsewhere"), resume=True)


@functools.cache
def families() -> dict[str, tuple[str, list[str]]]:
    """Config and overrides of each kind of model, tiny."""
    fresh = [*RUN, "MODEL.WEIGHTS", ""]
    pyramid = [*fresh, *SWIN, "INPUT.IMAGE_SIZE", "96", "SOLVER.OPTIMIZER", "ADAMW"]
    vit = [*fresh, "INPUT.CROP.ENABLED", "True", "INPUT.CROP.TYPE", "absolute"]
    vit += ["INPUT.CROP.SIZE", "(64, 64)"]
    return {
        "mask2former": (CONFIG, TINY),
        "htc": ("scenes/instance/htc_swin_mini.yaml", pyramid),
        "panoptic_fpn": ("scenes/panoptic/panoptic_fpn_swin_mini.yaml", pyramid),
        "dpt": ("scenes/depth/dpt_vit_mini.yaml", vit),
        "segmenter": ("scenes/semantic/segmenter_vit_mini.yaml", vit),
    }


def train_families(cache: Path, output: Path) -> None:
    """Two iterations of each kind of model."""
    use_scenes(cache)
    for name, (config, tiny) in families().items():
        opts = ("SOLVER.MAX_ITER", "2", "MODEL.EXPEDITE.ENABLED", "False")
        trained = train(make_cfg(output / name, *opts, config=config, tiny=tiny))
        torch.save(trained, output / name / f"rank{comm.get_rank()}.pt")

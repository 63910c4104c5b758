"""The training loop, plain in the manner of Detectron2's plain_train_net."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections import defaultdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from expedite_d2.d2.checkpoint import load_weights
from expedite_d2.d2.checkpoint.checkpointer import DetectionCheckpointer
from expedite_d2.d2.data import build_train_loader
from expedite_d2.d2.engine.solver import build_lr_scheduler, build_optimizers
from expedite_d2.d2.engine.test import do_test
from expedite_d2.d2.progress import Heartbeat
from expedite_d2.d2.provider import CfgNode, PeriodicCheckpointer, comm

logger = logging.getLogger(__name__)

LOG_PERIOD = 20  # iterations between two lines of the training log, as in Detectron2


def do_train(cfg: CfgNode, model: nn.Module, resume: bool = False) -> None:
    """Train ``model`` from ``MODEL.WEIGHTS``, or from the last checkpoint with ``resume``.

    Of ``MODEL.WEIGHTS`` what fits is taken: another head, number of classes or queries, or size of
    images is no obstacle; the log tells what stays random.

    Checkpoints hold the model, the optimizers, the schedules, the iteration and the seed, and every
    random choice depends on the last two, so that a resumed run is the run it would have been.

    Raises:
        ValueError: weights of another backbone; with ``resume``, checkpoints that cannot be read,
            or that differ between the machines.
    """
    device = torch.device(cfg.MODEL.DEVICE)
    optimizers = build_optimizers(cfg, model)
    schedulers = {f"{k}_schedule": build_lr_scheduler(cfg, o) for k, o in optimizers.items()}
    scaler = torch.amp.GradScaler(
        device.type, enabled=cfg.SOLVER.AMP.ENABLED and device.type == "cuda"
    )
    checkpointer = DetectionCheckpointer(
        model, cfg.OUTPUT_DIR, **optimizers, **schedulers, scaler=scaler
    )
    saved: dict[str, Any] = {}
    if resume and checkpointer.has_checkpoint():
        saved = checkpointer.resume_or_load("", resume=True)
    else:
        load_weights(model, cfg.MODEL.WEIGHTS, strict=False)
    start = saved.get("iteration", -1) + 1
    starts = comm.all_gather(start)
    if len(set(starts)) > 1:
        raise ValueError(
            f"--resume must find the same checkpoint in every process, but they would go on from "
            f"iterations {starts}: OUTPUT_DIR must be a directory that all machines share"
        )
    if cfg.SEED < 0:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.SEED = saved.get("seed", int(comm.shared_random_seed()))
    periodic = PeriodicCheckpointer(
        checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, max_iter=cfg.SOLVER.MAX_ITER, max_to_keep=2
    )
    train_model: nn.Module = model
    if comm.get_world_size() > 1:
        # Detectron2's create_ddp_model always passes device ids, which gloo on CPU refuses.
        ids = [comm.get_local_rank()] if device.type == "cuda" else None
        train_model = DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)

    train_model.train()
    log = _TrainingLog(cfg.SOLVER.MAX_ITER, start, Path(cfg.OUTPUT_DIR) / "training.jsonl")
    logger.info("training from iteration %d to %d", start, cfg.SOLVER.MAX_ITER)
    loader = build_train_loader(cfg, start_iteration=start)
    iterations = range(start, cfg.SOLVER.MAX_ITER)
    with log.heartbeat:
        for iteration, batch in zip(iterations, loader, strict=False):
            log.data_ready()
            # Dropout and sampled points depend on seed and iteration alone: resuming changes
            # nothing.
            torch.manual_seed(cfg.SEED + iteration * comm.get_world_size() + comm.get_rank())
            losses = _train_step(cfg, train_model, batch, optimizers, scaler, iteration)
            log.step(iteration, losses, optimizers["optimizer"].param_groups[0]["lr"])
            for scheduler in schedulers.values():
                scheduler.step()
            period = cfg.TEST.EVAL_PERIOD
            done = iteration + 1
            if period > 0 and done % period == 0 and done != cfg.SOLVER.MAX_ITER:
                do_test(cfg, model)
                comm.synchronize()
                train_model.train()
            periodic.step(iteration, seed=cfg.SEED)


def _train_step(
    cfg: CfgNode,
    model: nn.Module,
    batch: list[dict[str, Any]],
    optimizers: dict[str, torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    iteration: int,
) -> dict[str, torch.Tensor]:
    autocast: contextlib.AbstractContextManager = contextlib.nullcontext()
    if cfg.SOLVER.AMP.ENABLED:
        device_type = torch.device(cfg.MODEL.DEVICE).type
        dtype = torch.float16 if device_type == "cuda" else torch.bfloat16
        autocast = torch.autocast(device_type, dtype=dtype)
    with autocast:
        losses = model(batch)
        total = torch.stack(list(losses.values())).sum()
    if not torch.isfinite(total):
        values = {name: loss.item() for name, loss in losses.items()}
        raise FloatingPointError(f"the loss is not finite at iteration {iteration}: {values}")
    for optimizer in optimizers.values():
        optimizer.zero_grad(set_to_none=True)
    scaler.scale(total).backward()
    for optimizer in optimizers.values():
        scaler.unscale_(optimizer)
    _clip_gradients(cfg, model)
    for optimizer in optimizers.values():
        scaler.step(optimizer)
    scaler.update()
    return losses


def _clip_gradients(cfg: CfgNode, model: nn.Module) -> None:
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if not clip.ENABLED:
        return
    parameters = [p for p in model.parameters() if p.grad is not None]
    if clip.CLIP_TYPE == "full_model":
        nn.utils.clip_grad_norm_(parameters, clip.CLIP_VALUE, norm_type=clip.NORM_TYPE)
    elif clip.CLIP_TYPE == "norm":
        for parameter in parameters:
            nn.utils.clip_grad_norm_(parameter, clip.CLIP_VALUE, norm_type=clip.NORM_TYPE)
    elif clip.CLIP_TYPE == "value":
        nn.utils.clip_grad_value_(parameters, clip.CLIP_VALUE)
    else:
        raise ValueError(
            "SOLVER.CLIP_GRADIENTS.CLIP_TYPE must be full_model, norm or value, "
            f"got {clip.CLIP_TYPE!r}"
        )


class _TrainingLog:
    """A log line and a JSON record every ``LOG_PERIOD`` iterations, on the main process.

    Attributes:
        heartbeat: logs in between, where iterations take long.
    """

    def __init__(self, max_iter: int, start: int, path: Path) -> None:
        self.max_iter = max_iter
        self.start = start
        self.path = path
        self.sums: dict[str, torch.Tensor] = {}
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.count = 0
        self.clock = time.perf_counter()
        self.heartbeat = Heartbeat("training", max_iter, done=start)

    def data_ready(self) -> None:
        self._lap("data")
        if comm.is_main_process():
            self.heartbeat.start()

    def step(self, iteration: int, losses: dict[str, torch.Tensor], lr: float) -> None:
        self._lap("step")
        self.count += 1
        self.heartbeat.done = iteration + 1
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0) + loss.detach()
        if (iteration + 1) % LOG_PERIOD == 0 or iteration + 1 == self.max_iter:
            self._write(iteration, lr)

    def _lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] += now - self.clock
        self.clock = now

    def _write(self, iteration: int, lr: float) -> None:
        means = comm.reduce_dict({k: v / self.count for k, v in self.sums.items()})
        if comm.is_main_process():
            values = {name: round(float(value), 4) for name, value in means.items()}
            total = sum(values.values())
            timing = {f"{k}_time": round(v / self.count, 4) for k, v in self.seconds.items()}
            left = (self.max_iter - iteration - 1) * sum(timing.values())
            logger.info(
                "iter %d/%d  eta %s  loss %.3f  lr %.2e  step %.3f s  data %.3f s",
                iteration + 1, self.max_iter, timedelta(seconds=int(left)), total, lr,
                timing["step_time"], timing["data_time"],
            )  # fmt: skip
            self.heartbeat.told()
            record = {"iteration": iteration + 1, "lr": lr, "total_loss": total, **values, **timing}
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        self.sums.clear()
        self.seconds.clear()
        self.count = 0

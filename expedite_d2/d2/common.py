"""What serves both providers alike: launching, set-up and safe checkpoints."""

from __future__ import annotations

import argparse
import glob
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from urllib.parse import urlparse

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from expedite_d2.d2 import provider
from expedite_d2.d2.logger import setup_logger
from expedite_d2.d2.provider import CfgNode, comm
from expedite_d2.errors import KINDS, sentence_of
from expedite_d2.files import remove_leftovers, replacing

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT = timedelta(minutes=30)
# How fvcore's registries, Detectron2's among them, tell of a name; a table of all names follows.
_UNKNOWN_NAME = re.compile(r"No object named '(.*)' found in '(\w+)' registry")
_REGISTRIES = {"META_ARCH": provider.META_ARCH_REGISTRY, "BACKBONE": provider.BACKBONE_REGISTRY}


def launch(
    main_func: Callable[..., Any],
    num_gpus_per_machine: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str | None = None,
    args: tuple[Any, ...] = (),
    timeout: timedelta = DEFAULT_TIMEOUT,
) -> None:
    """Run a function in as many processes as there are GPUs, or on CPUs, as many as are asked for.

    Detectron2's own differs in three points: released versions refuse to start without a GPU, an
    error of a worker comes back as the text of a traceback, and torchrun is not known. Here the
    workers talk through gloo where there is no GPU and share the cores; an error that was raised on
    purpose is raised again in the launching process; and under torchrun, which has started the
    processes, the function runs in this one as a member of torchrun's group.

    Args:
        main_func: called as ``main_func(*args)`` in every process; importable by name.
        num_gpus_per_machine: processes on this machine.
        num_machines: number of machines; each calls ``launch``.
        machine_rank: number of this machine.
        dist_url: where the processes meet, e.g. ``tcp://127.0.0.1:50000``; ``auto`` takes a free
            port (one machine only), which this process keeps from the others.
        args: arguments of ``main_func``; must be picklable for more than one process.
        timeout: how long a process waits for the others.

    Raises:
        ValueError: numbers that do not fit one another or this machine.
        ChildProcessError: a process was killed; the others have been stopped.
    """
    if dist.is_torchelastic_launched():
        if (num_gpus_per_machine, num_machines) != (1, 1):
            raise ValueError(
                "torchrun starts the processes: give it --nproc-per-node and --nnodes, and leave "
                "--num-gpus and --num-machines out"
            )
        workers = int(os.environ["LOCAL_WORLD_SIZE"])
        _check_number("--nproc-per-node", workers)
        _run(main_func, args, int(os.environ["LOCAL_RANK"]), workers, "env://", timeout)
        return
    _check_number("--num-gpus", num_gpus_per_machine)
    if num_machines < 1:
        raise ValueError(f"--num-machines must be at least 1, got {num_machines}")
    if not 0 <= machine_rank < num_machines:
        raise ValueError(
            f"--machine-rank must be less than --num-machines {num_machines} and not negative, "
            f"got {machine_rank}"
        )
    world_size = num_machines * num_gpus_per_machine
    if world_size == 1:
        main_func(*args)
        return
    if num_machines > 1 and dist_url in (None, "auto"):
        raise ValueError(
            "--dist-url must be tcp://HOST:PORT of the first machine for more than one machine, "
            f"got {dist_url}"
        )
    store = None
    if dist_url == "auto":
        # Opened here: a port that is only looked up may be taken before the workers listen to it.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        dist_url = f"tcp://127.0.0.1:{store.port}"
    errors = mp.get_context("spawn").SimpleQueue()
    context = mp.start_processes(
        _worker,
        nprocs=num_gpus_per_machine,
        args=(
            main_func,
            world_size,
            num_gpus_per_machine,
            machine_rank,
            dist_url,
            store.port if store else None,
            args,
            timeout,
            errors,
        ),
        join=False,
    )
    try:
        while not context.join():
            pass
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        if not errors.empty():
            raise errors.get() from None
        if isinstance(error, mp.ProcessExitedException):
            raise ChildProcessError(f"{error}; the others have been stopped") from None
        raise
    finally:
        # An interrupt that does not come from a terminal reaches this process alone.
        for process in context.processes:
            process.terminate()


def _check_number(option: str, processes: int) -> None:
    gpus = torch.cuda.device_count()
    if processes < 1 or (gpus and processes > gpus):
        limit = f"1 to {gpus}" if gpus else "at least 1"
        raise ValueError(f"{option} must be {limit} on this machine, got {processes}")


def _worker(
    local_rank: int,
    main_func: Callable[..., Any],
    world_size: int,
    workers: int,
    machine_rank: int,
    dist_url: str | None,
    store_port: int | None,
    args: tuple[Any, ...],
    timeout: timedelta,
    errors: Any,
) -> None:
    if not torch.cuda.is_available():
        # Each worker would take all cores otherwise, and they would wait for one another.
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    rank = machine_rank * workers + local_rank
    try:
        store = None
        if store_port is not None:
            store = dist.TCPStore("127.0.0.1", store_port, timeout=timeout)
        _run(main_func, args, local_rank, workers, dist_url, timeout, world_size, rank, store)
    except KINDS as error:
        sentence = sentence_of(error)
        if sentence is not None:
            # Without what may not pickle: subclasses with arguments of their own.
            errors.put(next(kind for kind in KINDS if isinstance(error, kind))(sentence))
        raise


def _run(
    main_func: Callable[..., Any],
    args: tuple[Any, ...],
    local_rank: int,
    workers: int,
    dist_url: str | None,
    timeout: timedelta,
    world_size: int = -1,
    rank: int = -1,
    store: dist.Store | None = None,
) -> None:
    """Join the process group, run the function and leave; -1 as torchrun's environment says.

    The processes meet at ``store``, or else the first of them opens one at ``dist_url``.
    """
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(local_rank)
    try:
        dist.init_process_group(
            backend="nccl" if gpu else "gloo",
            init_method=None if store else dist_url,
            store=store,
            world_size=world_size,
            rank=rank,
            timeout=timeout,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise OSError(f"the processes cannot meet at --dist-url {dist_url}: {reason}") from error
    comm.create_local_process_group(workers)
    # A rank that is late with loading must not count against the timeout of the first exchange.
    comm.synchronize()
    main_func(*args)
    dist.destroy_process_group()


def default_setup(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Start the log (stdout and ``OUTPUT_DIR/log.txt``), record environment and config, seed.

    Args:
        cfg: the full config.
        args: the command line.

    Raises:
        OSError: ``OUTPUT_DIR`` cannot be created or written to.
    """
    if not cfg.OUTPUT_DIR:
        raise ValueError("OUTPUT_DIR must name a directory, got an empty string")
    try:
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    except OSError as error:
        raise OSError(f"OUTPUT_DIR {cfg.OUTPUT_DIR} cannot be created: {error.strerror}") from error
    if not os.access(cfg.OUTPUT_DIR, os.W_OK | os.X_OK):
        raise OSError(f"OUTPUT_DIR {cfg.OUTPUT_DIR} cannot be written to")
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank())
    provider.default_setup(cfg, args)


def build_model(cfg: CfgNode) -> nn.Module:
    """The model that a config describes, on ``MODEL.DEVICE``; loads nothing.

    Args:
        cfg: the full config.

    Raises:
        ValueError: settings that no model can have, or names that no registry knows.
    """
    try:
        return provider.build_model(cfg)
    except KeyError as error:
        unknown = _UNKNOWN_NAME.match(str(error.args[0]) if error.args else "")
        if unknown is None:
            raise
        name, registry = unknown.groups()
        known = ", ".join(sorted(key for key, _ in _REGISTRIES.get(registry, ())))
        raise ValueError(
            f"{name!r} is not in the registry {registry}: it is misspelt, or the module that "
            "registers it is not imported"
            + ", or it is Detectron2's own, which is not in use" * (provider.PROVIDER == "builtin")
            + (f"; known are {known}" if known else "")
        ) from error


class CorruptCheckpointError(ValueError):
    """A checkpoint file that cannot be read: truncated, or no checkpoint at all."""


def why_unreadable(path: str | os.PathLike, error: Exception) -> str:
    """Why a file is no checkpoint; its reader's own error may be about something else altogether.

    Args:
        path: the file.
        error: what its reader raised.
    """
    with open(path, "rb") as file:
        start = file.read(20)
    if not start:
        return "it is empty"
    # The directory of a zip archive, which torch.save writes, stands at its end.
    if isinstance(error, EOFError) or (start[:2] == b"PK" and not _ends_as_zip(path)):
        return "it is truncated"
    if isinstance(error, pickle.UnpicklingError) and start[:1] != b"\x80" and start[:2] != b"PK":
        return f"neither torch.save nor pickle wrote it, it begins with {start!r}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _ends_as_zip(path: str | os.PathLike) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # bytes behind the end may look like that of a larger kind
        return False


class DetectionCheckpointer(provider.DetectionCheckpointer):
    """The provider's checkpointer, which never leaves a half-written file and survives one.

    A checkpoint is written under a temporary name and renamed once it is complete. On resume, one
    that cannot be read or is not there is passed over, with a warning, for the one before.
    """

    def save(self, name: str, **kwargs: Any) -> None:
        """Write the model, the checkpointables and ``kwargs`` to ``save_dir/name.pth``."""
        if not self.save_dir or not self.save_to_disk:
            return
        states = {key: value.state_dict() for key, value in self.checkpointables.items()}
        path = os.path.join(self.save_dir, f"{name}.pth")
        logger.info("saving checkpoint %s", path)
        os.makedirs(self.save_dir, exist_ok=True)
        # A run that is killed while it writes a checkpoint leaves the part behind.
        remove_leftovers(self.save_dir, f"{glob.escape(name.rpartition('_')[0])}_*.pth")
        with replacing(path) as partial:
            torch.save({"model": self.model.state_dict(), **states, **kwargs}, partial)
        self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Note which checkpoint is the newest."""
        with replacing(os.path.join(self.save_dir, "last_checkpoint")) as partial:
            partial.write_text(last_filename_basename)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint; what was saved beside model and checkpointables is returned.

        Raises:
            FileNotFoundError: there is no such file.
            CorruptCheckpointError: the file cannot be read.
        """
        if path and not urlparse(path).scheme and not os.path.isfile(path.partition("?")[0]):
            raise FileNotFoundError(f"checkpoint {path} does not exist")
        try:
            return super().load(path, *args, **kwargs)
        finally:
            # Detectron2's keeps the address of a failed load and refuses the next one.
            self._parsed_url_during_load = None

    def _load_file(self, filename: str) -> dict[str, Any]:
        try:
            return super()._load_file(filename)
        except PermissionError:
            raise
        except Exception as error:  # unpickling arbitrary bytes can fail in every way
            reason = why_unreadable(filename, error)
            raise CorruptCheckpointError(
                f"checkpoint {filename} cannot be read: {reason}"
            ) from error

    def has_checkpoint(self) -> bool:
        """Whether there is anything to resume from, be it readable or not."""
        return bool(self._checkpoints())

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Go on from the newest readable checkpoint of ``save_dir``, else load ``path``.

        Args:
            path: weights to begin with, where there is nothing to resume.
            resume: whether to look for a checkpoint; without, only the model is loaded.

        Raises:
            CorruptCheckpointError: there are checkpoints to resume from, and none can be read.
        """
        if not (resume and self.has_checkpoint()):
            return self.load(path, checkpointables=[])
        failures = []
        for candidate in self._checkpoints():
            try:
                extra = self.load(candidate)
            except (CorruptCheckpointError, FileNotFoundError) as error:
                failures.append(str(error))
                logger.warning("%s; trying the one before", error)
                continue
            if failures:
                logger.warning("resuming from %s instead", candidate)
            return extra
        raise CorruptCheckpointError(
            f"no checkpoint in {self.save_dir} can be read to resume from: {'; '.join(failures)}"
        )

    def _checkpoints(self) -> list[str]:
        """The tagged checkpoint, then the periodic ones of this run from the newest to the oldest.

        A run that was killed between its first checkpoint and the tag left no tag.
        """
        tagged = self.get_checkpoint_file()
        prefix = os.path.basename(tagged).rpartition("_")[0] or "model"
        numbered = re.compile(rf"{re.escape(prefix)}_\d{{7,}}\.pth")
        found = self.get_all_checkpoint_files() if os.path.isdir(self.save_dir) else []
        others = [
            file for file in found if file != tagged and numbered.fullmatch(os.path.basename(file))
        ]
        return [tagged] * bool(tagged) + sorted(others, key=os.path.getmtime, reverse=True)

"""One process or several: launching on GPUs, on CPUs, and under torchrun."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from expedite_d2.d2.provider import PROVIDER, comm
from expedite_d2.errors import KINDS, sentence_of

DEFAULT_TIMEOUT = timedelta(minutes=30)


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
    if PROVIDER == "builtin":
        comm.leave()
    else:
        dist.destroy_process_group()

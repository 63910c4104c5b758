"""Communication between the processes of one run; without a process group, a world of one."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

# torch gives a process that is in no group a number in its place, hence Any.
_local_group: Any = None


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    """Number of processes on all machines."""
    return dist.get_world_size() if _initialized() else 1


def get_rank() -> int:
    """Number of this process among all."""
    return dist.get_rank() if _initialized() else 0


@functools.lru_cache
def create_local_process_group(num_workers_per_machine: int) -> None:
    """Group the processes of each machine; ``launch`` calls it, every rank together."""
    global _local_group
    world_size = get_world_size()
    if world_size % num_workers_per_machine:
        raise ValueError(
            f"{world_size} processes cannot be {num_workers_per_machine} on every machine"
        )
    for first in range(0, world_size, num_workers_per_machine):
        ranks = list(range(first, first + num_workers_per_machine))
        group = dist.new_group(ranks)
        if get_rank() in ranks:
            _local_group = group


def leave() -> None:
    """Leave the process group; ``launch`` calls it in every process at its end.

    A group that is still held here would keep its threads, which must not run on while the
    interpreter exits.
    """
    global _local_group
    _local_group = None
    create_local_process_group.cache_clear()
    _cpu_group.cache_clear()
    dist.destroy_process_group()


def get_local_process_group() -> dist.ProcessGroup:
    """The group of this machine's processes."""
    assert _local_group is not None, "no local process group: call create_local_process_group first"
    return _local_group


def get_local_rank() -> int:
    """Number of this process on its machine."""
    return dist.get_rank(group=get_local_process_group()) if _initialized() else 0


def get_local_size() -> int:
    """Number of processes on this machine."""
    return dist.get_world_size(group=get_local_process_group()) if _initialized() else 1


def is_main_process() -> bool:
    """Whether this is rank 0."""
    return get_rank() == 0


def synchronize() -> None:
    """Wait until every process has come here."""
    if get_world_size() == 1:
        return
    if dist.get_backend() == dist.Backend.NCCL:
        # NCCL guesses the device from the rank otherwise, and warns.
        dist.barrier(device_ids=[torch.cuda.current_device()])
    else:
        dist.barrier()


@functools.lru_cache
def _cpu_group() -> Any:
    """All ranks on gloo, so that gathering objects takes no GPU memory."""
    if dist.get_backend() == dist.Backend.NCCL:
        return dist.new_group(backend="gloo")
    return dist.group.WORLD


def all_gather(data: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's object, any that can be pickled, in order of rank, on every rank."""
    if get_world_size() == 1:
        return [data]
    group = _cpu_group() if group is None else group
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, data, group=group)
    return gathered


def gather(data: Any, dst: int = 0, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's object in order of rank on rank ``dst``, an empty list elsewhere."""
    if get_world_size() == 1:
        return [data]
    group = _cpu_group() if group is None else group
    if dist.get_rank(group) != dst:
        dist.gather_object(data, None, dst=dst, group=group)
        return []
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.gather_object(data, gathered, dst=dst, group=group)
    return gathered


def shared_random_seed() -> int:
    """A random number that all ranks share; every rank must call it."""
    return all_gather(int(np.random.randint(2**31)))[0]


def reduce_dict(input_dict: dict[str, torch.Tensor], average: bool = True) -> dict[str, Any]:
    """Add up (or average) scalar tensors over the ranks; the result is right on rank 0 alone."""
    if get_world_size() == 1:
        return input_dict
    with torch.no_grad():
        # Sorted, for every rank must stack them in the same order.
        names = sorted(input_dict)
        values = torch.stack([input_dict[name] for name in names])
        dist.reduce(values, dst=0)
        if average and is_main_process():
            values /= get_world_size()
        return dict(zip(names, values, strict=True))

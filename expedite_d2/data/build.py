"""Loaders for training and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from expedite_d2.d2 import CfgNode, DatasetCatalog, InferenceSampler, TrainingSampler, comm
from expedite_d2.data.mappers import TestMapper, TrainMapper

Entry = dict[str, Any]


def get_dataset(name: str) -> list[Entry]:
    """Entries of a registered data set.

    Raises:
        ValueError: a name that is not registered, or a data set without images.
        FileNotFoundError: its files are not where they are looked for.
    """
    if name not in DatasetCatalog:
        known = ", ".join(sorted(n for n in DatasetCatalog if not n.startswith("__")))
        raise ValueError(f"data set {name!r} is not registered; registered are {known}")
    entries = DatasetCatalog.get(name)
    if not entries:
        raise ValueError(f"data set {name!r} is empty: expected at least one image, got none")
    return entries


def build_test_loader(
    cfg: CfgNode, name: str, mapper: Callable[[Entry], Entry] | None = None
) -> DataLoader:
    """Every image of a data set once, one a batch, dealt out over the ranks."""
    entries = get_dataset(name)
    return DataLoader(
        _Mapped(entries, mapper or TestMapper(cfg)),
        batch_size=1,
        sampler=InferenceSampler(len(entries)),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=_as_list,
    )


def build_train_loader(cfg: CfgNode, start_iteration: int = 0) -> DataLoader:
    """Endless batches of ``SOLVER.IMS_PER_BATCH`` images over all ranks.

    The order and every random choice depend on ``SEED`` and the position in the stream alone, so
    that a run resumed at ``start_iteration`` sees what it would have seen.

    Raises:
        ValueError: a batch that the number of ranks does not divide.
    """
    entries = [entry for name in cfg.DATASETS.TRAIN for entry in get_dataset(name)]
    if not entries:
        raise ValueError("DATASETS.TRAIN must name at least one data set, got none")
    world = comm.get_world_size()
    batch, rest = divmod(cfg.SOLVER.IMS_PER_BATCH, world)
    if rest or not batch:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH must be a positive multiple of the {world} processes, "
            f"got {cfg.SOLVER.IMS_PER_BATCH}"
        )
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    return DataLoader(
        _Augmented(entries, TrainMapper(cfg), seed),
        batch_size=batch,
        sampler=_Stream(TrainingSampler(len(entries), seed=seed), start_iteration * batch),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=_as_list,
        persistent_workers=cfg.DATALOADER.NUM_WORKERS > 0,
    )


class _Mapped(Dataset):
    def __init__(self, entries: list[Entry], mapper: Callable[[Entry], Entry]) -> None:
        self.entries = entries
        self.mapper = mapper

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Entry:
        return self.mapper(self.entries[index])


class _Augmented(Dataset):
    """Samples by (position in the stream, index), each with randomness of its own."""

    def __init__(self, entries: list[Entry], mapper: TrainMapper, seed: int) -> None:
        self.entries = entries
        self.mapper = mapper
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Entry:
        position, index = key
        return self.mapper(self.entries[index], np.random.default_rng([self.seed, position]))


class _Stream(Sampler[tuple[int, int]]):
    """A training sampler's indices with their positions over all ranks, from ``skip`` on."""

    def __init__(self, sampler: TrainingSampler, skip: int) -> None:
        self.sampler = sampler
        self.skip = skip

    def __iter__(self) -> Iterator[tuple[int, int]]:
        world, rank = comm.get_world_size(), comm.get_rank()
        for count, index in enumerate(self.sampler):
            if count >= self.skip:
                yield count * world + rank, index


def _as_list(batch: list[Entry]) -> list[Entry]:
    return batch

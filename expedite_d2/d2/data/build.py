"""Loaders for training and evaluation."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from expedite_d2.d2.data.depth import DEPTH_MAPPER_NAME, DepthTestMapper, DepthTrainMapper
from expedite_d2.d2.data.mappers import TestMapper, TrainMapper
from expedite_d2.d2.provider import CfgNode, DatasetCatalog, InferenceSampler, TrainingSampler, comm
from expedite_d2.errors import sentence_of

Entry = dict[str, Any]


def get_dataset(name: str) -> list[Entry]:
    """Entries of a registered data set.

    Raises:
        ValueError: a name that is not registered, or a data set without images.
        FileNotFoundError: its files are not where they are looked for.
    """
    names = DatasetCatalog.list()
    if name not in names:
        raise ValueError(
            f"data set {name!r} is not registered; registered are {', '.join(sorted(names))}"
        )
    entries = DatasetCatalog.get(name)
    if not entries:
        raise ValueError(f"data set {name!r} is empty: expected at least one image, got none")
    return entries


def build_test_mapper(cfg: CfgNode) -> Callable[[Entry], Entry]:
    """The mapper of evaluation: that of depth where ``INPUT.DATASET_MAPPER_NAME`` is "depth"."""
    depth = cfg.INPUT.DATASET_MAPPER_NAME == DEPTH_MAPPER_NAME
    return DepthTestMapper(cfg) if depth else TestMapper(cfg)


def build_train_mapper(cfg: CfgNode) -> TrainMapper | DepthTrainMapper:
    """The mapper of training that ``INPUT.DATASET_MAPPER_NAME`` asks for."""
    depth = cfg.INPUT.DATASET_MAPPER_NAME == DEPTH_MAPPER_NAME
    return DepthTrainMapper(cfg) if depth else TrainMapper(cfg)


def build_test_loader(
    cfg: CfgNode, name: str, mapper: Callable[[Entry], Entry] | None = None
) -> DataLoader:
    """Every image of a data set once, one a batch, dealt out over the ranks.

    Args:
        cfg: The config.
        name: Name of a registered data set.
        mapper: Turns a dataset dict into the model's input; default: ``build_test_mapper(cfg)``.
    """
    entries = _PackedList(get_dataset(name))
    return _Loader(
        _TestSet(entries, mapper or build_test_mapper(cfg)),
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
        ValueError: no data set or an empty one, one that the task has no annotations in, or a
            batch that the number of ranks does not divide.
    """
    if not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN must name at least one data set, got none")
    mapper = build_train_mapper(cfg)
    entries: list[Entry] = []
    for name in cfg.DATASETS.TRAIN:
        usable = mapper.usable(name, get_dataset(name))
        if not usable:
            raise ValueError(
                f"data set {name!r} has no annotated objects to train on, only images that "
                "DATALOADER.FILTER_EMPTY_ANNOTATIONS leaves out"
            )
        entries += usable
    world = comm.get_world_size()
    batch, rest = divmod(cfg.SOLVER.IMS_PER_BATCH, world)
    if rest or batch < 1:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH must be a positive multiple of the number of processes "
            f"({world}), got {cfg.SOLVER.IMS_PER_BATCH}"
        )
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    return _Loader(
        _TrainSet(_PackedList(entries), mapper, seed),
        batch_size=batch,
        sampler=_Stream(TrainingSampler(len(entries), seed=seed), start_iteration * batch),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=_as_list,
    )


class _PackedList:
    """A read-only list of dicts in one buffer.

    Worker processes share the buffer with their parent. Of a list of Python objects each of them
    would end up with its own copy: reading an object changes its reference count, and so its page.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        pickled = [pickle.dumps(entry, protocol=-1) for entry in entries]
        self._ends = np.cumsum([len(one) for one in pickled])
        self._buffer = np.frombuffer(b"".join(pickled), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Entry:
        start = 0 if index == 0 else self._ends[index - 1]
        return pickle.loads(self._buffer[start : self._ends[index]].tobytes())


class _MappedSet(Dataset):
    """A data set whose errors reach the caller as they are, also from a worker process.

    A worker's exception would arrive with a traceback as its message; one that is returned in the
    sample's place is raised by the loader.
    """

    def __getitems__(self, keys: list[Any]) -> list[Entry | Exception]:
        samples: list[Entry | Exception] = []
        for key in keys:
            try:
                samples.append(self[key])
            except Exception as error:
                if sentence_of(error) is None:  # whose traceback tells more than it does
                    raise
                samples.append(error)
        return samples


class _TestSet(_MappedSet):
    def __init__(self, entries: _PackedList, mapper: Callable[[Entry], Entry]) -> None:
        self._entries = entries
        self._mapper = mapper

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Entry:
        return self._mapper(self._entries[index])


class _TrainSet(_MappedSet):
    """Samples by (position in the stream, index), each with randomness of its own."""

    def __init__(
        self, entries: _PackedList, mapper: TrainMapper | DepthTrainMapper, seed: int
    ) -> None:
        self._entries = entries
        self._mapper = mapper
        self._seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Entry:
        position, index = key
        return self._mapper(self._entries[index], np.random.default_rng([self._seed, position]))


class _Stream(Sampler[tuple[int, int]]):
    """A training sampler's indices with their positions over all ranks, from ``skip`` on."""

    def __init__(self, sampler: TrainingSampler, skip: int) -> None:
        self._sampler = sampler
        self._skip = skip

    def __iter__(self) -> Iterator[tuple[int, int]]:
        world, rank = comm.get_world_size(), comm.get_rank()
        numbered = ((n * world + rank, index) for n, index in enumerate(self._sampler))
        return itertools.islice(numbered, self._skip, None)


class _Loader(DataLoader):
    """A loader that raises what a ``_MappedSet`` could not map."""

    def __iter__(self) -> Iterator[list[Entry]]:  # type: ignore[override]
        for batch in super().__iter__():
            for sample in batch:
                if isinstance(sample, Exception):
                    raise sample
            yield batch


def _as_list(batch: list[Any]) -> list[Any]:
    return batch

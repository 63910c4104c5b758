"""Which images each process reads."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from expedite_d2.d2.builtin import comm


class TrainingSampler(Sampler[int]):
    """An endless stream of indices, shuffled anew at every pass and dealt out over the ranks.

    Args:
        size: number of samples in the data set.
        shuffle: whether every pass has an order of its own.
        seed: seed of the shuffling, the same on every rank; None draws one that all share.
    """

    def __init__(self, size: int, shuffle: bool = True, seed: int | None = None) -> None:
        if not isinstance(size, int):
            raise TypeError(f"TrainingSampler: size must be an int, got {type(size).__name__}")
        if size <= 0:
            raise ValueError(f"TrainingSampler: size must be positive, got {size}")
        self._size = size
        self._shuffle = shuffle
        self._seed = comm.shared_random_seed() if seed is None else int(seed)
        self._rank = comm.get_rank()
        self._world_size = comm.get_world_size()

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(self._stream(), self._rank, None, self._world_size)

    def _stream(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed)
        while True:
            if self._shuffle:
                yield from torch.randperm(self._size, generator=generator).tolist()
            else:
                yield from range(self._size)


class InferenceSampler(Sampler[int]):
    """Every index exactly once: each rank a contiguous share, the first ranks one more.

    Args:
        size: number of samples in the data set.
    """

    def __init__(self, size: int) -> None:
        if size <= 0:
            raise ValueError(f"InferenceSampler: size must be positive, got {size}")
        share, rest = divmod(size, comm.get_world_size())
        rank = comm.get_rank()
        begin = rank * share + min(rank, rest)
        self._indices = range(begin, begin + share + (rank < rest))

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)

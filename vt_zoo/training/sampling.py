"""Sampling that depends only on the seed and the iteration: which samples are used, and how they are augmented.

The order therefore does not depend on how many processes load or train, and a resumed run sees the same samples as an
uninterrupted one.
"""
import traceback
from functools import lru_cache
from typing import Any, Iterator, List, Tuple

import torch
from torch.utils.data import DataLoader, Dataset

from ..data.seeding import seed_of, seeded
from ..errors import InputError


class IterationBatches:
    """Batch sampler for a DataLoader of a `SeededDataset`, with one batch of (index, seed) per iteration.

    Samples are drawn without replacement until each has been seen once, then in a new order.
    """

    def __init__(
            self,
            num_samples: int,
            batch_size: int,
            start: int,
            stop: int,
            seed: int,
            rank: int = 0,
            world_size: int = 1,
    ) -> None:
        """
        Args:
            num_samples: Number of samples in the data set.
            batch_size: Samples per iteration, over all processes.
            start: First iteration.
            stop: Iteration to stop before.
            seed: Random seed of order and augmentation.
            rank: Rank of this process, which gets every `world_size`-th sample of a batch.
            world_size: Number of training processes.
        """
        self.num_samples, self.batch_size = num_samples, batch_size
        self.start, self.stop = start, stop
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self._order = lru_cache(maxsize=2)(self._new_order)

    def _new_order(self, epoch: int) -> List[int]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
        return torch.randperm(self.num_samples, generator=generator).tolist()

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[List[Tuple[int, int]]]:
        for iteration in range(self.start, self.stop):
            positions = range(iteration * self.batch_size + self.rank, (iteration + 1) * self.batch_size)
            yield [
                (self._order(p // self.num_samples)[p % self.num_samples], seed_of(self.seed, p))
                for p in positions[::self.world_size]]


class SeededDataset(Dataset):
    """Dataset wrapper whose items are loaded with a seed, `self[index, seed]`, leaving the generators' states alone."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: Tuple[int, int]) -> Any:
        index, seed = key
        with seeded(seed):
            return self.dataset[index]


def read_batches(loader: DataLoader) -> Iterator[Any]:
    """Yield the loader's batches; an error in a worker process is raised with its message, but not its traceback."""
    try:
        yield from loader
    except InputError as e:
        traceback.clear_frames(e.__traceback__)  # its frames would keep the loader's processes alive
        raise InputError(str(e).rstrip().rsplit('InputError: ', 1)[-1]) from None

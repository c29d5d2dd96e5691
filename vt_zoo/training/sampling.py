"""Which samples an iteration sees, and with which augmentation: a function of seed and iteration alone.

So the order does not depend on how many processes load or train, and a run that goes on sees what it would have seen.
"""
from functools import lru_cache
from typing import Any, Iterator, List, Tuple

import torch
from torch.utils.data import Dataset

from ..data.seeding import seed_of, seeded


class IterationBatches:
    """Batches of (index, seed) for `SeededDataset`, one an iteration, to be a DataLoader's `batch_sampler`.

    Samples are drawn without replacement until each was seen once, then anew.
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
            num_samples: Samples in the data set.
            batch_size: Samples of an iteration, of all processes together.
            start: First iteration.
            stop: Iteration to stop before.
            seed: Of order and augmentation.
            rank: Of this process, which gets every `world_size`-th sample of a batch.
            world_size: Processes that train.
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
    """A data set whose items are drawn with a seed: `self[index, seed]`. The generators are as before afterwards."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: Tuple[int, int]) -> Any:
        index, seed = key
        with seeded(seed):
            return self.dataset[index]

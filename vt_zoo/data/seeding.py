"""Seeding of samples: a sample's random numbers depend only on the run's seed and the sample's number."""
import random
from contextlib import contextmanager
from typing import Iterator

import numpy as np
import torch


def seed_of(seed: int, count: int) -> int:
    """Seed of sample number `count` of a run."""
    return (seed * 10 ** 12 + count) % 2 ** 63


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's CPU generators for the duration of a block, then restore their states."""
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        random.seed(seed)
        np.random.seed(seed % 2 ** 32)
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])

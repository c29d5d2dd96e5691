"""Random numbers of a sample: a function of the run's seed and the sample's number, whichever process draws them."""
import random
from contextlib import contextmanager
from typing import Iterator

import numpy as np
import torch


def seed_of(seed: int, count: int) -> int:
    """The seed of a run's sample number `count`."""
    return (seed * 10 ** 12 + count) % 2 ** 63


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, numpy's and torch's CPU generator begin at `seed` within the block and are as before it afterwards."""
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

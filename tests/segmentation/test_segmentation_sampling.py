"""Order and augmentation of training samples: a function of seed and iteration, whoever loads them."""
from contextlib import nullcontext

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from vt_zoo.training.sampling import IterationBatches, SeededDataset


def batches(num_samples, batch_size, stop, start=0, seed=0, **kwargs):
    return list(IterationBatches(num_samples, batch_size, start, stop, seed, **kwargs))


def flat(many):
    return [pair for batch in many for pair in batch]


@pytest.mark.parametrize('num_samples, batch_size', [(12, 4), (10, 3), (7, 7), (5, 8), (3, 10), (1, 2), (6, 1)])
def test_each_pass_sees_each_sample_once(num_samples, batch_size):
    many = batches(num_samples, batch_size, 30)
    assert [len(batch) for batch in many] == [batch_size] * 30
    indices = [index for index, _ in flat(many)]
    passes = [indices[i:i + num_samples] for i in range(0, len(indices) - num_samples + 1, num_samples)]
    assert all(sorted(indices) == list(range(num_samples)) for indices in passes)
    if num_samples > 6:
        assert len({tuple(indices) for indices in passes}) > 0.8 * len(passes)


@pytest.mark.parametrize('num_samples, batch_size', [(12, 4), (10, 3), (3, 10)])
def test_a_run_that_goes_on_sees_the_rest(num_samples, batch_size):
    complete = batches(num_samples, batch_size, 20)
    for start in range(21):
        sampler = IterationBatches(num_samples, batch_size, start, 20, 0)
        assert list(sampler) == complete[start:]
        assert len(sampler) == 20 - start


@pytest.mark.parametrize('batch_size', [2, 3, 8, 11])
@pytest.mark.parametrize('world_size', [1, 2])
def test_processes_together_see_the_batch_of_one(batch_size, world_size):
    parts = [batches(10, batch_size, 9, rank=rank, world_size=world_size) for rank in range(world_size)]
    for batch, *shares in zip(batches(10, batch_size, 9), *parts):
        assert sorted(flat(shares)) == sorted(batch)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_no_two_samples_of_a_run_have_the_same_seed():
    seeds = [seed for run in range(3) for _, seed in flat(batches(10, 4, 500, seed=run))]
    assert len(set(seeds)) == len(seeds) == 6000
    assert all(0 <= seed < 2 ** 63 for _, seed in flat(batches(10, 4, 5, seed=2 ** 63 - 1)))


def test_other_seed_other_order():
    orders = {tuple(index for index, _ in flat(batches(50, 50, 1, seed=seed))) for seed in range(5)}
    assert len(orders) == 5


def test_order_does_not_depend_on_torchs_generator():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = batches(10, 4, 9)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert batches(10, 4, 9) == first


class Draws(Dataset):
    """Items that are an index and a random number."""

    def __getitem__(self, index):
        return index, torch.rand(())


class Broken(Dataset):
    def __getitem__(self, index):
        raise ValueError


def test_item_is_a_function_of_index_and_seed():
    dataset = SeededDataset(Draws())
    keys = [(3, 5), (4, 5), (3, 6), (3, 5)]
    first, other_index, other_seed, again = (dataset[key] for key in keys)
    assert first == again
    assert other_index == (4, first[1])
    assert other_seed[1] != first[1]
    assert [dataset[key] for key in reversed(keys)] == [again, other_seed, other_index, first]


@pytest.mark.parametrize('dataset', [Draws(), Broken()])
def test_torchs_generator_is_as_before(dataset):
    state = torch.get_rng_state()
    with pytest.raises(ValueError) if isinstance(dataset, Broken) else nullcontext():
        SeededDataset(dataset)[3, 5]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize('workers', [1, 2])
def test_items_do_not_depend_on_who_loads_them(workers):
    def load(num_workers):
        loader = DataLoader(
            SeededDataset(Draws()), batch_sampler=IterationBatches(5, 3, 2, 6, 0), num_workers=num_workers)
        return [(index.tolist(), draw.tolist()) for index, draw in loader]

    assert load(workers) == load(0)

"""Two processes (gloo, CPU) with timm.task's DistributedDataParallel against one with the joined batch.

Batch norms see each process's own half, and CPU has no synchronised ones. So the comparison is made twice: with the
norms' running statistics (eval mode) on two different halves, and with batch statistics on two equal halves, whose
statistics are those of the joined batch.
"""
import socket
from datetime import timedelta
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist

import vt_zoo  # noqa: F401

ClassificationTask = pytest.importorskip('timm.task', reason='timm has no timm.task before 1.0.23').ClassificationTask

VARIANTS = [
    {}, {'tokenizer': 'pooling'}, {'tokenizer': 'clustering'}, {'recurrent': False}, {'token_mixer': 'graph'},
    {'token_mixer': 'none'}, {'projector': False}, {'dynamic_tokens': True}, {'position_code': True},
    {'num_heads': 4, 'attention_values': True}, {'drop_rate': 0.2, 'drop_path_rate': 0.1}]
STEPS, LR = 3, 0.05

pytestmark = pytest.mark.skipif(not dist.is_available(), reason='this torch has no torch.distributed')


def create(kwargs):
    torch.manual_seed(0)
    return timm.create_model('test_vt_resnet', num_classes=10, **kwargs).double()


def images(equal_halves):
    torch.manual_seed(1)
    x, y = torch.randn(8, 3, 48, 48, dtype=torch.float64), torch.randint(10, (8,))
    return (x[:4].repeat(2, 1, 1, 1), y[:4].repeat(2)) if equal_halves else (x, y)


def steps(task, x, y, train):
    """Gradients of each step and the weights after the last, by name."""
    module = task.get_trainable_module()
    module.train(train)
    optimizer = torch.optim.SGD(module.parameters(), lr=LR, momentum=0.9)
    gradients = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        task(x, y)['loss'].backward()
        gradients.append({name: p.grad.clone() for name, p in module.named_parameters()})
        optimizer.step()
    return gradients, {name: p.detach().clone() for name, p in module.named_parameters()}


def without_prefix(tensors):
    return {name.removeprefix('module.').removeprefix('trainable_module.'): t for name, t in tensors.items()}


def work(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=2, timeout=timedelta(seconds=300))
    results = []
    for kwargs, equal_halves, train in JOBS:
        task = ClassificationTask(create(kwargs), verbose=False)
        task.prepare_distributed(device_ids=None)
        assert not task.get_trainable_module().find_unused_parameters
        x, y = images(equal_halves)
        half = slice(4 * rank, 4 * rank + 4)
        results.append(steps(task, x[half], y[half], train))
    torch.save(results, f'{folder}/{rank}.pt')
    dist.destroy_process_group()


START = '''
import sys
sys.path.append(sys.argv[1])
import test_distributed
import torch.multiprocessing as mp
mp.start_processes(test_distributed.work, (int(sys.argv[2]), sys.argv[3]), nprocs=2, start_method='fork')
'''
JOBS = [({}, False, False), *((kwargs, True, True) for kwargs in VARIANTS)]


@pytest.fixture(scope='module')
def results(forks, tmp_path_factory):
    """Of both processes, a pair a job. They are forks of one that has imported timm: two new ones take seconds more."""
    folder = tmp_path_factory.mktemp('distributed')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    result = forks.run(START, Path(__file__).parent, port, folder)
    assert result.code == 0, result.stderr
    return list(zip(*(torch.load(folder / f'{rank}.pt') for rank in (0, 1))))


def single_process(kwargs, equal_halves, train):
    return steps(ClassificationTask(create(kwargs), verbose=False), *images(equal_halves), train)


def check_equal(result, expected):
    gradients, weights = result
    for ours, single in zip((*gradients, weights), (*expected[0], expected[1])):
        ours = without_prefix(ours)
        assert ours.keys() == single.keys()
        for name in single:
            torch.testing.assert_close(ours[name], single[name], rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize('job', range(len(JOBS) - 1), ids=lambda i: f'{JOBS[i]}')
def test_equals_one_process_with_the_joined_batch(results, job):
    expected = single_process(*JOBS[job])
    for result in results[job]:
        check_equal(result, expected)


def test_halves_differ():
    """Without the exchange of gradients, the first comparison would fail."""
    x, y = images(False)
    task = ClassificationTask(create({}), verbose=False)
    _, half = steps(task, x[:4], y[:4], False)
    _, joined = single_process({}, False, False)
    assert max((half[name] - joined[name]).abs().max().item() for name in joined) > 1e-4


def test_random_depth_leaves_no_parameter_unused(results):
    """DistributedDataParallel would have refused the second step; and both processes hold the same weights."""
    (_, first), (_, second) = results[-1]
    assert all(torch.equal(first[name], second[name]) for name in first)

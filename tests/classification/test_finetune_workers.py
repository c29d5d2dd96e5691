"""A run of `finetune` is the same to the bit however many processes load its images, and keeps its order of classes."""
import shutil
from dataclasses import replace

import pytest
import torch
from helpers import history, interrupted_after, run_by_two, weights, words_of
from safetensors.torch import load_file

from vt_zoo.classification.train import finetune
from vt_zoo.weights.files import read_tensors, write_tensors
from vt_zoo.weights.loading import load_model

STEPS = 4  # of an epoch


@pytest.fixture(scope='module')
def settings(tiny_settings):
    """With everything that draws random numbers, in Python, numpy and torch."""
    return replace(
        tiny_settings, drop=0.2, drop_path=0.2, color_jitter=0.4, aa='augmix-m3-w2', hflip=0.5, smoothing=0.2)


@pytest.fixture(scope='module')
def whole(few_digits, settings, tmp_path_factory):
    """Weights of the run without workers."""
    return train(few_digits, tmp_path_factory.mktemp('whole') / 'run', settings)


def train(data_dir, out, settings, **kwargs):
    finetune(data_dir, out, settings, device='cpu', progress=False, **kwargs)
    return weights(out)


@pytest.mark.parametrize('workers', [1, 2])
def test_number_of_workers(few_digits, settings, whole, tmp_path, workers):
    assert train(few_digits, tmp_path / 'run', settings, workers=workers) == whole


@pytest.mark.parametrize('before, after', [(0, 2), (2, 0)])
def test_going_on_with_another_number_of_workers(few_digits, settings, whole, tmp_path, before, after):
    with interrupted_after(STEPS + 2):
        train(few_digits, tmp_path / 'run', settings, workers=before)
    assert train(few_digits, tmp_path / 'run', settings, workers=after, resume=True) == whole


def test_run_goes_on_in_its_own_order_of_classes(my_digits, tiny_settings, tmp_path):
    """As one has it that began when names that tie had no order."""
    data, checkpoint = tmp_path / 'data', tmp_path / 'run' / 'checkpoint.safetensors'
    for old, new in (('0', 'a'), ('1', 'A')):
        shutil.copytree(my_digits / 'train' / old, data / new)
    with interrupted_after(STEPS + 2):
        train(data, tmp_path / 'run', replace(tiny_settings, batch_size=4))
    tensors, metadata = read_tensors(checkpoint)
    assert metadata['fingerprint']['classes'] == ['A', 'a']
    metadata['fingerprint']['classes'] = ['a', 'A']
    write_tensors(checkpoint, tensors, metadata)
    train(data, tmp_path / 'run', replace(tiny_settings, batch_size=4), resume=True)
    assert list(load_model(str(tmp_path / 'run' / 'model')).pretrained_cfg['label_names']) == ['a', 'A']


@pytest.mark.parametrize('launcher', ['forks', pytest.param('accelerate', marks=pytest.mark.slow)])
def test_two_processes(two_processes, few_digits, tiny_arguments, tiny_settings, tmp_path, launcher):
    """Batches of 7 are shared as 4 and 3, and loss and weights are those of one process, but for rounding."""
    changes = {'model': 'test_efficientnet_gn', 'batch_size': 7, 'smoothing': 0.1, 'epochs': 3}
    words = ['finetune', few_digits, *tiny_arguments, *words_of(changes), '--out', tmp_path / 'two']
    printed = run_by_two(launcher, two_processes, words)
    finetune(few_digits, tmp_path / 'one', replace(tiny_settings, **changes), device='cpu', progress=False)
    one, two = (load_file(tmp_path / name / 'model' / 'model.safetensors') for name in ('one', 'two'))
    torch.testing.assert_close(two, one, rtol=1e-3, atol=5e-4)
    one, two = (history(tmp_path / name) for name in ('one', 'two'))
    for row, expected in zip(two, one, strict=True):
        assert {k: float(v) for k, v in row.items()} == pytest.approx(
            {k: float(v) for k, v in expected.items()}, rel=1e-3)
    assert printed.count('model      ') == printed.count('epoch   3:') == 1

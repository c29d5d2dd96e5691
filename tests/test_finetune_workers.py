"""A run of `finetune` is the same to the bit however many processes load its images, and keeps its order of classes."""
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from timm.utils import ModelEmaV3

from vt_zoo.classification.train import finetune
from vt_zoo.data.images import ImageFolder, find_split
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
    return (out / 'model' / 'model.safetensors').read_bytes()


def interrupt(data_dir, out, settings, **kwargs):
    """Ctrl-C in the second epoch."""
    update_ema, calls = ModelEmaV3.update, []

    def update(*args, **kwargs):
        calls.append(args)
        if len(calls) > STEPS + 2:
            raise KeyboardInterrupt
        update_ema(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelEmaV3, 'update', update)
        with pytest.raises(KeyboardInterrupt):
            train(data_dir, out, settings, **kwargs)


@pytest.mark.parametrize('workers', [1, 2])
def test_number_of_workers(few_digits, settings, whole, tmp_path, workers):
    assert train(few_digits, tmp_path / 'run', settings, workers=workers) == whole


def test_augmentation_is_of_seed_epoch_and_index(few_digits):
    images = ImageFolder(
        find_split(few_digits).train, lambda image: (random.random(), np.random.rand(), torch.rand(()).item()), seed=3)
    drawn = {}
    for epoch in (0, 1):
        images.epoch = epoch
        drawn.update({(epoch, index): images[index][0] for index in range(len(images))})
    assert len(set(drawn.values())) == len(drawn) == 72
    images.epoch = 0
    torch.manual_seed(5)
    assert images[7][0] == drawn[0, 7]
    after = torch.rand(())
    torch.manual_seed(5)
    assert torch.rand(()) == after


@pytest.mark.parametrize('before, after', [(0, 2), (2, 0)])
def test_going_on_with_another_number_of_workers(few_digits, settings, whole, tmp_path, before, after):
    interrupt(few_digits, tmp_path / 'run', settings, workers=before)
    assert train(few_digits, tmp_path / 'run', settings, workers=after, resume=True) == whole


def test_run_goes_on_in_its_own_order_of_classes(my_digits, tiny_settings, tmp_path):
    """As one has it that began when names that tie had no order."""
    data, checkpoint = tmp_path / 'data', tmp_path / 'run' / 'checkpoint.safetensors'
    for old, new in (('0', 'a'), ('1', 'A')):
        shutil.copytree(my_digits / 'train' / old, data / new)
    interrupt(data, tmp_path / 'run', replace(tiny_settings, batch_size=4))
    tensors, metadata = read_tensors(checkpoint)
    assert metadata['fingerprint']['classes'] == ['A', 'a']
    metadata['fingerprint']['classes'] = ['a', 'A']
    write_tensors(checkpoint, tensors, metadata)
    train(data, tmp_path / 'run', replace(tiny_settings, batch_size=4), resume=True)
    assert list(load_model(str(tmp_path / 'run' / 'model')).pretrained_cfg['label_names']) == ['a', 'A']

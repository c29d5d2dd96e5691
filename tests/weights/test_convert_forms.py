"""Checkpoints as other programs than timm's train.py write them."""
import argparse
import logging
from collections import OrderedDict

import pytest
import timm
import torch
from helpers import as_in_version_0_1

from vt_zoo.weights.conversion import convert
from vt_zoo.weights.loading import load_model

NAME = 'test_vt_resnet'


def create(seed=0):
    torch.manual_seed(seed)
    return timm.create_model(NAME, num_classes=3).eval()


@pytest.fixture(scope='module')
def weights():
    """State dicts of two models, `weights[0]` and `weights[1]`. Not to be changed."""
    return [create(seed).state_dict() for seed in (0, 1)]


@pytest.fixture
def converted(tmp_path):
    """Saves a content, converts it and gives the weights of the folder and what was said of them."""
    def run(content, **kwargs):
        torch.save(content, tmp_path / 'a.pth')
        said = convert(tmp_path / 'a.pth', tmp_path / 'out', name=NAME, **kwargs)
        return load_model(str(tmp_path / 'out')).state_dict(), said
    return run


def below(prefix, state_dict):
    return OrderedDict((prefix + key, value) for key, value in state_dict.items())


def same(state_dict, expected):
    return state_dict.keys() == expected.keys() and all(torch.equal(v, expected[k]) for k, v in state_dict.items())


@pytest.mark.parametrize('wrap', [
    lambda w: {'model': w, 'optimizer': {'state': {0: {'exp_avg': torch.ones(3)}}, 'param_groups': []}, 'epoch': 3},
    lambda w: {'model_state_dict': w, 'loss': torch.tensor(1.)},
    lambda w: {'net': below('module.', w), 'acc': 93.},
    lambda w: {'model': {'state_dict': w}},
    lambda w: {'state_dict': below('model.', w), 'epoch': 1, 'pytorch-lightning_version': '2.6.0'},
    lambda w: {'state_dict': {**below('model._orig_mod.', w), 'loss.weight': torch.ones(3)}},
    lambda w: {'state_dict': below('model.backbone.', w)},
    lambda w: {'state_dict': below('_orig_mod.module.', w)},
    lambda w: below('net.', w),
    lambda w: {**below('module.', w), 'n_averaged': torch.tensor(4)},
    lambda w: {key.replace('layer1.', 'layer1._checkpoint_wrapped_module.'): value for key, value in w.items()},
])
def test_form(converted, weights, wrap):
    state_dict, said = converted(wrap(weights[0]))
    assert same(state_dict, weights[0])
    assert (said.name, said.weights) == (NAME, 'weights as trained')


@pytest.mark.parametrize('ema', [None, True, False])
@pytest.mark.parametrize('wrap', [
    lambda w, e: {'model': w, 'model_ema': e},
    lambda w, e: {'model': w, 'ema': {'decay': 0.9, 'module': e}},
    lambda w, e: {'state_dict': {**below('model.', w), **below('ema_model.module.', e)}},
])
def test_moving_average(converted, weights, wrap, ema):
    state_dict, said = converted(wrap(*weights), ema=ema)
    assert same(state_dict, weights[0 if ema is False else 1])
    assert said.weights == ('weights as trained' if ema is False else 'moving average')


def test_what_is_not_of_the_model_is_told(converted, weights, caplog):
    with caplog.at_level(logging.INFO, 'vt_zoo'):
        converted({'state_dict': {**below('model.', weights[0]), 'head.weight': torch.ones(3, 2)}})
    assert "the model is below 'model.'; left out: head.weight" in caplog.text


def test_checkpoint_of_deit(converted, weights, tmp_path):
    """Whose `args` are not those of timm's train.py: an input size is one number, `model` a name of its own."""
    args = argparse.Namespace(model='deit_tiny', input_size=48, nb_classes=3, data_path='/secret', model_ema=True)
    state_dict, said = converted({'model': weights[0], 'model_ema': weights[1], 'epoch': 2, 'args': args})
    assert same(state_dict, weights[1])
    assert said.epoch is None
    assert tuple(load_model(str(tmp_path / 'out')).pretrained_cfg['input_size']) == (3, 48, 48)


def without(state_dict, key):
    return {k: v for k, v in state_dict.items() if k != key}


@pytest.mark.parametrize('change, match', [
    (lambda w: {'model': below('net.', without(w, 'fc.bias'))},
     "1 of its weights differ, the first missing is fc.bias, below the prefix 'net.'"),
    (lambda w: {'state_dict': below('model.', {**w, 'extra.weight': w['fc.bias']})},
     "1 of its weights differ, the first unexpected is extra.weight, below the prefix 'model.'"),
    (lambda w: {'x': w['fc.bias'], **without(w, 'conv1.weight')},
     '2 of its weights differ, the first missing is conv1.weight, the first unexpected is x, without a prefix'),
    (lambda w: {'a.b': torch.ones(2)}, 'the first missing is .*, the first unexpected is a.b, without a prefix'),
    (lambda w: below('model.', {**w, 'conv1.weight': torch.ones(2, 3)}),
     r'1 of its weights differ, the first is conv1.weight of shape \[2, 3\] instead of \['),
    (lambda w: below('model.', as_in_version_0_1(w)), 'cannot be used: its weights are of vt_zoo 0.1'),
    (lambda w: {**below('student.', w), **below('teacher.', w)},
     "holds the model 2 times, below 'student.', 'teacher.': save the state dict of one of them"),
])
def test_weights_that_differ(converted, weights, change, match, input_error):
    with input_error(match):
        converted(change(weights[0]))


def test_moving_average_that_is_not_wanted_or_not_there(converted, weights, input_error):
    with input_error('holds only a moving average: leave --no-ema out'):
        converted(below('ema.module.', weights[0]), ema=False)
    with input_error('holds no moving average: leave --ema out'):
        converted({'model': weights[0]}, ema=True)

"""timm's own scripts on our models, where VT_ZOO_TIMM_SCRIPTS names a clone of timm: several minutes of real runs."""
import json
import sys
from pathlib import Path

import pytest
import yaml

from vt_zoo.weights.conversion import convert

sys.path.append(str(Path(__file__).parents[1] / 'benchmarks'))
from timm_scripts import LOADER, TimmScripts, resumed_difference, right

IMAGES = 450  # held-out digits


@pytest.fixture(scope='module')
def scripts(timm_clone, tmp_path_factory):
    return TimmScripts(timm_clone, tmp_path_factory.mktemp('timm_scripts'))


def arguments(training):
    return yaml.safe_load((training.folder / 'args.yaml').read_text())


def test_train_with_plain(scripts):
    assert [epoch['lr'] for epoch in scripts.plain.epochs] == pytest.approx([0.1] * 4 + [0.01])
    assert scripts.plain.epochs[-1]['train_loss'] < 0.8 * scripts.plain.epochs[0]['train_loss']
    assert scripts.plain.top1 > 60


def test_train_with_advanced(scripts):
    """The moving average, AutoAugment, stochastic depth, smoothing and distillation are all on."""
    given = arguments(scripts.advanced)
    assert (given['model_ema'], given['aa'], given['drop_path'], given['smoothing']) == (True, 'original', 0.1, 0.1)
    assert given['kd_model_name'] == 'local-dir:teacher'
    assert (given['task_loss_weight'], given['distill_loss_weight'], given['opt']) == (0.2, None, 'rmsproptf')
    epochs = scripts.advanced.epochs
    assert [epoch['lr'] for epoch in epochs] == pytest.approx([0.0003125] + [0.005 * 0.9875 ** i for i in range(5)])
    assert epochs[-1]['train_loss'] < epochs[0]['train_loss']
    assert scripts.advanced.top1 > 20


def test_train_with_finetune(scripts):
    assert arguments(scripts.finetune)['pretrained']
    assert len(scripts.finetune.epochs) == 2


def test_resume_after_a_kill(scripts):
    """The epochs after it are those of the run that was not killed."""
    went_on = scripts.resumed.epochs
    assert went_on[-1]['epoch'] == 3
    for epoch in went_on:
        expected = scripts.uninterrupted.epochs[int(epoch['epoch'])]
        assert epoch['lr'] == expected['lr']
        assert epoch['train_loss'] == pytest.approx(expected['train_loss'], rel=1e-3)
    assert resumed_difference(scripts) < 0.01


@pytest.mark.parametrize('name', ['plain', 'advanced', 'local-dir'])
def test_validate(scripts, name):
    training = scripts.advanced if name == 'advanced' else scripts.plain
    assert scripts.validated[name]['top1'] == pytest.approx(training.top1, abs=1e-3)


@pytest.mark.parametrize('name', ['last', 'model_best'])
def test_convert(scripts, name):
    """validate.py gives the converted moving average the accuracy that train.py wrote down for it."""
    folder = scripts.folder / f'converted_{name}'
    convert(scripts.uninterrupted.folder / f'{name}.pth.tar', folder)
    training = json.loads((folder / 'config.json').read_text())['training']
    assert training['top1'] == pytest.approx(
        scripts.uninterrupted.epochs[training['epochs'] - 1]['eval_top1'], abs=1e-6)
    words = ('--data-dir', 'few', '--split', 'val', *LOADER, '--model', f'local-dir:{folder.name}', '--pretrained')
    assert scripts.result('validate.py', *words)['top1'] == pytest.approx(training['top1'], abs=1e-3)
    assert (training['weights'], training['arguments']['opt']) == ('moving average', 'momentum')


def test_inference(scripts):
    assert len(scripts.predictions) == IMAGES
    assert all(row['label'] == f'digit {row["index"]}' for row in scripts.predictions)
    assert 100 * right(scripts.predictions) == pytest.approx(scripts.plain.top1, abs=1e-3)


def test_benchmark(scripts):
    assert scripts.speed['infer_samples_per_sec'] > scripts.speed['train_samples_per_sec'] > 0


def test_bulk_runner(scripts):
    row, = scripts.bulk
    assert row['model'] == 'test_vt_resnet'
    assert float(row['infer_samples_per_sec']) > 0


def test_onnx(scripts):
    assert scripts.onnx_top1 == pytest.approx(scripts.plain.top1, abs=1e-2)

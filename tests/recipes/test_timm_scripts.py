"""timm's own scripts on our models, on the CPU, where VT_ZOO_TIMM_SCRIPTS names a clone of timm: several minutes."""
import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file
from timm.models import load_state_dict

import vt_zoo
from vt_zoo.recipes import recipe_path
from vt_zoo.weights.conversion import convert
from vt_zoo.weights.files import write_model

MODEL = ('--model', 'test_vt_resnet', '--num-classes', 10)
LOADER = ('--img-size', 64, '--device', 'cpu', '-j', 1)
VALIDATION = ('--split', 'val', *LOADER, '-b', 50)
SPEED = ('--img-size', 64, '-b', 4, '--device', 'cpu', '--num-warm-iter', 1, '--num-bench-iter', 10)
ENVIRONMENT = {
    **os.environ,
    'PYTHONPATH': os.pathsep.join(filter(None, [str(Path(vt_zoo.__file__).parents[1]), os.getenv('PYTHONPATH')]))}


def read(path):
    with path.open(newline='') as f:
        return list(csv.DictReader(f))


class Training:
    """What a run of train.py left in its folder."""

    def __init__(self, folder):
        self.best, self.last = folder / 'model_best.pth.tar', folder / 'last.pth.tar'
        self.arguments = yaml.safe_load((folder / 'args.yaml').read_text())
        self.epochs = [{key: float(value) for key, value in row.items()} for row in read(folder / 'summary.csv')]
        self.top1 = max(epoch['eval_top1'] for epoch in self.epochs)


class Scripts:
    """Runs timm's scripts in a folder."""

    def __init__(self, clone, folder):
        self.clone, self.folder = clone.resolve(), folder

    def command(self, script, *words):
        launcher = [] if script == 'train.py' else ['-m', 'vt_zoo.run']
        return [sys.executable, *launcher, str(self.clone / script), *map(str, words)]

    def run(self, script, *words):
        """Run a script and return what it printed."""
        process = subprocess.run(
            self.command(script, *words), cwd=self.folder, env=ENVIRONMENT, capture_output=True, text=True,
            timeout=1200)
        assert process.returncode == 0, process.stderr[-3000:]
        return process.stdout

    def result(self, script, *words):
        """Run a script and return the object that it prints after `--result`."""
        return json.loads(self.run(script, *words).rsplit('--result', 1)[1])

    @staticmethod
    def training(name, recipe, data, *words):
        """Words of train.py."""
        return (
            '-c', recipe_path(recipe), '--data-dir', data, '--val-split', 'val', *MODEL, *LOADER, '--hflip', 0,
            '--output', 'runs', '--experiment', name, *words)

    def train(self, name, *words):
        self.run('train.py', *self.training(name, *words))
        return Training(self.folder / 'runs' / name)


@pytest.fixture(scope='module')
def scripts(timm_clone, tmp_path_factory):
    return Scripts(timm_clone, tmp_path_factory.mktemp('timm_scripts'))


@pytest.fixture(scope='module')
def plain(scripts, digits):
    return scripts.train('plain', 'plain', digits, '--epochs', 5, '--decay-epochs', 4, '-b', 64)


@pytest.fixture(scope='module')
def teacher(scripts, plain):
    """The best weights of `plain` in timm's hub layout, with the names of the classes."""
    model = timm.create_model('test_vt_resnet', num_classes=10)
    model.load_state_dict(load_state_dict(plain.best, use_ema=True))
    data_config = timm.data.resolve_data_config({'img_size': 64}, model=model)
    write_model(scripts.folder / 'teacher', model, [f'digit {i}' for i in range(10)], data_config)
    return 'local-dir:teacher'


@pytest.fixture(scope='module')
def advanced(scripts, digits, teacher):
    """All of the recipe; fewer epochs, the rates scaled to the batch, and a moving average as long as the run."""
    return scripts.train(
        'advanced', 'advanced', digits, '-b', 64, '--epochs', 5, '--warmup-epochs', 1, '--lr', 0.16 * 64 / 2048,
        '--warmup-lr', 0.01 * 64 / 2048, '--model-ema-decay', 0.95, '--kd-model-name', teacher)


# One batch an epoch and no augmentation: timm seeds a run at its start, not its epochs, so that the order of images
# after a resumption is another one.
@pytest.fixture(scope='module')
def steady(few_digits):
    return 'plain', few_digits, '--epochs', 4, '--model-ema', '--model-ema-decay', 0.9, '-b', 36, '--no-aug'


@pytest.fixture(scope='module')
def uninterrupted(scripts, steady):
    return scripts.train('uninterrupted', *steady)


def test_train_with_plain(plain):
    assert [epoch['lr'] for epoch in plain.epochs] == pytest.approx([0.1] * 4 + [0.01])
    assert plain.epochs[-1]['train_loss'] < 0.8 * plain.epochs[0]['train_loss']
    assert plain.top1 > 60


def test_train_with_advanced(advanced, teacher):
    """The moving average, AutoAugment, stochastic depth, smoothing and distillation are all on."""
    given = advanced.arguments
    assert (given['model_ema'], given['aa'], given['drop_path'], given['smoothing']) == (True, 'original', 0.1, 0.1)
    assert given['kd_model_name'] == teacher
    assert (given['task_loss_weight'], given['distill_loss_weight'], given['opt']) == (0.2, None, 'rmsproptf')
    epochs = advanced.epochs
    assert [epoch['lr'] for epoch in epochs] == pytest.approx([0.0003125] + [0.005 * 0.9875 ** i for i in range(5)])
    assert epochs[-1]['train_loss'] < epochs[0]['train_loss']
    assert advanced.top1 > 20


def test_train_with_finetune(scripts, few_digits):
    """From the trunk of timm's resnet18, whose weights here are random: the real ones are on the hub."""
    save_file(timm.create_model('resnet18').state_dict(), scripts.folder / 'resnet18.safetensors')
    training = scripts.train(
        'finetune', 'finetune', few_digits, '--model', 'vt_resnet18.trunk_a1_in1k', '--pretrained-path',
        'resnet18.safetensors', '--epochs', 2, '--warmup-epochs', 1, '-b', 32)
    assert training.arguments['pretrained']
    assert len(training.epochs) == 2


def test_resume_after_a_kill(scripts, steady, uninterrupted):
    """The epochs and the weights after it are those of the run that was not killed."""
    command = scripts.command('train.py', *scripts.training('killed', *steady))
    with subprocess.Popen(
            command, cwd=scripts.folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True) as process:
        for line in process.stderr:
            if line.startswith('Train: 2 '):
                process.kill()
        assert process.wait() == -signal.SIGKILL
    killed = scripts.folder / 'runs' / 'killed' / 'last.pth.tar'
    resumed = scripts.train('resumed', *steady, '--resume', killed)
    assert resumed.epochs[-1]['epoch'] == 3
    for epoch in resumed.epochs:
        expected = uninterrupted.epochs[int(epoch['epoch'])]
        assert epoch['lr'] == expected['lr']
        assert epoch['train_loss'] == pytest.approx(expected['train_loss'], rel=1e-3)
    for use_ema in (False, True):
        start, end, reached = (
            torch.cat([t.flatten().double() for t in load_state_dict(path, use_ema=use_ema).values()])
            for path in (killed, uninterrupted.last, resumed.last))
        assert (reached - end).norm() < 0.01 * (start - end).norm()


def test_validate(scripts, digits, plain):
    words = (*VALIDATION, *MODEL, '--data-dir', digits, '--checkpoint', plain.best)
    assert scripts.result('validate.py', *words)['top1'] == pytest.approx(plain.top1, abs=1e-3)


def test_validate_a_moving_average(scripts, digits, advanced):
    words = (*VALIDATION, *MODEL, '--data-dir', digits, '--checkpoint', advanced.best, '--use-ema')
    assert scripts.result('validate.py', *words)['top1'] == pytest.approx(advanced.top1, abs=1e-3)


def test_validate_a_folder(scripts, digits, plain, teacher):
    words = (*VALIDATION, '--data-dir', digits, '--model', teacher, '--pretrained')
    assert scripts.result('validate.py', *words)['top1'] == pytest.approx(plain.top1, abs=1e-3)


@pytest.mark.parametrize('name', ['last', 'best'])
def test_convert(scripts, few_digits, uninterrupted, name):
    """validate.py gives the converted moving average the accuracy that train.py wrote down for it."""
    folder = scripts.folder / f'converted_{name}'
    convert(getattr(uninterrupted, name), folder)
    training = json.loads((folder / 'config.json').read_text())['training']
    expected = uninterrupted.epochs[training['epochs'] - 1]['eval_top1']
    assert training['top1'] == pytest.approx(expected, abs=1e-6)
    words = (*VALIDATION, '--data-dir', few_digits, '--model', f'local-dir:{folder.name}', '--pretrained')
    assert scripts.result('validate.py', *words)['top1'] == pytest.approx(expected, abs=1e-3)
    assert (training['weights'], training['arguments']['opt']) == ('moving average', 'momentum')


def test_inference(scripts, digits, plain, teacher):
    scripts.run(
        'inference.py', *VALIDATION, '--data-dir', digits, '--model', teacher, '--pretrained', '--label-type', 'name',
        '--include-index', '--topk', 1, '--fullname', '--results-dir', 'predictions', '--results-file', 'table')
    rows = read(scripts.folder / 'predictions' / 'table.csv')
    assert len(rows) == 450
    assert all(row['label'] == f'digit {row["index"]}' for row in rows)
    right = sum(row['index'] == Path(row['filename']).parent.name for row in rows)
    assert 100 * right / 450 == pytest.approx(plain.top1, abs=1e-3)


def test_benchmark(scripts):
    speed = scripts.result('benchmark.py', '--model', 'test_vt_resnet', *SPEED, '--bench', 'both')
    assert speed['infer_samples_per_sec'] > speed['train_samples_per_sec'] > 0


def test_bulk_runner(scripts):
    """It starts benchmark.py in a process of its own, and wants a word after --module."""
    scripts.run(
        'bulk_runner.py', '--model-list', 'test_vt_*', '--results-file', 'bulk.csv', '--sort-key',
        'infer_samples_per_sec', '--module', 'yes', 'vt_zoo.run', scripts.clone / 'benchmark.py', *SPEED,
        '--bench', 'inference')
    row, = read(scripts.folder / 'bulk.csv')
    assert row['model'] == 'test_vt_resnet'
    assert float(row['infer_samples_per_sec']) > 0


def test_onnx(scripts, digits, plain):
    """onnx_validate.py knows no model, so its preprocessing is given."""
    scripts.run(
        'onnx_export.py', 'model.onnx', *MODEL, '--img-size', 64, '-b', 50, '--check-forward', '--checkpoint',
        plain.best)
    text = scripts.run(
        'onnx_validate.py', digits / 'val', '--onnx-input', 'model.onnx', '--img-size', 64, '-b', 50, '-j', 1,
        '--crop-pct', 1.0, '--interpolation', 'bilinear')
    assert float(re.search(r'\* Prec@1 ([\d.]+)', text)[1]) == pytest.approx(plain.top1, abs=1e-2)

"""`vt-zoo quickstart`: what a run prints and leaves behind, and how good a whole one is."""
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import check_refused, count_correct, history, load_folder, tree
from PIL import Image

from vt_zoo.classification.settings import FinetuneSettings

WRITTEN = ['data', 'history.csv', 'model', 'tokens.png']


def printed(text):
    """The lines of a summary, by their first word."""
    lines = [line.split(None, 1) for line in text.splitlines()]
    return {words[0]: words[1] for words in lines if len(words) == 2}


@pytest.fixture(scope='module')
def small_images():
    """What is written and told is the same with images of a ninth of the pixels, which train in seconds."""
    read = FinetuneSettings.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FinetuneSettings, 'read', lambda config, changes: read(config, {**changes, 'img_size': 32}))
        yield


@pytest.fixture(scope='module')
def quickstart(command, small_images, tmp_path_factory):
    """A run of two epochs of small images: its folder `out` in `cwd`, standard output and error."""
    cwd = tmp_path_factory.mktemp('quickstart')
    result = command('quickstart', '--epochs', '2', cwd=cwd)
    assert result.code == 0, result.stderr
    return SimpleNamespace(cwd=cwd, out=cwd / 'vt_zoo_quickstart', stdout=result.stdout, stderr=result.stderr)


@pytest.fixture(scope='module')
def whole(script, tmp_path_factory):
    """A process of `vt-zoo quickstart` as a user runs it: its folder `out`, standard output, seconds."""
    cwd = tmp_path_factory.mktemp('whole')
    start = time.monotonic()
    process = subprocess.run([script, 'quickstart'], cwd=cwd, capture_output=True, text=True, timeout=1200)
    seconds = time.monotonic() - start
    assert process.returncode == 0, process.stderr
    return SimpleNamespace(out=cwd / 'vt_zoo_quickstart', stdout=process.stdout, seconds=seconds)


@pytest.fixture(scope='module')
def summary(quickstart):
    return printed(quickstart.stdout)


def accuracy(quickstart):
    """Percent, right images and all of them, as they are printed."""
    shown = printed(quickstart.stdout)['accuracy']
    return re.match(r'([\d.]+) % \((\d+) of (\d+) held-out images\)', shown).groups()


def test_accuracy_is_the_one_that_timm_finds(quickstart, summary):
    percent, correct, total = accuracy(quickstart)
    assert (int(correct), int(total)) == count_correct(quickstart.out / 'model', quickstart.out / 'data' / 'val')
    assert percent == f'{100 * int(correct) / 450:.2f}' and total == '450'
    assert summary['reloaded'] == 'the same prediction on each of the 450 images'


@pytest.mark.slow
def test_whole_run(command, whole):
    assert whole.seconds < 180
    assert load_folder(whole.out / 'model').pretrained_cfg['input_size'] == (3, 96, 96)
    assert float(accuracy(whole)[0]) >= 97  # 98.0 with one thread, 97.3 with two: rounding decides
    paths = sorted((whole.out / 'data' / 'val' / '7').iterdir())
    result = command('predict', *paths, '--model', whole.out / 'model', '--json', '--top', 1)
    labels = [prediction['top'][0]['label'] for prediction in json.loads(result.stdout)]
    assert labels.count('7') / len(paths) > 0.9


def test_what_is_written_and_printed(quickstart, summary):
    assert os.listdir(quickstart.cwd) == ['vt_zoo_quickstart']
    assert sorted(os.listdir(quickstart.out)) == WRITTEN
    for name, path in zip(('data', 'history', 'model', 'picture'), WRITTEN):
        assert summary[name] == f'vt_zoo_quickstart/{path}'
    assert 'replacing' not in summary
    assert 'Traceback' not in quickstart.stderr
    config = json.loads((quickstart.out / 'model' / 'config.json').read_text())
    assert (config['architecture'], config['label_names']) == ('test_vt_resnet', list('0123456789'))
    assert config['pretrained_cfg']['input_size'] == [3, 32, 32]


def test_command_that_is_printed(command, quickstart, summary):
    program, *words = shlex.split(summary['use'])
    assert program == 'vt-zoo'
    result = command(*words, cwd=quickstart.cwd)
    assert (result.code, result.stderr) == (0, '')
    image, first, *_ = result.stdout.splitlines()
    assert image == words[1]
    assert re.fullmatch(r' +\d+\.\d\d %  \d', first)


def test_history(quickstart, summary):
    rows = history(quickstart.out)
    printed = [line.split(':')[0].split() for line in quickstart.stdout.splitlines() if line.startswith('epoch ')]
    assert printed == [['epoch', row['epoch']] for row in rows] == [['epoch', '1'], ['epoch', '2']]
    assert f'{float(rows[-1]["val_top1"]):.2f} %' == summary['accuracy'].split(' (')[0]
    assert float(rows[-1]['train_loss']) < float(rows[0]['train_loss'])


def test_data_are_the_digits(quickstart, digits):
    assert tree(quickstart.out / 'data') == tree(digits)


def test_picture(quickstart):
    with Image.open(quickstart.out / 'tokens.png') as image:
        assert image.format == 'PNG'
        assert 600 <= image.width <= 4000
        assert 200 <= image.height <= 3000
        pixels = np.asarray(image.convert('RGB'))
    assert pixels.std() > 20
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 1000


def test_second_run_says_what_it_replaces(command, quickstart, tmp_path):
    """Over a copy of the first, beside a file of the user's; its bad accuracy is told as it is."""
    out = shutil.copytree(quickstart.out, tmp_path / 'out')
    (out / 'notes.txt').write_text('mine')
    (out / 'data' / 'train' / '0' / 'old.png').touch()
    result = command('quickstart', '--epochs', 1, '--out', out)
    assert result.code == 0, result.stderr
    line = result.stdout.splitlines()[0]
    assert line.startswith('replacing') and all(word in line for word in [str(out), *WRITTEN])
    assert sorted(os.listdir(out)) == sorted([*WRITTEN, 'notes.txt'])
    assert (out / 'notes.txt').read_text() == 'mine'
    assert not (out / 'data' / 'train' / '0' / 'old.png').exists()
    for name in ('model/model.safetensors', 'tokens.png'):
        assert (out / name).read_bytes() != (quickstart.out / name).read_bytes()
    percent, (row,) = float(accuracy(result)[0]), history(out)
    assert percent == pytest.approx(float(row['val_top1']), abs=0.005)
    assert percent < 98


def test_folders_of_the_user_are_not_deleted(command, signal_at, tmp_path):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'thesis.txt').write_text('mine')
    before_training = signal_at('timm.utils.ModelEmaV3.update', 1, signal.SIGKILL)
    result = command('quickstart', '--out', tmp_path, before=before_training)
    assert (tmp_path / 'data' / 'thesis.txt').exists(), result.stdout


@pytest.mark.parametrize('package', ['sklearn', 'matplotlib'])
def test_missing_package_is_told_at_once(command, tiny_run, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    out = shutil.copytree(tiny_run.out, tmp_path / 'out')
    before = tree(out)
    result = command('quickstart', '--out', out)
    check_refused(result, package, 'pip install')
    assert (result.stdout, len(result.lines)) == ('', 1)
    assert tree(out) == before

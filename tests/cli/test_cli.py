"""The command line: what it prints, and one sentence and an exit code for each input that cannot be used."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from helpers import (
    change_config,
    check_interrupted,
    check_refused,
    files,
    interrupt_at_checkpoint,
    load_folder,
    noise,
    tree,
    truncate,
    weights,
)
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm_plugin import registered_models

import vt_zoo
from vt_zoo.recipes import list_recipes

STEPS = 4  # of an epoch with tiny_arguments on few_digits
CASES = {  # words after `finetune DATA_DIR`
    'unknown model': ['--model', 'no_such_model'],
    'no epochs': ['--epochs', '0'],
    'epochs in words': ['--epochs', 'many'],
    'negative learning rate': ['--lr', '-1'],
    'learning rate of nan': ['--lr', 'nan'],
    'all held out': ['--val-fraction', '1'],
    'unknown optimizer': ['--opt', 'no_such_optimizer'],
    'unknown device': ['--device', 'abacus'],
    'unknown word': ['--no-such-word'],
}


@pytest.fixture(scope='module')
def picture(digits):
    return sorted((digits / 'val' / '1').iterdir())[0]


@pytest.fixture(scope='module')
def refuse_finetune(command, few_digits, tiny_arguments):
    """Runs `finetune` with words after tiny_arguments, and checks that nothing changes in a folder."""
    def run(folder, *words, data_dir=few_digits, holds=(), **kwargs):
        before = tree(folder)
        result = command('finetune', data_dir, *tiny_arguments, '--out', folder / 'run', *words, **kwargs)
        check_refused(result, *holds)
        assert [path for path in files(folder) if path not in before] == []
        assert {path: content for path, content in tree(folder).items() if path in before} == before
        assert all(line.startswith(('train ', 'val ')) for line in result.stdout.splitlines()), 'the classes alone'
        return result
    return run


def test_version(command):
    result = command('--version')
    assert (result.code, result.stdout, result.stderr) == (0, f'vt-zoo {vt_zoo.__version__}\n', '')


def test_help(command):
    text = command('--help').stdout
    for name in ('quickstart', 'finetune', 'predict', 'models', 'recipe', 'convert', 'publish'):
        assert name in text
        result = command(name, '--help')
        assert result.code == 0
        assert f'usage: vt-zoo {name}' in result.stdout


@pytest.mark.parametrize('words, holds', [
    (['no_such_command'], ['no_such_command']), ([], ['COMMAND']), (['finetune'], ['DATA_DIR']),
    (['recipe', 'no_such_recipe'], ["'no_such_recipe'", *list_recipes()]),
    (['predict', '--model', 'test_vt_resnet'], ['IMAGE']), (['predict', 'a.png'], ['--model']),
    (['predict', 'a.png', '--model', 'test_vt_resnet', '--top', '0'], ['--top']),
    (['predict', 'a.png', '--model', 'test_vt_resnet', '--json', '--csv'], ['--csv', '--json']),
    *((['quickstart', '--out', 'a', *words], words) for words in (['--epochs', '0'], ['--seed', '-1'], ['more'])),
    (['predict', 'a.png', '--model', 'no_such_model'], ['no_such_model']),
    (['predict', 'a.png', '--model', os.path.dirname(__file__)], [os.path.dirname(__file__)])])
def test_words_that_cannot_be_used(command, tmp_path, words, holds):
    result = command(*words, cwd=tmp_path)
    check_refused(result, *holds)
    assert (result.stdout, result.stderr.count('\n'), os.listdir(tmp_path)) == ('', 1, [])


@pytest.mark.parametrize('name', list_recipes())
def test_recipe(command, name):
    result = command('recipe', name)
    assert (result.code, result.stderr) == (0, '')
    path = Path(result.stdout.rstrip('\n'))
    assert command('recipe', name, '--show').stdout == path.read_text()
    assert yaml.safe_load(path.read_text())['device_modules'] == ['vt_zoo']


def test_models_as_json(models):
    assert sorted(models) == sorted(registered_models())
    for name, entry in models.items():
        model = timm.create_model(name, device='meta')
        assert entry['parameters'] == sum(p.numel() for p in model.parameters() if p.ndim > 1)
        assert entry['multiply_adds'] > 10 * entry['parameters']
        assert entry['weights'] == timm.list_pretrained(f'{name}.*')


def test_models_as_a_table(command, models):
    result = command('models')
    assert (result.code, result.stderr) == (0, '')
    head, *rows = result.stdout.splitlines()
    assert head.split() == ['model', 'parameters', 'multiply-adds', 'weights']
    assert [row.split()[0] for row in rows] == list(models)
    for row, entry in zip(rows, models.values()):
        assert f'{entry["parameters"] / 1e6:.2f} M' in row
        assert f'{entry["multiply_adds"] / 1e6:.0f} M' in row


def test_predict_as_json(command, few_digits, tiny_model):
    paths = [str(p) for p in sorted((few_digits / 'val' / '1').iterdir())[:2]]
    result = command('predict', *paths, '--model', tiny_model, '--json', '--top', 10)
    assert (result.code, result.stderr) == (0, '')
    predictions = json.loads(result.stdout)
    assert [p['image'] for p in predictions] == paths

    model = load_folder(tiny_model)
    transform = create_transform(**resolve_data_config({}, model=model))
    for path, prediction in zip(paths, predictions):
        with torch.inference_mode():
            expected = model(transform(Image.open(path).convert('RGB'))[None]).softmax(-1)[0]
        top = prediction['top']
        assert [entry['index'] for entry in top] == expected.argsort(descending=True).tolist()
        assert [entry['label'] for entry in top] == [str(entry['index']) for entry in top]
        assert [entry['probability'] for entry in top] == pytest.approx(
            expected.sort(descending=True).values.tolist(), abs=1e-5)


def test_predict_as_a_table(command, picture, few_digits, tiny_model):
    other = sorted((few_digits / 'val' / '2').iterdir())[0]
    words = ['predict', picture, other, '--model', tiny_model, '--top', '2']
    result = command(*words)
    assert (result.code, result.stderr) == (0, '')
    lines = result.stdout.splitlines()
    expected = json.loads(command(*words, '--json').stdout)
    assert [lines[0], lines[3]] == [str(picture), str(other)]
    for first, prediction in zip((1, 4), expected):
        for line, entry in zip(lines[first:first + 2], prediction['top']):
            percent, sign, label = line.split()
            assert float(percent) == pytest.approx(100 * entry['probability'], abs=0.006)
            assert (sign, label) == ('%', entry['label'])
    assert len(lines) == 6


def test_predict_of_a_file_that_is_no_image(command, picture, tiny_model, tmp_path):
    note, missing = tmp_path / 'note.png', tmp_path / 'missing.png'
    note.write_text('Hello')
    result = command('predict', note, missing, tmp_path, picture, '--model', tiny_model, '--top', 1)
    check_refused(result, '3 of 4 images', code=1)
    lines = result.stdout.splitlines()
    assert lines[::2] == [str(path) for path in (note, missing, tmp_path / 'note.png', picture)] and len(lines) == 8
    for line, words in zip(lines[1::2], ('not an image', 'does not exist', 'not an image')):
        assert line.startswith('  error: ') and words in line


def truncated_weights(folder):
    truncate(folder / 'model.safetensors')


def too_small_an_input(folder):
    config = json.loads((folder / 'config.json').read_text())['pretrained_cfg']
    change_config(folder, pretrained_cfg={**config, 'input_size': [3, 8, 8]})


@pytest.mark.parametrize('damage', [truncated_weights, too_small_an_input])
def test_predict_with_a_damaged_model(command, picture, my_model, damage):
    damage(my_model)
    result = command('predict', picture, '--model', my_model, '--top', 3)
    check_refused(result, my_model)
    assert result.stdout == ''


@pytest.mark.parametrize('words', [
    ['predict', 'a.png', '--model', 'model'], ['export', 'model', '--format', 'torchscript'],
    ['publish', 'model', '--repo-id', 'a/b', '--dry-run']], ids=lambda words: words[0])
@pytest.mark.parametrize('options', [{'num_classes': 0}, {'global_pool': ''}], ids=str)
def test_model_that_is_no_classifier(command, tmp_path, words, options):
    model = timm.create_model('test_vt_resnet.untrained', **options)
    timm.models.save_for_hf(model, tmp_path / 'model', model_args=options, safe_serialization=True)
    Image.new('RGB', (64, 64)).save(tmp_path / 'a.png')
    check_refused(command(*words, cwd=tmp_path), 'model is no classifier')
    assert sorted(os.listdir(tmp_path)) == ['a.png', 'model']


def test_finetune_from_a_damaged_model(refuse_finetune, my_model, tmp_path):
    truncated_weights(my_model)
    refuse_finetune(tmp_path, '--model', my_model, holds=[my_model])


@pytest.mark.parametrize('words', CASES.values(), ids=CASES)
def test_finetune_with_words_that_cannot_be_used(refuse_finetune, tmp_path, words):
    refuse_finetune(tmp_path, *words)


def test_finetune_on_a_missing_folder(refuse_finetune, tmp_path):
    refuse_finetune(tmp_path, data_dir=tmp_path / 'missing', holds=['missing', 'does not exist'])


def test_finetune_on_a_class_of_damaged_images(refuse_finetune, my_digits, tmp_path):
    for path in (my_digits / 'train' / '1').iterdir():
        path.write_bytes(path.read_bytes()[:40])
    result = refuse_finetune(tmp_path, data_dir=my_digits, holds=['0 readable images'])
    assert len(result.lines) == 13


def test_finetune_leaves_damaged_images_out(command, my_digits, tiny_arguments, tmp_path):
    half = my_digits / 'train' / '0' / 'half.jpg'
    Image.fromarray(noise(64, 64, 3)).save(half)
    truncate(half)
    (my_digits / 'val' / '2' / 'note.png').write_text('This is a note.\n')
    out = tmp_path / 'run'
    result = command('finetune', my_digits, *tiny_arguments, '--out', out)
    assert result.code == 0
    assert len(result.lines) == 2
    for line, name in zip(sorted(result.lines), ('train/0/half.jpg', 'val/2/note.png')):
        assert line.startswith('vt-zoo: WARNING: ')
        assert str(my_digits / name) in line
    assert 'of 18 held-out images' in result.stdout
    assert sorted(os.listdir(out)) == ['history.csv', 'model']


def test_finetune_prints_a_summary(command, few_digits, tiny_arguments, tiny_run, tmp_path):
    result = command('finetune', few_digits, *tiny_arguments, '--out', 'run', cwd=tmp_path)
    assert (result.code, result.lines) == (0, [])
    outcome, lines = tiny_run.result, result.stdout.splitlines()
    assert lines[:2] == [
        'train      36 images of 3 classes: 0 (12), 1 (12), 2 (12)',
        'val        18 images of 3 classes: 0 (6), 1 (6), 2 (6)']
    assert [line.split(':')[0].split() for line in lines[2:4]] == [['epoch', '1'], ['epoch', '2']]
    assert (f'accuracy   {100 * outcome.correct / outcome.total:.2f} % '
            f'({outcome.correct} of {outcome.total} held-out images)') in result.stdout
    assert 'reloaded   the same prediction on each of the 18 images' in result.stdout
    assert 'model      run/model' in lines
    assert weights(tmp_path / 'run') == weights(tiny_run.out)


@pytest.mark.parametrize('place', ['file', 'file/run', '/proc/no_such_place', '/proc'])
@pytest.mark.parametrize('name', ['finetune', 'quickstart'])
def test_place_that_cannot_be_written(command, few_digits, tiny_arguments, tmp_path, name, place):
    (tmp_path / 'file').write_text('mine')
    words = [few_digits, *tiny_arguments] if name == 'finetune' else ['--epochs', 1]
    check_refused(command(name, *words, '--out', tmp_path / place), tmp_path / place)
    assert tree(tmp_path) == {'file': b'mine'}


@pytest.mark.parametrize('words', [[], ['--resume', '--seed', '1']])
def test_finetune_into_a_finished_run(command, few_digits, tiny_arguments, tiny_run, words):
    before = tree(tiny_run.out)
    result = command('finetune', few_digits, *tiny_arguments, '--out', tiny_run.out, *words)
    check_refused(result, '--overwrite', *(['seed = 0 instead of 1'] if words else []))
    assert tree(tiny_run.out) == before


def test_resuming_a_finished_finetune(command, few_digits, tiny_arguments, tiny_run):
    before = tree(tiny_run.out)
    result = command('finetune', few_digits, *tiny_arguments, '--out', tiny_run.out, '--resume')
    assert (result.code, result.stderr) == (0, '')
    assert 'finished' in result.stdout and str(tiny_run.out / 'model') in result.stdout
    assert tree(tiny_run.out) == before


@pytest.mark.parametrize('size', [1_000, 1_000_000, 3_000_000])
def test_finetune_on_a_full_disk(
        command, refuse_finetune, limit_file_size, few_digits, tiny_arguments, tiny_run, tmp_path, size):
    refuse_finetune(tmp_path, before=limit_file_size(size))
    result = command('finetune', few_digits, *tiny_arguments, '--out', tmp_path / 'run')
    assert result.code == 0
    assert weights(tmp_path / 'run') == weights(tiny_run.out)


def test_disk_that_is_full_at_the_end(
        command, signal_at, limit_file_size, few_digits, tiny_arguments, tiny_run, tmp_path):
    out = tmp_path / 'run'
    words = ['finetune', few_digits, *tiny_arguments, '--out', out]
    check_interrupted(command(*words, before=signal_at('os.replace', 3, signal.SIGINT)))
    before = tree(out)
    assert list(before) == ['checkpoint.safetensors']
    check_refused(command(*words, '--resume', before=limit_file_size(1_000_000)))
    assert tree(out) == before
    assert command(*words, '--resume').code == 0
    assert weights(out) == weights(tiny_run.out)


@pytest.mark.parametrize('words', [['models'], ['models', '--json'], ['predict', '--model']])
def test_standard_output_on_a_full_disk(command, picture, tiny_model, words):
    check_refused(command(*words, *([tiny_model, picture] if words[0] == 'predict' else []), out='/dev/full'))


@pytest.mark.slow
def test_reader_that_goes_away(picture, tiny_model):
    process = subprocess.Popen(
        [sys.executable, '-m', 'vt_zoo', 'predict', picture, '--model', tiny_model],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b''
    process.stderr.close()
    assert process.wait() == 1


@pytest.mark.slow
def test_ctrl_c_in_a_real_process(command, few_digits, tiny_arguments, tmp_path):
    out = tmp_path / 'run'
    words = ['finetune', few_digits, *tiny_arguments, '--epochs', '5', '--out']
    stderr = interrupt_at_checkpoint(words, out)
    assert stderr.endswith('vt-zoo: interrupted\n')
    assert os.listdir(out) == ['checkpoint.safetensors']

    assert command(*words, out, '--resume').code == 0
    assert command(*words, tmp_path / 'whole').code == 0
    assert weights(out) == weights(tmp_path / 'whole')
    assert (out / 'history.csv').read_bytes() == (tmp_path / 'whole' / 'history.csv').read_bytes()


@pytest.mark.parametrize('function, call, left', [
    ('vt_zoo.data.images.load_image', 5, []),  # while the images are checked
    ('timm.utils.ModelEmaV3.update', 2, []),
    ('timm.utils.ModelEmaV3.update', STEPS + 2, ['checkpoint.safetensors']),
    ('os.replace', 1, []),
    ('os.replace', 2, ['checkpoint.safetensors']),
    ('os.replace', 6, ['checkpoint.safetensors', 'model']),
])
def test_ctrl_c_in_finetune(command, signal_at, few_digits, tiny_arguments, tiny_run, tmp_path, function, call, left):
    out = tmp_path / 'run'
    words = ['finetune', few_digits, *tiny_arguments, '--out', out]
    result = command(*words, before=signal_at(function, call, signal.SIGINT))
    check_interrupted(result)
    assert sorted(os.listdir(out) if out.exists() else []) == left
    assert (len(result.lines) == 2 and '--resume' in result.lines[0]) == bool(left)
    assert command(*words, '--resume').code == 0
    assert weights(out) == weights(tiny_run.out)


@pytest.mark.parametrize('function, call, after', [
    ('timm.utils.ModelEmaV3.update', STEPS + 2, False),
    ('multiprocessing.process.BaseProcess.join', 1, False),  # while those of the first epoch end
])
def test_ctrl_c_in_finetune_with_workers(
        command, signal_at, few_digits, tiny_arguments, tmp_path, function, call, after):
    words = ['finetune', few_digits, *tiny_arguments, '--workers', 2, '--out', tmp_path / 'run']
    check_interrupted(command(*words, before=signal_at(function, call, signal.SIGINT, after)))
    assert not (tmp_path / 'run' / 'model').exists()


def test_ctrl_c_in_predict(command, signal_at, few_digits, tiny_model):
    paths = sorted((few_digits / 'train').rglob('*.png'))
    before = signal_at('vt_zoo.cli.predict.check_logits', 1, signal.SIGINT)
    result = command('predict', *paths, '--model', tiny_model, before=before)
    check_interrupted(result)
    assert result.stdout == ''
    before = signal_at('vt_zoo.cli.results.json.dumps', 20, signal.SIGINT, after=True)
    result = command('predict', *paths, '--model', tiny_model, '--jsonl', before=before)
    check_interrupted(result)
    assert [json.loads(line)['image'] for line in result.stdout.splitlines()] == [str(p) for p in paths[:19]]


@pytest.mark.parametrize('function, call', [
    ('PIL.Image.Image.save', 500), ('timm.utils.ModelEmaV3.update', 3)])
def test_ctrl_c_in_the_quickstart(command, signal_at, tmp_path, function, call):
    result = command('quickstart', '--out', tmp_path / 'out', before=signal_at(function, call, signal.SIGINT))
    check_interrupted(result)
    assert len(files(tmp_path)) in (0, 1797)

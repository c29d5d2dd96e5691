"""Machines as they are: links and pipes among the files, two processes at one place, numbers that are slips."""
import argparse
import json
import logging
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import check_refused, files, tree, weights
from PIL import Image

from vt_zoo.cli.main import COMMANDS, create_parser, main
from vt_zoo.data import image_stream
from vt_zoo.data.folders import find_images
from vt_zoo.data.images import find_split
from vt_zoo.errors import InputError
from vt_zoo.files import run_folder, whole
from vt_zoo.segmentation.settings import SegmentSettings

SECONDS = 60  # in which a command ends that waits for nothing
HOLD = '''
import fcntl, sys, time
lock = open(sys.argv[1], 'a')
fcntl.flock(lock, fcntl.LOCK_EX)
print('held', flush=True)
time.sleep(600)
'''
HUGE = ['1e20', '99999999999999999999', '-1', '-99999999999999999999', 'nan', 'inf', '-inf', '9' * 5000, '']


@pytest.fixture
def holder():
    """Starts a process that holds a lock, as a run of another process does."""
    processes = []

    def start(path):
        process = subprocess.Popen([sys.executable, '-c', HOLD, path], stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == 'held\n'
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def pipe(tmp_path):
    """Makes a FIFO, which nobody writes to."""
    def make(name):
        path = tmp_path / name
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        return path
    return make


# --- links

def test_links_in_circles_end(my_digits):
    train = my_digits / 'train'
    before = find_images(train)
    for name in '012':
        (train / name / 'up').symlink_to('..')
        (train / name / 'top').symlink_to(my_digits)
        (train / name / 'self.png').symlink_to('self.png')
    found = find_images(train)
    others = {p for p in found if '/top/' in p or p.endswith('self.png')}  # val/ is outside of train/
    assert sorted(set(found) - others) == before
    assert len({os.path.realpath(p) for p in found}) == len(found)


def test_each_file_counts_once(my_digits, caplog):
    """Links to files and to folders, whose names come before those of what they lead to."""
    root = my_digits / 'train'
    before = find_split(root)
    (root / '0' / '0_loop').symlink_to(root)
    (root / '0' / '0.png').symlink_to(next((root / '1').iterdir()))
    (root / '0' / 'a').symlink_to(root / '2')
    with caplog.at_level(logging.WARNING):
        after = find_split(root)
    assert (after.classes, after.train, after.val) == (before.classes, before.train, before.val)
    assert any('3 links' in r.getMessage() and 'left out' in r.getMessage() for r in caplog.records)


def test_class_folder_that_is_a_link_elsewhere(my_digits, tmp_path):
    before = find_split(my_digits)
    elsewhere = (my_digits / 'train' / '1').rename(tmp_path / 'elsewhere')
    (my_digits / 'train' / '1').symlink_to(elsewhere)
    assert find_split(my_digits) == before


def test_same_file_in_both_parts(my_digits, caplog):
    train, val = my_digits / 'train', my_digits / 'val'
    before = find_split(my_digits)
    (val / '0' / 'again.png').symlink_to(next((train / '0').iterdir()))
    with caplog.at_level(logging.WARNING):
        assert find_split(my_digits) == before
    assert any(str(train) in r.getMessage() and 'again.png' in r.getMessage() for r in caplog.records)


def test_val_that_is_a_link_to_train(my_digits, input_error):
    shutil.rmtree(my_digits / 'val')
    (my_digits / 'val').symlink_to('train')
    with input_error('val'):
        find_split(my_digits)


# --- what is no regular file

def test_pipe_as_image(command, pipe, tiny_model):
    path = pipe('a.png')
    result = command('tokens', path, '--out', path.parent / 'out', '--model', tiny_model, timeout=SECONDS)
    assert result.code == 2 and f'image {path} is a pipe' in result.stderr


def test_what_is_no_regular_file_among_images(command, segment_command, my_model, my_segment_model, pipe, tmp_path):
    """Each has its error, named in a folder or by itself, and the others go on."""
    (tmp_path / 'images').mkdir()
    path = pipe('images/pipe.png')
    Image.new('RGB', (32, 32)).save(tmp_path / 'images' / 'a.png')
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / 'images' / 'socket.png'))
        for run, words in (
                (command, ['predict', '--model', my_model]),
                (segment_command, ['segment', 'predict', '--model', my_segment_model, '--out', tmp_path / 'out'])):
            result = run(*words, '--jsonl', path.parent, '/dev/zero', path, timeout=SECONDS)
            assert (result.code, result.lines) == (1, ['vt-zoo: error: 4 of 5 images could not be used'])
            errors = [json.loads(line).get('error') for line in result.stdout.splitlines()]
            assert errors[0] is None
            for error, kind in zip(errors[1:], ('pipe', 'socket', 'device', 'pipe')):
                assert f'is a {kind}' in error


def test_each_image_is_predicted_once(few_digits, tmp_path, caplog):
    """Links in a folder lead to it, to files in it, twice to one elsewhere; what they lead to comes once."""
    root, elsewhere = tmp_path / 'root', tmp_path / 'elsewhere'
    for path in (root / 'b.png', root / 'sub' / 'c.png', root / '.hidden' / 'd.png', elsewhere / 'e.png'):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(next((few_digits / 'val' / '0').iterdir()), path)
    for name, target in {
            'a.png': 'sub/c.png', 'd.png': '.hidden/d.png', 'sub/up': root, 'sub/sub': '.',
            'e.png': elsewhere / 'e.png', 'f.png': elsewhere / 'e.png', 'g': elsewhere,
            'gone.png': 'nothing.png'}.items():
        (root / name).symlink_to(target)
    with caplog.at_level(logging.WARNING):
        names = [source.name for source in image_stream.find_images([str(root)])]
    assert names == ['b.png', 'd.png', 'e.png', 'gone.png', 'sub/c.png']
    assert [r.getMessage() for r in caplog.records] == [  # a.png, f.png, g/e.png, sub/sub and sub/up
        f'5 links to what {root} has already left out, as {root / "a.png"}']


def test_pipe_in_a_class_folder(my_digits, caplog):
    os.mkfifo(my_digits / 'train' / '0' / 'a.png')
    with caplog.at_level(logging.WARNING):
        assert len(find_split(my_digits).train) == 36
    assert any('a.png is a pipe' in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize('name', ['images/train/00000.png', 'masks/train/00000.png', 'classes.txt'])
def test_pipe_in_a_segmentation_set(segment_command, my_composed, segment_arguments, pipe, tmp_path, name):
    path = pipe(my_composed.relative_to(tmp_path) / name)
    result = segment_command(
        'segment', 'train', '--data-dir', my_composed, *segment_arguments, '--out', tmp_path / 'run', timeout=SECONDS)
    check_refused(result, f'{path} is a pipe')
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('words, name', [
    (['convert', 'a.safetensors', '--out', 'b'], 'a.safetensors'), (['convert', 'a.pth', '--out', 'b'], 'a.pth'),
    (['segment', 'train', '--data-dir', '.', '--config', 'a.yaml'], 'a.yaml'),
    (['predict', 'a.png', '--model', 'm'], 'm/config.json'),
    (['tokens', 'a.png', '--out', 'o', '--model', 'm'], 'm/config.json'),
    (['quantize', 'a.onnx', '--images', '.', '--out', 'b.onnx'], 'a.onnx')])
def test_pipe_as_file(command, pipe, tiny_model, tmp_path, words, name):
    shutil.copytree(tiny_model, tmp_path / 'm')
    check_refused(command(*words, cwd=pipe(name).parents[len(Path(name).parts) - 1], timeout=SECONDS), Path(name).name)


def test_pipe_as_checkpoint_of_a_run(command, few_digits, tiny_arguments, pipe, tmp_path):
    (tmp_path / 'run').mkdir()
    pipe('run/checkpoint.safetensors')
    words = ['finetune', few_digits, *tiny_arguments, '--resume', '--out', tmp_path / 'run']
    check_refused(command(*words, timeout=SECONDS), 'is a pipe')


# --- two processes at one place

def test_finetune_waits_for_nobody_who_is_gone(command, few_digits, tiny_arguments, tiny_run, holder, tmp_path):
    out = tmp_path / 'run'
    out.mkdir()
    words = ['finetune', few_digits, *tiny_arguments, '--out', out]
    process = holder(out / '.lock')
    for refused in ([*words], [*words, '--resume'], [*words, '--overwrite'], ['quickstart', '--out', out]):
        check_refused(command(*refused), f'{out} is being written by another process')
    assert os.listdir(out) == ['.lock']
    process.kill()
    process.wait()
    assert command(*words).code == 0
    assert weights(out) == weights(tiny_run.out)
    assert sorted(os.listdir(out)) == ['history.csv', 'model']


@pytest.mark.parametrize('words, name', [
    (['export', 'MODEL', '--format', 'torchscript', '--out', 'a.pt'], 'a.pt'),
    (['publish', 'MODEL', '--repo-id', 'a/b', '--dry-run', '--out', 'a'], 'a'),
    (['convert', 'MODEL/model.safetensors', '--model', 'test_vt_resnet', '--out', 'a'], 'a'),
    (['segment', 'digits', 'a', '--train', '1', '--val', '1'], 'a')])
def test_file_or_folder_that_another_writes(command, tiny_model, holder, tmp_path, words, name):
    (tmp_path / f'.{name}.tmp').mkdir()
    process = holder(tmp_path / f'.{name}.tmp' / '.lock')
    words = [word.replace('MODEL', str(tiny_model)) for word in words]
    check_refused(command(*words, cwd=tmp_path), f'{name} is being written by another process')
    assert os.listdir(tmp_path) == [f'.{name}.tmp']
    process.kill()
    process.wait()
    result = command(*words, cwd=tmp_path)
    assert result.code == 0, result.stderr
    assert os.listdir(tmp_path) == [name]


def test_what_was_written_since_the_caller_looked_stays(tmp_path):
    (tmp_path / 'a').write_text('theirs')
    with pytest.raises(InputError, match='there already'), whole(tmp_path / 'a', replace=False):
        raise AssertionError
    assert tree(tmp_path) == {'a': b'theirs'}


def test_folder_of_a_run_that_wrote_nothing_is_gone(tmp_path):
    with pytest.raises(KeyError), run_folder(tmp_path / 'a' / 'b'):
        assert os.listdir(tmp_path / 'a' / 'b') == ['.lock']
        raise KeyError
    assert os.listdir(tmp_path) == []


# --- numbers

def numeric_options():
    """Each option with a number of each command, as (command's parser, option)."""
    def walk(parser, words):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, child in action.choices.items():
                    yield from walk(child, [*words, name])
            elif action.type is not None and action.type.__module__ == 'vt_zoo.cli.arguments':
                yield pytest.param(parser, action, id=' '.join([*words, action.option_strings[0]]))
    return list(walk(create_parser(), []))


@pytest.mark.parametrize('parser, action', numeric_options())
def test_numbers_that_are_slips(parser, action):
    for text in HUGE:
        with pytest.raises(argparse.ArgumentTypeError) as info:
            action.type(text)
        assert len(str(info.value)) < 300


@pytest.mark.parametrize('name', [
    'num_tokens', 'token_dim', 'pyramid_channels', 'head_channels', 'iterations', 'batch_size', 'lr', 'momentum',
    'weight_decay', 'power', 'steps', 'warmup', 'crop_size', 'scale', 'hflip', 'mean', 'std', 'eval_size', 'eval_every',
    'checkpoint_every', 'ema_decay', 'seed'])
def test_numbers_of_a_recipe_that_are_slips(name, input_error):
    length = {'steps': 1, 'crop_size': 2, 'scale': 2, 'mean': 3, 'std': 3}.get(name)
    for value in (10 ** 20, 10 ** 400, -10 ** 20, -1.0, math.nan, math.inf, -math.inf):
        with input_error(name):
            SegmentSettings.read(None, {name: [value, *[1] * (length - 1)] if length else value})


@pytest.mark.parametrize('text', ['9' * 5000, '[' * 5000, '2020-13-45', '[.inf, 1, 1]', '[.nan, 1, 1]'])
def test_yaml_that_is_a_slip(segment_command, tmp_path, text):
    for name in ('--std', '--batch-size'):
        check_refused(segment_command('segment', 'train', '--data-dir', tmp_path, name, text))
    (tmp_path / 'a.yaml').write_text(f'std: {text}\n')
    check_refused(segment_command('segment', 'train', '--data-dir', tmp_path, '--config', tmp_path / 'a.yaml'))


def test_batches_of_more_pixels_than_a_machine_holds(input_error):
    SegmentSettings(batch_size=1024, crop_size=(1024, 1024))
    with input_error('batch_size must be at most 1024'):
        SegmentSettings(batch_size=1025, crop_size=(1024, 1024))


@pytest.mark.parametrize('words', [['--size', 999999999], ['--train', 999999999], ['--val', 10 ** 20]])
def test_digits_of_slips(command, tmp_path, words):
    check_refused(command('segment', 'digits', tmp_path / 'a', *words, timeout=SECONDS))
    assert files(tmp_path) == []


def test_memory_that_does_not_suffice(monkeypatch, capsys):
    monkeypatch.setattr('vt_zoo.cli.predict.load_classifier', lambda *args: torch.empty(2 ** 60))
    assert main(['predict', 'a.png', '--model', 'a']) == 2
    assert 'memory' in capsys.readouterr().err


# --- how Python was started

def test_help_without_docstrings(monkeypatch):
    text = create_parser().format_help()
    for module in COMMANDS.values():
        monkeypatch.setattr(module, '__doc__', None)
    assert create_parser().format_help() == text


@pytest.mark.slow
def test_commands_without_docstrings_and_asserts(
        few_digits, tiny_arguments, tiny_model, composed, segment_arguments, tmp_path):
    picture = next((few_digits / 'val' / '0').iterdir())
    commands = [
        ['models'], ['recipe', 'plain'], ['predict', picture, '--model', tiny_model],
        ['tokens', picture, '--model', tiny_model, '--out', 'tokens'],
        ['convert', tiny_model / 'model.safetensors', '--model', 'test_vt_resnet', '--out', 'converted'],
        ['export', tiny_model, '--format', 'torchscript', '--out', 'a.pt'],
        ['publish', tiny_model, '--repo-id', 'a/b', '--dry-run', '--out', 'published'],
        ['finetune', few_digits, *tiny_arguments, '--out', 'finetuned'],
        ['segment', 'train', '--data-dir', composed, *segment_arguments, '--out', 'segmented']]
    code = (
        'import sys\nfrom vt_zoo.cli.main import main\n'
        'codes = [main(words.split("|")) for words in sys.argv[1:]]\nprint("codes", *codes)')
    result = subprocess.run(
        [sys.executable, '-OO', '-c', code, *('|'.join(map(str, words)) for words in commands)],
        cwd=tmp_path, capture_output=True, text=True)
    # segmentation_models_pytorch needs docstrings
    assert result.stdout.splitlines()[-1:] == ['codes' + (len(commands) - 1) * ' 0' + ' 2'], result.stderr
    assert 'docstrings' in result.stderr and not (tmp_path / 'segmented').exists()


@pytest.mark.slow
def test_policy_that_timm_asserts(few_digits, tmp_path):
    words = ['finetune', few_digits, '--model', 'test_vt_resnet', '--aa', 'nosuchpolicy', '--out', tmp_path / 'run']
    result = subprocess.run([sys.executable, '-O', '-m', 'vt_zoo', *words], capture_output=True, text=True)
    assert result.returncode == 2 and "'nosuchpolicy'" in result.stderr and 'Traceback' not in result.stderr


@pytest.mark.parametrize('words, code, closed', [
    pytest.param(['recipe', 'plain'], 0, '>&-', marks=pytest.mark.slow),
    pytest.param(['recipe', 'plain'], 0, '2>&-', marks=pytest.mark.slow),
    (['predict', 'no.png', '--model', 'no'], 2, '2>&-')])
def test_closed_streams(words, code, closed):
    shell = f'"$0" -m vt_zoo "$@" {closed}'
    result = subprocess.run(['sh', '-c', shell, sys.executable, *words], capture_output=True, text=True)
    assert result.returncode == code
    assert 'Traceback' not in result.stderr
    assert ('plain.yaml' in result.stdout) == (code == 0 and closed[:3] != '>&-')


def test_training_with_closed_streams(few_digits, tiny_arguments, tiny_run, tmp_path):
    shell = '"$0" -m vt_zoo finetune "$@" >&- 2>&- <&-'
    words = [few_digits, *tiny_arguments, '--out', tmp_path / 'run']
    assert subprocess.run(['sh', '-c', shell, sys.executable, *words]).returncode == 0
    assert weights(tmp_path / 'run') == weights(tiny_run.out)

"""`vt-zoo segment`: what it prints, and one sentence and an exit code for each input that cannot be used."""
import csv
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import WRITTEN, check_interrupted, check_refused, files, interrupt_at_checkpoint, outcome, tree
from PIL import Image

from vt_zoo.data.composed_digits import CLASSES
from vt_zoo.segmentation.settings import SegmentSettings
from vt_zoo.weights import load

OPTIONAL = ['segmentation_models_pytorch', 'accelerate', 'torchmetrics']
# makes a package one that is not installed
WITHOUT = '''
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
PathFinder.find_spec = lambda name, *args: None if name == {!r} else find_spec(name, *args)
'''

# words after `segment train --data-dir DIR`, and what the sentence says
BAD_TRAINING = {
    'unknown recipe': (['--config', 'no_such_recipe'], ['no_such_recipe', *SegmentSettings.recipes()]),
    'unknown architecture': (['--arch', 'unet'], ['arch', "'unet'", 'vt_fpn, panoptic_fpn']),
    'unknown encoder': (['--encoder-name', 'tu-no_such'], ["'tu-no_such'"]),
    'word for a number': (['--iterations', 'many'], ['iterations', "'many'", 'whole number']),
    'rate too high': (['--lr', '1e6', '--checkpoint-every', '8', '--eval-every', '8'], ['the loss became', 'lower lr']),
    'no YAML': (['--crop-size', '[32'], ['crop_size', "'[32'"]),
    'another layout': (['--format', 'coco_stuff'], ['train2017', 'does not exist']),
    'unknown word': (['--no-such-word'], ['--no-such-word']),
}


@pytest.fixture(scope='module')
def train_words(composed, segment_arguments):
    return ['segment', 'train', '--data-dir', composed, *segment_arguments]


@pytest.fixture(scope='module')
def picture(composed):
    return composed / 'images' / 'val' / '00000.png'


def test_help_names_the_recipes(command):
    assert all(name in command('segment', 'train', '--help').stdout for name in SegmentSettings.recipes())


def test_train_by_a_recipe(segment_command, composed, picture, segment_settings, segment_run, tmp_path):
    (tmp_path / 'recipe.yaml').write_text(yaml.safe_dump(segment_settings))
    result = segment_command(
        'segment', 'train', '--config', 'recipe.yaml', '--data-dir', composed, '--device', 'cpu', cwd=tmp_path)
    assert (result.code, result.lines) == (0, [])
    assert sorted(os.listdir(tmp_path / 'vt_zoo_segment')) == WRITTEN
    assert outcome(tmp_path / 'vt_zoo_segment') == outcome(segment_run.out)
    lines = [line for line in result.stdout.splitlines() if line.startswith('iteration')]
    assert [line.split(':')[0] for line in lines] == ['iteration 4', 'iteration 8']
    last = segment_run.result.last
    miou, accuracy = f'{100 * last.miou:.2f} %', f'{100 * last.pixel_accuracy:.2f} %'
    assert f'mIoU {miou}, pixel accuracy {accuracy}' in lines[-1]
    summary = dict(line.split(None, 1) for line in result.stdout.splitlines() if not line.startswith('iteration'))
    assert summary['mIoU'].startswith(f'{miou} after the last iteration')
    assert summary['best'] == f'{100 * segment_run.result.best_miou:.2f} %'
    assert summary['models'] == 'vt_zoo_segment/last, vt_zoo_segment/best'
    program, *words = summary['use'].replace('IMAGE', str(picture)).split()
    assert program == 'vt-zoo'
    assert segment_command(*words, cwd=tmp_path).code == 0
    assert sorted(os.listdir(tmp_path / 'vt_zoo_segmented')) == ['00000_classes.png', '00000_overlay.png']


def test_options_replace_the_recipes_values(segment_command, composed, segment_settings, tmp_path):
    (tmp_path / 'recipe.yaml').write_text(yaml.safe_dump(segment_settings))
    result = segment_command(
        'segment', 'train', '--config', tmp_path / 'recipe.yaml', '--data-dir', composed, '--out', tmp_path / 'run',
        '--iterations', '1', '--arch', 'panoptic_fpn', '--eval-size', '40', '36', '--mean', '[.1, 2e-1, 0.3]',
        '--crop-size', '32', '36', '--std', '.5', '0.5', '5e-1', '--scale', '0.5', '2', '--steps', '1', '2',
        '--lr', '1e-3', '--precision', 'no', '--workers', '0', '--device', 'cpu')
    assert result.code == 0, result.stderr
    loaded = load(tmp_path / 'run' / 'last')
    assert type(loaded.model).__name__ == 'PanopticFPN'
    assert (loaded.eval_size, loaded.preprocessing['mean']) == ((40, 36), (0.1, 0.2, 0.3))


@pytest.mark.parametrize('words, holds', BAD_TRAINING.values(), ids=BAD_TRAINING)
def test_train_with_words_that_cannot_be_used(segment_command, train_words, tmp_path, words, holds):
    result = segment_command(*train_words, '--out', tmp_path / 'run', *words)
    check_refused(result, *holds)
    assert len(result.lines) == 1
    assert result.stdout == '' or 'the loss became' in result.lines[0], 'of what is found before the first iteration'
    assert files(tmp_path) == []


@pytest.mark.parametrize('place', ['file', 'file/run', '/proc/no_such_place', '/proc'])
def test_train_into_a_place_that_cannot_be_written(segment_command, train_words, tmp_path, place):
    (tmp_path / 'file').write_text('mine')
    check_refused(segment_command(*train_words, '--out', tmp_path / place), tmp_path / place)
    assert tree(tmp_path) == {'file': b'mine'}


@pytest.mark.parametrize('words', [[], ['--resume', '--seed', '1']])
def test_train_into_a_finished_run(segment_command, train_words, segment_run, words):
    before = tree(segment_run.out)
    result = segment_command(*train_words, '--out', segment_run.out, *words)
    check_refused(result, '--overwrite', *(['seed = 0 instead of 1'] if words else []))
    assert tree(segment_run.out) == before


def test_resuming_a_finished_training(segment_command, train_words, segment_run):
    before = tree(segment_run.out)
    result = segment_command(*train_words, '--out', segment_run.out, '--resume')
    assert (result.code, result.stderr) == (0, '')
    assert 'finished' in result.stdout and str(segment_run.out / 'last') in result.stdout
    assert tree(segment_run.out) == before


@pytest.mark.parametrize('word', ['false', 'False'])
def test_yes_or_no_as_yaml_has_it(segment_command, train_words, segment_run, word):
    result = segment_command(*train_words, '--out', segment_run.out, '--resume', '--encoder-weights', word)
    assert (result.code, result.stderr) == (0, '')


def test_train_on_a_full_disk(segment_command, train_words, segment_run, tmp_path, limit_file_size):
    check_refused(segment_command(*train_words, '--out', tmp_path / 'run', before=limit_file_size(1_000_000)))
    assert files(tmp_path) == []
    assert segment_command(*train_words, '--out', tmp_path / 'run').code == 0
    assert outcome(tmp_path / 'run') == outcome(segment_run.out)


def test_disk_that_is_full_in_the_middle(
        segment_command, signal_at, train_words, segment_run, tmp_path, limit_file_size):
    """Space for best/, but not for the checkpoint that comes before it."""
    out = tmp_path / 'run'
    size = (segment_run.out / 'best' / 'model.safetensors').stat().st_size + 10_000
    before = signal_at('vt_zoo.training.loop.seed_of', 4, signal.SIGINT)
    check_interrupted(segment_command(*train_words, '--out', out, before=before))
    checkpoint = (out / 'checkpoint.safetensors').read_bytes()
    check_refused(segment_command(*train_words, '--out', out, '--resume', before=limit_file_size(size)))
    assert sorted(os.listdir(out)) == ['checkpoint.safetensors']
    assert (out / 'checkpoint.safetensors').read_bytes() == checkpoint
    assert segment_command(*train_words, '--out', out, '--resume').code == 0
    assert outcome(out) == outcome(segment_run.out)


@pytest.mark.parametrize('function, call, left', [
    ('os.replace', 1, []),
    ('vt_zoo.training.loop.seed_of', 3, ['checkpoint.safetensors']),
    ('os.replace', 3, ['checkpoint.safetensors']),
    ('os.replace', 4, ['best', 'checkpoint.safetensors']),
    ('vt_zoo.segmentation.train.write_history', 1, ['best', 'checkpoint.safetensors', 'last']),
])
def test_ctrl_c(segment_command, signal_at, train_words, segment_run, tmp_path, function, call, left):
    out = tmp_path / 'run'
    result = segment_command(*train_words, '--out', out, before=signal_at(function, call, signal.SIGINT))
    check_interrupted(result)
    assert sorted(os.listdir(out) if out.exists() else []) == left
    assert (len(result.lines) == 2 and f'kept in {out}, go on with --resume' in result.lines[0]) == bool(left)
    assert segment_command(*train_words, '--out', out, '--resume').code == 0
    assert outcome(out) == outcome(segment_run.out)


def test_ctrl_c_with_workers(segment_command, signal_at, train_words, tmp_path):
    before = signal_at('vt_zoo.training.loop.seed_of', 5, signal.SIGINT)
    check_interrupted(segment_command(*train_words, '--workers', 2, '--out', tmp_path / 'run', before=before))


@pytest.mark.slow
def test_ctrl_c_with_workers_in_a_real_process(segment_command, train_words, tmp_path):
    out = tmp_path / 'run'
    words = [*train_words, '--workers', '2', '--iterations', '10000', '--out']
    stderr = interrupt_at_checkpoint(words, out)
    assert stderr.endswith(f'the last checkpoint is kept in {out}, go on with --resume\nvt-zoo: interrupted\n')
    assert {'checkpoint.safetensors'} <= set(os.listdir(out)) <= {'checkpoint.safetensors', 'best'}


def test_eval_as_json(segment_command, segment_run, composed):
    measures = segment_run.result.last
    result = segment_command('segment', 'eval', '--model', segment_run.out, '--data-dir', composed, '--json')
    assert (result.code, result.lines) == (0, [])
    printed = json.loads(result.stdout)
    assert printed == {
        'images': 3, 'miou': measures.miou, 'pixel_accuracy': measures.pixel_accuracy,
        'iou': dict(zip(CLASSES, measures.iou))}
    assert None in printed['iou'].values(), 'a class is absent'
    words = ['--model', segment_run.out, '--data-dir', composed, '--split', 'train', '--json']
    assert json.loads(segment_command('segment', 'eval', *words).stdout)['images'] == 7


def test_eval_as_a_table(segment_command, segment_run, composed):
    measures = segment_run.result.last
    result = segment_command('segment', 'eval', '--model', segment_run.out, '--data-dir', composed, '--workers', '2')
    assert (result.code, result.lines) == (0, [])
    *rows, last = result.stdout.splitlines()
    assert [row.split()[0] for row in rows] == CLASSES
    for row, iou in zip(rows, measures.iou):
        assert row.split()[1:] == (['absent'] if iou is None else [f'{100 * iou:.2f}', '%'])
    assert last == (f'mIoU {100 * measures.miou:.2f} %, pixel accuracy {100 * measures.pixel_accuracy:.2f} %, 3 images')


@pytest.mark.parametrize('classes, words', [
    ([*CLASSES[:-1], 'nine'], ['9', 'nine']), ([f'class number {i}' for i in range(200)], ['class number 0'])])
def test_eval_on_other_classes(segment_command, segment_model, my_composed, classes, words):
    (my_composed / 'classes.txt').write_text('\n'.join(classes))
    result = segment_command('segment', 'eval', '--model', segment_model, '--data-dir', my_composed)
    check_refused(result, segment_model, my_composed, *words)


@pytest.mark.parametrize('words, holds', [
    (['--format', 'voc'], ["'voc'", 'coco_stuff']),
    (['--format', 'lip'], ['TrainVal_images', 'does not exist']),
    (['--split', 'test'], ['test', 'train']),
    (['--data-dir', 'no_such_folder'], ['no_such_folder', 'does not exist']),
    (['--model', 'no_such_model'], ['no_such_model', 'does not exist']),
])
def test_eval_with_words_that_cannot_be_used(segment_command, segment_model, composed, words, holds):
    result = segment_command('segment', 'eval', '--model', segment_model, '--data-dir', composed, *words)
    check_refused(result, *holds)
    assert result.stdout == ''


def test_predict(segment_command, segment_model, composed, tmp_path):
    images = sorted((composed / 'images' / 'val').iterdir())
    result = segment_command('segment', 'predict', *images, '--model', segment_model, '--out', 'new/out', cwd=tmp_path)
    assert (result.code, result.lines) == (0, [])
    assert result.stdout.splitlines() == [
        f'new/out/{p.stem}_overlay.png  new/out/{p.stem}_classes.png' for p in images]
    for line in result.stdout.splitlines():
        overlay, classes = (Image.open(tmp_path / name) for name in line.split())
        assert (overlay.mode, classes.mode, classes.size) == ('RGB', 'P', (48, 48))
        assert np.asarray(classes).max() <= 10


@pytest.mark.parametrize('make, words', [
    (lambda folder: folder / 'missing.png', ['missing.png', 'does not exist']),
    (lambda folder: folder, ['holds no images']),
    (lambda folder: (folder / 'note.png').write_text('Hello') and folder / 'note.png', ['note.png', 'not an image']),
    (lambda folder: Image.new('RGB', (48, 48)).save(folder / '00000.jpg') or folder / '00000.jpg',
     ['00000.jpg', 'same name']),
])
def test_predict_of_a_file_that_cannot_be_used(segment_command, picture, segment_model, tmp_path, make, words):
    bad, out = make(tmp_path), tmp_path / 'out'
    result = segment_command('segment', 'predict', picture, bad, '--model', segment_model, '--out', out)
    check_refused(result, '1 of 2 images', code=1)
    good, name, error = result.stdout.splitlines()
    assert (good, name) == (f'{out}/00000_overlay.png  {out}/00000_classes.png', str(bad))
    assert error.startswith('  error: ') and all(word in error for word in words)
    assert sorted(p.name for p in out.iterdir()) == ['00000_classes.png', '00000_overlay.png']


@pytest.mark.parametrize('place', ['file', 'file/run', '/proc/no_such_place'])
def test_predict_into_a_place_that_cannot_be_written(segment_command, picture, segment_model, tmp_path, place):
    (tmp_path / 'file').write_text('mine')
    result = segment_command('segment', 'predict', picture, '--model', segment_model, '--out', tmp_path / place)
    check_refused(result, tmp_path / place)
    assert tree(tmp_path) == {'file': b'mine'}


def test_predict_onto_a_full_disk(segment_command, picture, segment_model, tmp_path, limit_file_size):
    result = segment_command(
        'segment', 'predict', picture, '--model', segment_model, '--out', tmp_path / 'out', before=limit_file_size(300))
    check_refused(result, tmp_path / 'out')
    assert files(tmp_path) == []


def test_predict_without_a_model(segment_command, picture, tiny_model, tmp_path):
    check_refused(segment_command('segment', 'predict', picture), '--model')
    result = segment_command('segment', 'predict', picture, '--model', tiny_model, '--out', tmp_path / 'out')
    check_refused(result, tiny_model, 'is a classifier', 'but a segmenter is needed')


def test_no_action(command):
    check_refused(command('segment'), 'ACTION')


@pytest.mark.parametrize('action, package', [
    ('train', 'segmentation_models_pytorch'), ('eval', 'torchmetrics'),
    ('predict', 'segmentation_models_pytorch')])
def test_missing_package(command, composed, picture, segment_model, segment_arguments, tmp_path, package, action):
    words = {
        'train': ['--data-dir', composed, *segment_arguments, '--out', tmp_path / 'out'],
        'eval': ['--data-dir', composed, '--model', segment_model],
        'predict': [picture, '--model', segment_model, '--out', tmp_path / 'out']}[action]
    result = command('segment', action, *words, before=WITHOUT.format(package))
    check_refused(result, f"segmentation needs {package}: pip install 'vt_zoo[segmentation]'")
    assert len(result.lines) == 1
    assert files(tmp_path) == []


def test_optional_packages_are_imported_where_they_are_used(forks):
    code = 'import vt_zoo.cli; vt_zoo.cli.main(["models", "--json"]); import sys; print(*sys.modules, file=sys.stderr)'
    result = forks.run(code)
    assert result.code == 0
    imported = result.stderr.split()
    assert 'vt_zoo' in imported
    assert not {*OPTIONAL, 'matplotlib', 'sklearn', 'vt_zoo.models.vt_fpn', 'vt_zoo.segmentation.train'} & set(imported)


def test_folder_of_a_run_is_its_last_model(segment_command, picture, segment_run, tmp_path):
    for name, folder in {'run': segment_run.out, 'last': segment_run.out / 'last'}.items():
        words = ('segment', 'predict', picture, '--model', folder, '--out', tmp_path / name)
        assert segment_command(*words).code == 0
    assert files(tmp_path / 'run') == files(tmp_path / 'last')


def test_segmenter_where_a_classifier_is_needed(segment_command, picture, segment_run):
    result = segment_command('predict', picture, '--model', segment_run.out)
    check_refused(result, segment_run.out, 'is a segmenter', 'but a classifier is needed')


def test_interrupted_prediction_leaves_whole_files(segment_command, signal_at, composed, segment_model, tmp_path):
    images = sorted((composed / 'images' / 'train').iterdir())
    before = signal_at('os.replace', 4, signal.SIGINT)
    result = segment_command(
        'segment', 'predict', *images, '--model', segment_model, '--out', tmp_path / 'out', before=before)
    check_interrupted(result)
    assert files(tmp_path) == [
        f'out/{name}' for name in ('00000_classes.png', '00000_overlay.png', '00001_overlay.png')]


def test_predict_of_a_folder_in_each_form(segment_command, segment_model, composed, tmp_path):
    images = sorted((composed / 'images').rglob('*.png'))
    names = [str(path.relative_to(composed / 'images')) for path in images]
    expected = [
        {'image': str(path), **{k: f'{tmp_path}/out/{n[:-4]}_{k}.png' for k in ('overlay', 'classes')}}
        for path, n in zip(images, names)]
    read = {
        'json': json.loads, 'jsonl': lambda out: [json.loads(line) for line in out.splitlines()],
        'csv': lambda out: [{k: v for k, v in row.items() if k != 'error'} for row in csv.DictReader(out.splitlines())]}
    for form in read:
        result = segment_command(
            'segment', 'predict', composed / 'images', '--model', segment_model, '--out', tmp_path / 'out',
            '--batch-size', 4, f'--{form}')
        found = read[form](result.stdout)
        assert found == expected
    assert all(Path(entry[kind]).exists() for entry in expected for kind in ('overlay', 'classes'))

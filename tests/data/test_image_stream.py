"""Many images: what is found, how far ahead files are opened, and what `vt-zoo predict` prints while it goes on."""
import csv
import json
import os
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from helpers import change_config, load_folder
from PIL import Image
from timm.data import create_transform, resolve_data_config

from vt_zoo.data.image_stream import Source, find_images, open_images
from vt_zoo.weights.files import write_model

NOT_UTF8 = os.fsdecode(b'caf\xe9.png')
LABELS = ['Straße', '猫', os.fsdecode(b'caf\xe9')]


@pytest.fixture
def tree(few_digits, tmp_path):
    """A folder with images at two depths, one of a name that is not UTF-8, a damaged one, and what is left out."""
    image, root = sorted((few_digits / 'val' / '1').iterdir())[0], tmp_path / 'tree'
    for name in ('b.PNG', 'a.png', NOT_UTF8, 'sub/a.png', 'sub/deep/a.jpeg', '.hidden/a.png', '._a.png', 'note.txt'):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, root / name)
    (root / 'sub' / 'bad.png').write_bytes(b'no image')
    (root / 'empty').mkdir()
    (root / 'sub' / 'loop').symlink_to(root)
    return root


IN_ORDER = ['a.png', 'b.PNG', NOT_UTF8, 'sub/a.png', 'sub/bad.png', 'sub/deep/a.jpeg']


@pytest.fixture
def feed(monkeypatch, tmp_path):
    """Makes bytes this process's standard input."""
    def give(content):
        (tmp_path / 'list').write_bytes(content)
        monkeypatch.setattr('sys.stdin', (tmp_path / 'list').open('rb'))
    return give


def test_a_folder_is_read_to_its_depth(tree):
    assert list(find_images([str(tree)])) == [Source(f'{tree}/{name}', name) for name in IN_ORDER]


def test_files_and_folders_without_images(tree):
    assert list(find_images(['x/y.png', str(tree / 'empty')])) == [
        Source('x/y.png', 'y.png'), Source(f'{tree}/empty', 'empty', f'folder {tree}/empty holds no images')]


@pytest.mark.parametrize('text, paths', [
    (b'a.png\nb c.png\n', ['a.png', 'b c.png']), (b'a.png\r\n\r\n \r\nb.png', ['a.png', 'b.png']), (b'', []),
    (b'\n', []), (b'\xef\xbb\xbfa.png\n', ['a.png']),
    (b'caf\xe9.png\ncaf\xc3\xa9.png', [NOT_UTF8, os.fsdecode(b'caf\xc3\xa9.png')]),
    (b'x' * 200_000 + b'\ny', ['x' * 200_000, 'y'])])
def test_paths_on_standard_input(feed, text, paths):
    feed(text)
    assert [source.path for source in find_images(['-'])] == paths


def test_folders_on_standard_input(feed, tree):
    feed(f'{tree}/sub/deep\n{tree}/a.png\n'.encode())
    assert [s.name for s in find_images(['-'])] == ['a.jpeg', 'a.png']


@pytest.mark.parametrize('stdin', [None, 'closed'])
def test_closed_standard_input(monkeypatch, feed, input_error, stdin):
    feed(b'')
    sys.stdin.close()
    monkeypatch.setattr('sys.stdin', sys.stdin if stdin else None)
    with input_error('standard input is closed'):
        list(find_images(['-']))


@pytest.mark.parametrize('batch_size, workers', [(1, 1), (4, 2), (100, 3)])
def test_files_are_opened_in_order_and_not_far_ahead(tree, batch_size, workers):
    taken = []

    def sources():
        for i in range(20):
            taken.append(i)
            yield Source(str(tree / ('a.png' if i % 3 else 'sub/bad.png')), str(i))

    seen = []
    for batch in open_images(sources(), lambda image: image.size, batch_size, workers):
        seen += batch
        assert 1 <= len(batch) <= batch_size
        assert len(taken) <= len(seen) + batch_size
    assert [o.source.name for o in seen] == list(map(str, range(20)))
    assert all((o.error is None) == (o.content is not None) == bool(i % 3) for i, o in enumerate(seen))


def predictions(command, model, tree, form, *words):
    result = command('predict', tree, '--model', model, '--top', 2, *form, *words)
    assert (result.code, result.lines) == (1, [
        f'vt-zoo: WARNING: 1 link to what {tree} has already left out, as {tree / "sub" / "loop"}',
        'vt-zoo: error: 1 of 6 images could not be used'])
    return result.stdout


def test_forms_say_the_same(command, tiny_model, tree):
    listed = json.loads(predictions(command, tiny_model, tree, ['--json']))
    assert [entry['image'] for entry in listed] == [f'{tree}/{name}' for name in IN_ORDER]
    assert listed[4] == {'image': f'{tree}/sub/bad.png', 'error': f'image {tree}/sub/bad.png cannot be read: '
                         'it is not an image'}
    lines = predictions(command, tiny_model, tree, ['--jsonl'], '--batch-size', 1, '--workers', 1).splitlines()
    for line, entry in zip(map(json.loads, lines), listed):
        assert line['image'] == entry['image'] and line.get('error') == entry.get('error')
        for ours, theirs in zip(line.get('top', []), entry.get('top', [])):
            assert ours == {**theirs, 'probability': pytest.approx(theirs['probability'], abs=1e-5)}
    rows = list(csv.DictReader(predictions(command, tiny_model, tree, ['--csv'], '--workers', 3).splitlines()))
    assert len(lines) == len(rows) == len(listed)
    for row, entry in zip(rows, listed):
        assert row['error'] == entry.get('error', '')
        assert [row[f'{key}_2'] for key in ('index', 'label', 'probability')] == (
            list(map(str, entry['top'][1].values())) if 'top' in entry else [''] * 3)
    assert rows[2]['image'] == f'{tree}/caf\\udce9.png'  # as the console can print it


@pytest.fixture
def picture_of(few_digits):
    return sorted((few_digits / 'val' / '1').iterdir())[0]


def test_no_path_on_standard_input(command, tiny_model):
    result = command('predict', '-', '--model', tiny_model)  # its standard input is empty
    assert (result.code, result.stdout) == (2, '')
    assert result.lines == ['vt-zoo: error: no image is named on standard input']


def start(model, *words):
    return subprocess.Popen(
        [sys.executable, '-m', 'vt_zoo', 'predict', *words, '--model', model, '--top', '1', '--device', 'cpu'],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_results_come_at_once_and_a_kill_leaves_whole_lines(tiny_model, picture_of):
    """Of paths that come one by one, and of fewer than a batch."""
    with start(tiny_model, '-', '--jsonl') as process:
        for _ in range(2):
            process.stdin.write(f'{picture_of}\n'.encode())
            process.stdin.flush()
            assert json.loads(process.stdout.readline())['image'] == str(picture_of)
        process.stdin.write(f'{picture_of}\n'.encode() * 300)
        process.stdin.flush()
        process.stdout.readline()
        process.kill()
        rest = process.stdout.read()
    assert rest.endswith(b'\n') or not rest
    assert all(json.loads(line)['top'] for line in rest.splitlines())


def test_reader_that_goes_away_amid_many(tiny_model, picture_of):
    with start(tiny_model, *[picture_of] * 3000) as process:
        process.stdout.readline()
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b''


@pytest.mark.parametrize('form', [[], ['--csv'], ['--json'], ['--jsonl']])
@pytest.mark.parametrize('encoding', ['ascii', 'cp1252'])
def test_names_that_the_console_cannot_print(command, my_model, picture_of, tmp_path, form, encoding):
    change_config(my_model, label_names=LABELS)
    shutil.copy(picture_of, tmp_path / NOT_UTF8)
    result = command(
        'predict', tmp_path / NOT_UTF8, '--model', my_model, *form,
        before=f'import sys; sys.stdout.reconfigure(encoding={encoding!r})')
    assert (result.code, result.stderr) == (0, '')
    text = result.stdout.encode('utf-8', 'surrogateescape').decode(encoding)
    if form in (['--json'], ['--jsonl']):
        entry = json.loads(text)
        entry, = entry if form == ['--json'] else [entry]
        assert entry['image'] == str(tmp_path / NOT_UTF8)
        assert {top['label'] for top in entry['top']} == set(LABELS)
    else:
        words = 'caf\\udce9.png', '\\u732b', 'Stra\\xdfe' if encoding == 'ascii' else 'Straße'
        assert all(word in text for word in words)


def test_card_and_pictures_of_names_that_are_not_utf8(command, my_model, picture_of, tmp_path):
    change_config(my_model, label_names=LABELS)
    result = command(
        'publish', my_model, '--repo-id', 'a/b', '--out', tmp_path / 'out', '--dry-run',
        before='import sys; sys.stdout.reconfigure(encoding="cp1252")')
    assert result.code == 0, result.stderr
    assert 'Straße, 猫, caf\\udce9' in (tmp_path / 'out' / 'README.md').read_text(encoding='utf-8')
    shutil.copy(picture_of, tmp_path / NOT_UTF8)
    assert command('tokens', tmp_path / NOT_UTF8, '--model', my_model, '--out', tmp_path / 'tokens').code == 0
    assert os.fsdecode(b'caf\xe9_tokens.png') in os.listdir(tmp_path / 'tokens')


@pytest.mark.parametrize('words', [
    ['finetune', 'data', '--model', 'test_vt_resnet'], ['finetune', 'data', '--overwrite'],
    ['convert', 'last.pth.tar'],
    ['export', 'test_vt_resnet', '--format', 'torchscript']])
def test_places_that_libraries_could_not_read(command, few_digits, tmp_path, words):
    """Refused before the work, not after it."""
    shutil.copytree(few_digits, tmp_path / 'data')
    result = command(*words, '--out', tmp_path / os.fsdecode(b'caf\xe9.pt'), cwd=tmp_path)
    assert (result.code, os.listdir(tmp_path)) == (2, ['data'])
    assert result.lines[-1].endswith('caf\\udce9.pt') and 'out must be a name in UTF-8' in result.lines[-1]


@pytest.mark.parametrize('channels', [1, 4, 13])
def test_models_of_other_channels(command, few_digits, tmp_path, channels, picture_of):
    """A grey model sees what timm's train.py showed it; of others the sentence says what can be done."""
    torch.manual_seed(0)
    model = timm.create_model('test_vt_resnet', num_classes=3, in_chans=channels).eval()
    write_model(tmp_path / 'model', model, None, {
        'input_size': (channels, 32, 32), 'mean': (0.4,) * channels, 'std': (0.2,) * channels})
    colour = tmp_path / 'colour.png'
    Image.effect_mandelbrot((50, 40), (-2, -1, 1, 1), 30).convert('RGB').rotate(30, fillcolor='red').save(colour)
    result = command('predict', colour, '--model', tmp_path / 'model', '--json')
    if channels > 1:
        assert (result.code, result.stdout) == (2, '')
        assert result.lines == [f'vt-zoo: error: the model takes images of {channels} channels, but an image file '
                                'gives 1 (grey) or 3 (RGB)']
        result = command('tokens', colour, '--model', tmp_path / 'model', '--out', tmp_path / 'out')
        assert (result.code, len(result.lines), (tmp_path / 'out').exists()) == (2, 1, False)
        return
    data_config = resolve_data_config({}, model=load_folder(tmp_path / 'model'))
    with torch.inference_mode():
        x = create_transform(**data_config)(Image.open(colour).convert('L'))[None]
        expected = model(x).softmax(-1)[0].sort(descending=True).values.tolist()
    assert [top['probability'] for top in json.loads(result.stdout)[0]['top']] == pytest.approx(expected, abs=1e-5)
    assert command('tokens', colour, '--model', tmp_path / 'model', '--out', tmp_path / 'out').code == 0
    run = command(
        'finetune', few_digits, '--model', tmp_path / 'model', '--epochs', 1, '--img-size', 48, '--workers', 0, '--out',
        tmp_path / 'run', '--device', 'cpu')
    assert run.code == 0, run.stderr
    assert json.loads((tmp_path / 'run/model/config.json').read_text())['pretrained_cfg']['input_size'] == [1, 48, 48]

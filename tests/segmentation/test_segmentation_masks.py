"""Masks as people have them: 0 and 255, one bit, colours; counted and looked at before training."""
import json
import logging
import os
import signal
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from test_segmentation_datasets import make_lip

from vt_zoo.data.label_map import read_label_map
from vt_zoo.segmentation import datasets
from vt_zoo.segmentation import train as train_module
from vt_zoo.segmentation.datasets import load_dataset
from vt_zoo.segmentation.label_counts import LabelCounts, check_classes, count_labels, describe_absent, describe_counts
from vt_zoo.segmentation.settings import SegmentSettings
from vt_zoo.segmentation.train import train_segmenter
from vt_zoo.weights import load

CLASSES = ['background', 'crack']
SMALL = {'crop_size': [32, 32], 'iterations': 2, 'eval_every': 2, 'batch_size': 2}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache folder."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


def save_mask(pixels, path, mode=None, **kwargs):
    image = Image.fromarray(np.asarray(pixels))
    (image.convert(mode) if mode else image).save(path, **kwargs)


def make(root, masks, classes=CLASSES, splits=('train', 'val')):
    """A set of the folder layout with these masks in each part."""
    for split in splits:
        for kind in ('images', 'masks'):
            (root / kind / split).mkdir(parents=True)
        for i, mask in enumerate(masks):
            height, width = np.asarray(mask).shape[:2]
            pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / 'images' / split / f'{i}.png')
            save_mask(mask, root / 'masks' / split / f'{i}.png')
    (root / 'classes.txt').write_text('\n'.join(classes))
    return root


def binary(high, size=32):
    mask = np.zeros((size, size), dtype=np.uint8)
    mask[:, size // 2:] = high
    return mask


def labels(root, label_map=None, split='train'):
    dataset = load_dataset('folder', root, split)
    dataset.map_labels(read_label_map(label_map))
    return dataset[0][1]


def run(root, out, segment_settings, resume=False, **changes):
    settings = SegmentSettings.read(None, {**segment_settings, **SMALL, **changes})
    return train_segmenter(root, out, settings, resume, device='cpu', progress=False)


# what a mask may hold

def test_one_bit(tmp_path):
    save_mask(binary(255), make(tmp_path, [binary(1)]) / 'masks' / 'train' / '0.png', mode='1')
    assert Image.open(tmp_path / 'masks' / 'train' / '0.png').mode == '1'
    assert (labels(tmp_path) == binary(1)).all()
    assert (labels(tmp_path, {0: 0, 255: 1}) == binary(1)).all()
    assert (labels(tmp_path, {0: 1, 1: 0}) == 1 - binary(1)).all()


@pytest.mark.parametrize('bits', [2, 4])
def test_grey_of_2_and_4_bits(tmp_path, bits):
    """Pillow stretches the values to 0 to 255."""
    def chunk(name, data):
        return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))

    make(tmp_path, [np.zeros((1, 4), np.uint8)], classes=['a', 'b', 'c', 'd'])
    row = {2: bytes([0b00011011]), 4: bytes([0x01, 0x23])}[bits]
    (tmp_path / 'masks' / 'train' / '0.png').write_bytes(
        b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 4, 1, bits, 0, 0, 0, 0))
        + chunk(b'IDAT', zlib.compress(b'\0' + row)) + chunk(b'IEND', b''))
    assert labels(tmp_path).tolist() == [[0, 1, 2, 3]]


def test_mapped_values(tmp_path):
    mask = np.array([[0, 7, 255, 300]], dtype=np.uint16)
    make(tmp_path, [mask])
    assert labels(tmp_path, {0: 0, 7: 1, 300: 255}).tolist() == [[0, 1, 255, 255]], '255 is ignored where not named'
    assert labels(tmp_path, {0: 0, 7: 1, 300: 0, 255: 1}).tolist() == [[0, 1, 1, 0]]


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'P'])
def test_mapped_colours(tmp_path, mode):
    colours = np.array([[[0, 0, 0], [255, 0, 0], [0, 128, 0]]], dtype=np.uint8)
    make(tmp_path, [np.zeros((1, 3), np.uint8)], classes=['a', 'b', 'c'])
    image = Image.fromarray(colours)
    image = image.quantize(3) if mode == 'P' else image.convert(mode)
    image.save(tmp_path / 'masks' / 'train' / '0.png')
    assert labels(tmp_path, {'0,0,0': 0, '255, 0, 0': 2, '0,128,0': 255}).tolist() == [[0, 2, 255]]


@pytest.mark.parametrize('mode', ['L', '1'])
def test_grey_mask_of_a_coloured_set(tmp_path, mode):
    """As what optimises files leaves of a mask that is black and white."""
    save_mask(binary(255), make(tmp_path, [binary(1)]) / 'masks' / 'train' / '0.png', mode=mode)
    label_map = {'0,0,0': 255, '255,255,255': 0, '255,0,0': 1}
    assert (labels(tmp_path, label_map) == np.where(binary(1), 0, 255)).all()


@pytest.mark.parametrize('pixels, label_map, match', [
    (binary(1), {'0,0,0': 0, '255,0,0': 1}, 'has the colour 1,1,1, label_map names 0,0,0 and 255,0,0'),
    (binary(7), {0: 0, 255: 1}, r'0\.png has the label 7, label_map names 0 and 255'),
    (np.full((2, 2), 300, np.uint16), {0: 0}, 'has the label 300'),
    (np.full((2, 2, 3), 9, np.uint8), {'255,0,0': 1}, 'has the colour 9,9,9, label_map names 255,0,0'),
    (np.full((2, 2, 3), 9, np.uint8), {0: 0, 255: 1}, "is an image of mode 'RGB', needed is grey or palette"),
    (np.full((2, 2, 3), 9, np.uint8), None, r"mode 'RGB', .* or a label_map of its colours, as \{\"255,0,0\": 1\}"),
    (np.full((2, 2, 4), 9, np.uint8), {'9,9,9': 1}, 'has transparent pixels'),
    (np.zeros((2, 2), np.uint8), {0: 2}, 'label_map maps 0 to class 2, allowed are 0 to 1 and 255'),
])
def test_mask_that_does_not_fit_the_map(tmp_path, pixels, label_map, match, input_error):
    make(tmp_path, [pixels])
    with input_error(match):
        labels(tmp_path, label_map)


@pytest.mark.parametrize('content, match', [
    ({'format': 'JPEG'}, 'has the content of a JPEG'),
    ({'save_all': True, 'append_images': [Image.new('L', (32, 32), 1)]}, 'holds 2 pictures'),
])
def test_mask_that_is_no_single_png(tmp_path, content, match, input_error):
    save_mask(binary(1), make(tmp_path, [binary(1)]) / 'masks' / 'train' / '0.png', **content)
    with input_error(match):
        labels(tmp_path)


@pytest.mark.parametrize('value', [
    'word', [0, 1], {}, {'a': 1}, {0: 'sky'}, {0: 256}, {0: -1}, {0: True}, {-1: 0}, {65536: 0}, {'1,2': 0},
    {'256,0,0': 1}, {1.5: 0}, {None: 0}])
def test_label_map_that_is_none(value, input_error):
    with input_error(r'^label_map must be .*, got '):
        SegmentSettings.read(None, {'label_map': value})


def test_label_map_of_recipe_and_command_line(tmp_path):
    (tmp_path / 'recipe.yaml').write_text('label_map:\n  0: 0\n  255: 1\n  255,0,0: 1\n')
    assert SegmentSettings.read(str(tmp_path / 'recipe.yaml')).label_map == {0: 0, 255: 1, '255,0,0': 1}
    with pytest.raises(ValueError, match='twice'):
        SegmentSettings.read(None, {'label_map': {'255,0,0': 1, '255, 0, 0': 0}})


def test_label_map_is_for_ones_own_masks(tmp_path, input_error):
    with input_error('label_map is only for format folder'):
        load_dataset('lip', make_lip(tmp_path), 'train').map_labels({0: 0})


# what occurs

def test_counts(tmp_path):
    make(tmp_path, [binary(1), binary(0), np.full((8, 8), 255, np.uint8)], classes=['a', 'b', 'c'])
    counts = count_labels(load_dataset('folder', tmp_path, 'train'), progress=False)
    assert counts == LabelCounts(pixels=[1536, 512, 0, 64], masks=[2, 1, 0, 1], total=3)
    assert describe_absent(['a', 'b', 'c'], counts) == (
        "1 of 3 classes occur in no training mask and cannot be learned: 'c'")
    lines = [line.split('  ') for line in describe_counts(['a', 'b', 'c'], {'train': counts})]
    assert [(line[0].strip(), line[-1].strip()) for line in lines] == [
        ('class', 'train, 3 masks'), ('a', '72.73 % in 2'), ('b', '24.24 % in 1'), ('c', 'in no mask'),
        ('ignored (255)', '3.03 % in 1')]


def test_counts_of_many_classes():
    counts = LabelCounts([*range(100, 190), 0], [1] * 90 + [0], 5)
    lines = describe_counts([f'class {i}' for i in range(90)], {'train': counts})
    assert len(lines) == 8 and lines[0].startswith('90 classes') and lines[2].startswith('class 0 ')


@pytest.mark.parametrize('classes, mask, part, match', [
    (['crack'], binary(255), 'train', r'only class 0 \(crack\), classes\.txt names no other'),
    (CLASSES, binary(255), 'train', r"hold only 0 \(background\) and 255.*--label-map '\{0: 0, 255: 1\}'"),
    (CLASSES, binary(255), 'val', r'hold only 0 \(background\) and 255'),
    (CLASSES, np.where(binary(1), 255, 1).astype(np.uint8), 'train',
     r'hold only 1 \(crack\) and 255.*\{1: 1, 255: 0\}'),
    (CLASSES, binary(0), 'train', r'hold only class 0 \(background\), class 1 \(crack\) occurs in none'),
])
def test_only_one_class_occurs(tmp_path, classes, mask, part, match, input_error):
    dataset = load_dataset('folder', make(tmp_path, [mask], classes), part)
    with input_error(match):
        check_classes(dataset, count_labels(dataset, progress=False), part)


def test_training_on_0_and_255(tmp_path, segment_settings, segment_command, segment_arguments, input_error):
    """Refused without label_map; with it trained, measured by the model's own map, by another, and refused by none."""
    root = make(tmp_path / 'data', [binary(255)] * 2, splits=('train', 'val', 'test'))
    with input_error('--label-map'):
        run(root, tmp_path / 'run', segment_settings)
    assert not (tmp_path / 'run').exists()
    words = ['segment', 'train', '--data-dir', root, *segment_arguments, '--iterations', 2, '--out', tmp_path / 'run']
    result = segment_command(*words, '--label-map', '{0: 0, 255: 1}')
    assert result.code == 0, result.stderr
    assert [line.split() for line in result.stdout.splitlines() if line.startswith('crack')] == [
        ['crack', *2 * ['50.00', '%', 'in', '2']]]
    assert load(tmp_path / 'run' / 'last').label_map == {0: 0, 255: 1}

    words = ['segment', 'eval', '--model', tmp_path / 'run' / 'last', '--data-dir', root, '--json', '--split']
    own = segment_command(*words, 'test')
    assert own.code == 0, own.stderr
    assert all(iou is not None for iou in json.loads(own.stdout)['iou'].values())
    swapped = segment_command(*words, 'test', '--label-map', '{0: 1, 255: 0}')
    right = json.loads(own.stdout)['pixel_accuracy']
    assert json.loads(swapped.stdout)['pixel_accuracy'] == pytest.approx(1 - right)
    none = segment_command(*words, 'val', '--label-map', 'null')
    assert none.code == 2 and 'and 255 is ignored' in none.lines[-1]
    save_mask(binary(1), root / 'masks' / 'test' / '0.png')
    other = segment_command(*words, 'test')
    assert other.code == 2
    assert other.lines[-1].endswith(
        'has the label 1, label_map names 0 and 255; the label_map is that of the model, --label-map gives another')


def test_class_that_does_not_occur_is_named(tmp_path, segment_settings, caplog):
    root = make(tmp_path / 'data', [binary(1)] * 2, classes=['a', 'b', 'unicorn'])
    with caplog.at_level(logging.WARNING, 'vt_zoo'):
        run(root, tmp_path / 'run', segment_settings)
    assert "1 of 3 classes occur in no training mask and cannot be learned: 'unicorn'" in caplog.text


# the part that is never trained on

def test_test_part(tmp_path, input_error):
    make(tmp_path, [binary(1)], splits=('train', 'val'))
    with input_error(r'images/test does not exist, .*images holds train, val'):
        load_dataset('folder', tmp_path, 'test')
    make(tmp_path, [binary(0)] * 3, splits=('test',))
    assert len(load_dataset('folder', tmp_path, 'test')) == 3


# a look at all at the start

def test_all_that_is_wrong_is_said_before_training(tmp_path, segment_settings, input_error):
    root = make(tmp_path / 'data', [binary(1)] * 3)
    for name in ('1', '2'):
        save_mask(binary(9), root / 'masks' / 'val' / f'{name}.png')
    with input_error(r'masks/val/1\.png has the label 9, .*; 2 of 3 samples of this part have errors'):
        run(root, tmp_path / 'run', segment_settings)
    assert not (tmp_path / 'run').exists()


def test_files_are_opened_again_only_where_something_changed(tmp_path, monkeypatch):
    root = make(tmp_path / 'data', [binary(1)] * 2, classes=['a', 'b', 'c'])
    opened = []
    read = datasets._read_mask
    monkeypatch.setattr(datasets, '_read_mask', lambda path, *args: opened.append(path.name) or read(path, *args))

    def look(label_map=None):
        opened.clear()
        dataset = load_dataset('folder', root, 'train')
        dataset.map_labels(label_map)
        return count_labels(dataset, progress=False), sorted(opened)

    both = ['0.png', '1.png']
    first, names = look()
    assert names == both
    assert look() == (first, [])
    assert look({0: 2, 1: 1})[0].pixels == [0, 1024, 1024, 0]
    assert look()[1] == both, 'one state of each part is remembered'
    stat = os.stat(root / 'masks' / 'train' / '0.png')
    os.utime(root / 'masks' / 'train' / '0.png', ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert look() == (first, both)
    (root / 'classes.txt').write_text('a\nb')
    assert look()[1] == both
    memory, = (tmp_path / 'cache').rglob('*.json')
    memory.write_bytes(memory.read_bytes()[:20])
    assert look()[1] == both


def test_ctrl_c_while_masks_are_looked_at(tmp_path, cache, segment_command, segment_arguments, signal_at):
    root = make(tmp_path / 'data', [binary(1)] * 50)
    result = segment_command(
        'segment', 'train', '--data-dir', root, *segment_arguments, '--out', tmp_path / 'run',
        environment={'XDG_CACHE_HOME': str(cache)},
        before=signal_at('vt_zoo.segmentation.datasets.load_upright', 3, signal.SIGINT, after=True))
    assert (result.code, result.lines[-1]) == (130, 'vt-zoo: interrupted')
    assert not (tmp_path / 'run').exists() and not list((cache / 'vt_zoo').rglob('*.json'))


def test_cache_folder_that_cannot_be_written(tmp_path, cache):
    cache.write_text('a file')
    root = make(tmp_path / 'data', [binary(1)])
    assert count_labels(load_dataset('folder', root, 'train'), progress=False).total == 1


# going on

@pytest.mark.parametrize('change', ['fewer', 'other masks', 'nothing'])
def test_validation_part_may_change(tmp_path, segment_settings, monkeypatch, caplog, change):
    root = make(tmp_path / 'data', [binary(1)] * 2)
    monkeypatch.setattr(train_module, 'evaluate', lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(root, tmp_path / 'run', segment_settings)
    monkeypatch.undo()
    if change == 'fewer':
        for kind in ('images', 'masks'):
            (root / kind / 'val' / '1.png').unlink()
    if change == 'other masks':
        save_mask(np.ones((32, 32), np.uint8), root / 'masks' / 'val' / '1.png')
    with caplog.at_level(logging.WARNING, 'vt_zoo'):
        run(root, tmp_path / 'run', segment_settings, resume=True)
    now = 1 if change == 'fewer' else 2
    sentence = f'the validation part is not the one of the run so far (2 images then, {now} now)'
    assert (sentence in caplog.text) == (change != 'nothing')
    assert sorted(os.listdir(tmp_path / 'run')) == ['best', 'history.csv', 'last']

"""The segmentation set composed of real digits."""
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from vt_zoo.data import composed_digits
from vt_zoo.data.composed_digits import write_composed_digits
from vt_zoo.data.digits import read_digits
from vt_zoo.segmentation.datasets import load_dataset

BRIGHTNESS = np.array([0.299, 0.587, 0.114])


def contents(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob('*') if path.is_file()}


@pytest.fixture(scope='module')
def composed(tmp_path_factory):
    """40 and 10 images. Not to be changed."""
    root = tmp_path_factory.mktemp('composed') / 'data'
    write_composed_digits(root, 40, 10)
    return root


@pytest.fixture(scope='module')
def items(composed):
    return [(np.asarray(image), mask) for split in ('train', 'val') for image, mask in load_dataset(
        'folder', composed, split)]


@pytest.fixture(scope='module')
def strokes(items):
    """Each connected piece of a digit of at least 60 pixels: `item`, `mask` and the `colour` that most of it has."""
    found = []
    for number, (image, labels) in enumerate(items):
        for label in set(labels[labels > 0].tolist()):
            pieces, count = ndimage.label(labels == label, np.ones((3, 3)))
            for mask in (pieces == i + 1 for i in range(count)):
                if mask.sum() >= 60:
                    colours, counts = np.unique(image[mask], axis=0, return_counts=True)
                    found.append(SimpleNamespace(
                        item=number, mask=mask, label=label, colour=colours[counts.argmax()]))
    return found


def test_layout(composed):
    for split, count in ('train', 40), ('val', 10):
        dataset = load_dataset('folder', composed, split)
        assert len(dataset) == count
        assert dataset.classes == ['background', *'0123456789']
        for image, mask in dataset:
            assert image.size == (96, 96)
            assert mask.max() <= 10
    assert len(contents(composed)) == 2 * 50 + 1


def test_several_digits_an_image(items, strokes):
    counts = np.bincount([s.item for s in strokes], minlength=len(items))
    assert counts.min() >= 1 and 2 < counts.mean() < 5
    assert {s.label for s in strokes} == set(range(1, 11))
    share = np.mean([mask > 0 for _, mask in items])
    assert 0.05 < share < 0.25


def test_mask_is_where_the_stroke_is(items, strokes):
    for stroke in strokes:
        image, labels = items[stroke.item]
        of_colour = (image == stroke.colour).all(-1)
        assert (labels[of_colour] == stroke.label).all()
        assert of_colour[stroke.mask].mean() > 0.3
        beyond = ndimage.binary_dilation(stroke.mask, iterations=3) & ~ndimage.binary_dilation(
            stroke.mask, iterations=2)
        distance = np.abs(image.astype(int) - stroke.colour).max(-1)
        assert distance[stroke.mask].mean() < distance[beyond].mean() / 2


def test_digits_stand_out(items, strokes):
    for stroke in strokes:
        image, labels = items[stroke.item]
        rows, columns = np.where(stroke.mask)
        around = np.s_[rows.min():rows.max() + 1, columns.min():columns.max() + 1]
        background = image[around][labels[around] == 0]
        if len(background) >= 30:
            assert abs((stroke.colour - background.mean(0)) @ BRIGHTNESS) / 255 > 0.2


def test_background_has_texture(items):
    assert all(image[mask == 0].std(axis=0).mean() > 8 for image, mask in items)


def test_colour_says_nothing_about_the_class(strokes):
    colours = np.array([s.colour for s in strokes]) / 255
    labels = np.array([s.label for s in strokes])
    between = np.var([colours[labels == label].mean(0) for label in range(1, 11)], axis=0)
    by_chance = colours.var(0) / (len(strokes) / 10)
    assert (between < 3 * by_chance).all()


def test_masks_have_the_shapes_of_the_scans(strokes):
    """Scaled back to 8x8, most are nearest to a scan of their own digit."""
    scans, digits, _ = read_digits()
    flat = scans.reshape(len(scans), -1) / 16
    right = []
    for stroke in strokes:
        rows, columns = np.where(stroke.mask)
        side = max(np.ptp(rows), np.ptp(columns)) + 1
        left = round((columns.min() + columns.max() + 1 - side) / 2)
        box = (left, rows.min(), left + side, rows.min() + side)
        small = np.asarray(Image.fromarray(stroke.mask.astype(np.float32)).crop(box).resize((8, 8), Image.BOX))
        right.append(digits[((flat - small.reshape(-1)) ** 2).sum(1).argmin()] == stroke.label - 1)
    assert np.mean(right) > 0.75


def test_each_part_shows_scans_of_its_own_part(tmp_path, monkeypatch):
    scans, digits, parts = read_digits()
    apart = {'train': [i for i in parts['train'] if digits[i] < 5], 'val': [i for i in parts['val'] if digits[i] >= 5]}
    monkeypatch.setattr(composed_digits, 'read_digits', lambda: (scans, digits, apart))
    write_composed_digits(tmp_path / 'data', 8, 8)
    for split, allowed in ('train', {0, 1, 2, 3, 4, 5}), ('val', {0, 6, 7, 8, 9, 10}):
        dataset = load_dataset('folder', tmp_path / 'data', split)
        assert set(np.concatenate([mask.ravel() for _, mask in dataset]).tolist()) <= allowed


def test_split_is_that_of_write_digits(digits):
    _, _, parts = read_digits()
    for split in 'train', 'val':
        assert sorted(parts[split]) == sorted(int(path.stem) for path in (digits / split).rglob('*.png'))


def test_same_arguments_same_files(composed, tmp_path):
    np.random.seed(7)
    write_composed_digits(tmp_path / 'again', 40, 10)
    assert contents(tmp_path / 'again') == contents(composed)


def test_number_of_images_does_not_change_them(composed, tmp_path):
    write_composed_digits(tmp_path, 3, 2)  # fills an empty folder
    few, all_files = contents(tmp_path), contents(composed)
    assert len(few) == 11
    assert few == {name: all_files[name] for name in few}


def test_seed_and_size(composed, tmp_path):
    write_composed_digits(tmp_path / 'other', 1, 1, size=64, seed=1)
    image, mask = load_dataset('folder', tmp_path / 'other', 'train')[0]
    assert image.size == mask.shape == (64, 64)
    write_composed_digits(tmp_path / 'seed', 3, 1, seed=1)
    seeds = contents(tmp_path / 'seed'), contents(composed)
    images = [name for name in seeds[0] if name.parts[0] == 'images']
    assert len(images) == 4 and all(seeds[0][name] != seeds[1][name] for name in images)


@pytest.mark.parametrize('arguments, match', [
    ((0, 1), 'num_train 0 must be at least 1'),
    ((1, 0), 'num_val 0 must be at least 1'),
    ((1, 1, 31), 'size 31 must be at least 32'),
])
def test_wrong_arguments(tmp_path, input_error, arguments, match):
    with input_error(match):
        write_composed_digits(tmp_path / 'data', *arguments)
    assert not list(tmp_path.iterdir())


def test_what_is_there_stays(tmp_path, input_error):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'mine.txt').write_text('mine')
    with input_error('data exists, but a new or empty folder is needed'):
        write_composed_digits(tmp_path / 'data', 1, 1)
    with input_error('mine.txt exists'):
        write_composed_digits(tmp_path / 'data' / 'mine.txt', 1, 1)
    assert contents(tmp_path) == {(tmp_path / 'data' / 'mine.txt').relative_to(tmp_path): b'mine'}


def test_without_scikit_learn(monkeypatch, tmp_path, input_error):
    for name in ('sklearn', 'sklearn.datasets', 'sklearn.model_selection'):
        monkeypatch.setitem(sys.modules, name, None)
    with input_error('scikit-learn'):
        write_composed_digits(tmp_path / 'data', 1, 1)
    assert not list(tmp_path.iterdir())

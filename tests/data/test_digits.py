"""The folder of handwritten digits."""
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from vt_zoo.data.digits import write_digits

FIRST_HELD_OUT_SEVENS = [81, 173, 211, 236, 240]


@pytest.fixture(scope='module')
def files(digits):
    """Every file that was written, by (split, class, number of the scan)."""
    return {(p.parts[-3], p.parts[-2], int(p.stem)): p for p in digits.rglob('*') if p.is_file()}


def test_files_are_the_scans_as_grey_png(files):
    scans = load_digits()
    for (_, name, index), path in files.items():
        assert str(scans.target[index]) == name
        with Image.open(path) as image:
            assert (path.suffix, image.format, image.mode, image.size) == ('.png', 'PNG', 'L', (8, 8))
            assert np.abs(np.asarray(image) - scans.images[index] * 255 / 16).max() <= 0.5


def test_each_scan_is_in_one_of_train_and_val(files):
    assert sorted(index for _, _, index in files) == list(range(1797))


def test_counts(files):
    assert Counter(split for split, _, _ in files) == {'train': 1347, 'val': 450}
    of_class = Counter((split, name) for split, name, _ in files)
    for target, count in Counter(load_digits().target.tolist()).items():
        assert abs(of_class['val', str(target)] - 450 * count / 1797) < 1
        assert of_class['train', str(target)] + of_class['val', str(target)] == count


def test_split_is_fixed(files, digits, tmp_path):
    np.random.seed(7)
    write_digits(tmp_path)
    again = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    assert again == {p.relative_to(digits): p.read_bytes() for p in files.values()}
    sevens = sorted(index for split, name, index in files if (split, name) == ('val', '7'))
    assert sevens[:5] == FIRST_HELD_OUT_SEVENS


def test_without_scikit_learn(monkeypatch, tmp_path, input_error):
    for name in ('sklearn', 'sklearn.datasets', 'sklearn.model_selection'):
        monkeypatch.setitem(sys.modules, name, None)
    with input_error('scikit-learn'):
        write_digits(tmp_path / 'digits')
    assert not list(tmp_path.iterdir())

"""The oldest timm that pyproject.toml allows has all that vt_zoo imports; an older one is refused in one sentence."""
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vt_zoo._requirements import OLDEST_TIMM

ROOT = Path(__file__).parents[1]

IMPORT_ALL = '''
import importlib, pkgutil
import timm, torch, vt_zoo
for module in pkgutil.walk_packages(vt_zoo.__path__, 'vt_zoo.'):
    if module.name.endswith('__main__'):
        continue
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as e:  # of an extra that is not installed
        if e.name.split('.')[0] in ('timm', 'vt_zoo'):
            raise
model = timm.create_model('test_vt_resnet', pretrained=True).eval()
fast = timm.utils.reparameterize_model(model)
x = torch.randn(1, 3, 64, 64)
assert torch.allclose(fast(x), model(x), atol=1e-4)
print(timm.__version__, fast(x).shape[1])
'''


def run(folder, *words, code=None):
    """Run Python with a folder that comes before the installed packages."""
    return subprocess.run(
        [sys.executable, *(['-c', code] if code else []), *map(str, words)], cwd=folder, capture_output=True, text=True,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join([str(folder), str(ROOT)])}, timeout=300)


@pytest.fixture(scope='session')
def oldest_timm(tmp_path_factory):
    """The oldest timm's wheel, unpacked."""
    folder = tmp_path_factory.mktemp('oldest_timm')
    pip = subprocess.run(
        [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', f'timm=={OLDEST_TIMM}', '-d', str(folder)],
        capture_output=True, text=True)
    if pip.returncode and not os.environ.get('CI'):
        pytest.skip(f'timm {OLDEST_TIMM} cannot be downloaded: {pip.stderr.strip().splitlines()[-1:]}')
    assert pip.returncode == 0, pip.stderr
    wheel, = folder.glob('*.whl')
    with zipfile.ZipFile(wheel) as f:
        f.extractall(folder)
    return folder


def test_bound_is_that_of_the_package():
    assert re.findall(r'"timm>=([\d.]+)"', (ROOT / 'pyproject.toml').read_text()) == [OLDEST_TIMM]


def test_oldest_timm_has_all_that_is_imported(oldest_timm):
    process = run(oldest_timm, code=IMPORT_ALL)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == [OLDEST_TIMM, '10']


@pytest.fixture
def old_clone(tmp_path):
    """What a clone of an old timm is to Python, with a script that imports what --device-modules names."""
    (tmp_path / 'timm').mkdir()
    (tmp_path / 'timm' / '__init__.py').write_text("__version__ = '1.0.9'\n")
    (tmp_path / 'train.py').write_text("import importlib\nimportlib.import_module('vt_zoo')\n")
    return tmp_path


@pytest.mark.parametrize('words', [
    ('train.py',), ('-m', 'vt_zoo', 'models'), ('-m', 'vt_zoo.run', 'train.py')], ids=' '.join)
def test_older_timm_gets_one_sentence(old_clone, words):
    process = run(old_clone, *words)
    assert (process.returncode, process.stdout) == (2, '')
    line, = process.stderr.splitlines()
    assert line == (
        f'vt_zoo: error: vt_zoo needs timm {OLDEST_TIMM} or newer, Python finds timm 1.0.9 in {old_clone / "timm"}')


def test_older_timm_beside_a_script_gets_one_sentence(old_clone, tmp_path_factory):
    process = run(tmp_path_factory.mktemp('elsewhere'), '-m', 'vt_zoo.run', old_clone / 'train.py')
    assert (process.returncode, process.stdout) == (2, '')
    line, = process.stderr.splitlines()
    assert all(word in line for word in (OLDEST_TIMM, '1.0.9', str(old_clone / 'timm')))


def test_older_timm_can_be_caught(old_clone):
    process = run(old_clone, code='try:\n    import vt_zoo\nexcept ImportError as e:\n    print(e)\nraise KeyError(1)')
    assert process.stdout.startswith(f'vt_zoo needs timm {OLDEST_TIMM}')
    assert process.returncode == 1 and process.stderr.splitlines()[-1] == 'KeyError: 1'

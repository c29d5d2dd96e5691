"""Fixtures shared by the tests: processes of the command line, folders of digits, trained models."""
import gc
import json
import os
import shutil
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import MAX_SENTENCE, SIGNAL_AT, Forks, run_command, words_of
from PIL import Image

from vt_zoo.classification.settings import FinetuneSettings
from vt_zoo.classification.train import finetune
from vt_zoo.data.composed_digits import write_composed_digits
from vt_zoo.data.digits import write_digits
from vt_zoo.errors import InputError

ROOT = Path(__file__).parents[1]
SEGMENT_MODULES = ['vt_zoo.models.vt_fpn', 'vt_zoo.segmentation.train', 'vt_zoo.segmentation.predict']


def pytest_configure(config):
    """Each process of pytest-xdist, with all that it starts, takes its share of the cores."""
    if hasattr(config, 'workerinput'):
        threads = max(1, os.cpu_count() // config.workerinput['workercount'])
        torch.set_num_threads(threads)
        os.environ['OMP_NUM_THREADS'] = str(threads)


def pytest_collection_modifyitems(items):
    """Mark the tests that need timm's scripts."""
    for item in items:
        if 'timm_clone' in item.fixturenames:
            item.add_marker('timm_scripts')


def pytest_collection_finish():
    """Keep what was imported out of later collections of garbage: accelerate asks for two a run, half a second each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope='session')
def forks(tmp_path_factory):
    """Forks of a process that has imported what `vt-zoo` imports."""
    with closing(Forks(tmp_path_factory.mktemp('command'), 'vt_zoo.cli')) as forks:
        yield forks


@pytest.fixture(scope='session')
def command(forks):
    """Runs a command of vt-zoo: `command('models', '--json').stdout`."""
    return partial(run_command, forks)


@pytest.fixture(scope='session')
def segment_command(tmp_path_factory):
    """As `command`, with what `vt-zoo segment` imports."""
    with closing(Forks(tmp_path_factory.mktemp('segment_command'), 'vt_zoo.cli', *SEGMENT_MODULES)) as forks:
        yield partial(run_command, forks)


@pytest.fixture(scope='session')
def photograph(tmp_path_factory):
    """A photograph of a cat, 451x300 pixels, which comes with scikit-image."""
    data = pytest.importorskip('skimage.data')
    path = tmp_path_factory.mktemp('photograph') / 'cat.jpg'
    Image.fromarray(data.chelsea()).save(path)
    return path


@pytest.fixture(scope='session')
def signal_at():
    """Gives code for `before` of a command: `signal_at('os.replace', 2, SIGINT)`, a signal at the second call.

    `after` is for a signal right after the call; otherwise it comes in place of the call.
    """
    def code(function, call, number, after=False):
        owner, _, name = function.rpartition('.')
        return f'{SIGNAL_AT}\nsend_signal({owner}, {name!r}, {call}, {int(number)}, {after})'
    return code


@pytest.fixture(scope='session')
def limit_file_size():
    """Gives code for `before` of a command: a write beyond so many bytes of a file fails, as on a full disk."""
    return lambda size: (
        f'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, resource.RLIM_INFINITY))')


@pytest.fixture(scope='session')
def models(command):
    """What `vt-zoo models --json` lists, by name."""
    return {entry['name']: entry for entry in json.loads(command('models', '--json').stdout)}


@pytest.fixture(scope='session')
def input_error():
    """Context manager: the block raises an InputError of one sentence that matches."""
    @contextmanager
    def check(match):
        with pytest.raises(InputError, match=match) as info:
            yield
        message = str(info.value)
        assert '\n' not in message
        assert len(message) <= MAX_SENTENCE, f'a sentence of {len(message)} characters'
    return check


@pytest.fixture
def hub_client(tmp_path, monkeypatch):
    """Makes this process's client of the hub ask another address; gives the folder of its cache."""
    def use(url):
        for name, value in (
                ('ENDPOINT', url), ('HUGGINGFACE_CO_URL_TEMPLATE', url + '/{repo_id}/resolve/{revision}/{filename}'),
                ('HF_HUB_CACHE', str(tmp_path / 'cache')), ('HF_HUB_DISABLE_XET', True)):
            monkeypatch.setattr(f'huggingface_hub.constants.{name}', value)
        return tmp_path / 'cache'
    return use


@pytest.fixture(scope='session')
def script():
    """Path of the console script."""
    return Path(sys.executable).with_name('vt-zoo')


@pytest.fixture(scope='session')
def checkout(tmp_path_factory):
    """hubconf.py and vt_zoo/ alone, in a folder named as torch.hub names what it downloads. Not to be changed."""
    path = tmp_path_factory.mktemp('hub') / 'owner_vt_zoo_main'
    shutil.copytree(ROOT / 'vt_zoo', path / 'vt_zoo', ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(ROOT / 'hubconf.py', path)
    return path


@pytest.fixture(scope='session')
def timm_clone():
    """Folder with timm's scripts; what needs it is skipped where there is none."""
    folder = os.environ.get('VT_ZOO_TIMM_SCRIPTS')
    if not folder:
        pytest.skip("VT_ZOO_TIMM_SCRIPTS does not name a folder with timm's scripts")
    return Path(folder)


@pytest.fixture(scope='session')
def digits(tmp_path_factory):
    """All digits as `write_digits` writes them. Not to be changed."""
    folder = tmp_path_factory.mktemp('digits')
    write_digits(folder)
    return folder


@pytest.fixture(scope='session')
def few_digits(digits, tmp_path_factory):
    """Three classes, train/ of 36 images and val/ of 18. Not to be changed."""
    folder = tmp_path_factory.mktemp('few_digits')
    for split, count in (('train', 12), ('val', 6)):
        for name in '012':
            (folder / split / name).mkdir(parents=True)
            for path in sorted((digits / split / name).iterdir())[:count]:
                shutil.copy(path, folder / split / name)
    return folder


@pytest.fixture(scope='session')
def class_folders(few_digits):
    """Three class folders of 12 images without train/ and val/. Not to be changed."""
    return few_digits / 'train'


@pytest.fixture
def my_digits(few_digits, tmp_path):
    """A copy of few_digits to change."""
    return Path(shutil.copytree(few_digits, tmp_path / 'my_digits'))


@pytest.fixture(scope='session')
def tiny_settings():
    """Settings of the cheapest sensible run: 4 steps an epoch on few_digits."""
    return FinetuneSettings(
        model='test_vt_resnet', epochs=2, batch_size=8, img_size=32, lr=0.02, warmup_epochs=0, hflip=0.,
        scale=(0.7, 1.0))


@pytest.fixture(scope='session')
def tiny_arguments():
    """The words that give tiny_settings on the command line, without the data folder and --out."""
    return [
        '--model', 'test_vt_resnet', '--epochs', '2', '--batch-size', '8', '--img-size', '32', '--lr', '0.02',
        '--warmup-epochs', '0', '--hflip', '0', '--scale', '0.7', '1.0', '--workers', '0', '--device', 'cpu']


@pytest.fixture(scope='session')
def tiny_run(few_digits, tiny_settings, tmp_path_factory):
    """A finished run of two epochs: `out`, `result`. Not to be changed."""
    out = tmp_path_factory.mktemp('tiny') / 'run'
    result = finetune(few_digits, out, tiny_settings, device='cpu', progress=False)
    return SimpleNamespace(out=out, result=result)


@pytest.fixture(scope='session')
def tiny_model(tiny_run):
    """Folder of the model of tiny_run. Not to be changed."""
    return tiny_run.out / 'model'


@pytest.fixture
def my_model(tiny_model, tmp_path):
    """A copy of tiny_model to change."""
    return Path(shutil.copytree(tiny_model, tmp_path / 'my_model'))


@pytest.fixture(scope='session')
def composed(tmp_path_factory):
    """A segmentation set of digits: train/ of 7 images and val/ of 3, 48x48 pixels, 11 classes. Not to be changed."""
    folder = tmp_path_factory.mktemp('composed') / 'data'
    write_composed_digits(folder, 7, 3, size=48)
    return folder


@pytest.fixture
def my_composed(composed, tmp_path):
    """A copy of composed to change."""
    return Path(shutil.copytree(composed, tmp_path / 'my_composed'))


@pytest.fixture(scope='session')
def segment_settings():
    """Settings of a run of seconds with everything that draws random numbers or keeps a state."""
    return {
        'encoder_name': 'tu-test_resnet', 'token_dim': 32, 'pyramid_channels': 32, 'head_channels': 64, 'iterations': 8,
        'batch_size': 3, 'lr': 0.05, 'warmup': 2, 'crop_size': [32, 32], 'scale': [0.5, 1.5], 'eval_every': 4,
        'checkpoint_every': 2, 'ema_decay': 0.9}


@pytest.fixture(scope='session')
def segment_arguments(segment_settings):
    """The words that give segment_settings on the command line, without the data folder and --out."""
    return [*words_of(segment_settings), '--workers', '0', '--device', 'cpu']


@pytest.fixture(scope='session')
def segment_run(composed, segment_settings, tmp_path_factory):
    """A finished run of segment_settings: `out`, `result`. Not to be changed."""
    from vt_zoo.segmentation.settings import SegmentSettings
    from vt_zoo.segmentation.train import train_segmenter
    out = tmp_path_factory.mktemp('segment') / 'run'
    result = train_segmenter(composed, out, SegmentSettings.read(None, segment_settings), device='cpu', progress=False)
    return SimpleNamespace(out=out, result=result)


@pytest.fixture(scope='session')
def segment_model(segment_run):
    """Folder of the last model of segment_run. Not to be changed."""
    return segment_run.out / 'last'


@pytest.fixture
def my_segment_model(segment_model, tmp_path):
    """A copy of segment_model to change."""
    return Path(shutil.copytree(segment_model, tmp_path / 'my_segment_model'))


@pytest.fixture(scope='session')
def two_command_lines(segment_command, tmp_path_factory):
    with closing(Forks(tmp_path_factory.mktemp('other_command'), 'vt_zoo.cli', *SEGMENT_MODULES)) as other:
        yield [segment_command, other.command]


@pytest.fixture
def two_processes(two_command_lines):
    """Runs a command in two processes at once, in the environment that `accelerate launch` gives them."""
    def run_both(*words, before=''):
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]

        def one(rank):
            environment = {
                'RANK': rank, 'LOCAL_RANK': rank, 'WORLD_SIZE': 2, 'LOCAL_WORLD_SIZE': 2, 'MASTER_ADDR': '127.0.0.1',
                'MASTER_PORT': port, 'ACCELERATE_USE_CPU': 'true'}
            environment = {name: str(value) for name, value in environment.items()}
            return two_command_lines[rank](*words, before=before, environment=environment, timeout=120)

        with ThreadPoolExecutor() as pool:
            return list(pool.map(one, range(2)))
    return run_both

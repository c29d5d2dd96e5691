"""timm's own tests of its models, from the sdist of the installed version, pass on the models of vt_zoo."""
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

import pytest
import timm
from hub_server import hub_server
from safetensors.torch import save_file
from timm_plugin import registered_models

import vt_zoo
from vt_zoo._requirements import timm_is_at_least

TESTS_PER_MODEL = 10 if timm_is_at_least('1.0.31') else 9  # for a model with one tag and no weights
MODELS = ['test_vt_resnet', 'vt_mobilenetv4_conv_small']
LARGER_MODELS = [
    'vt_resnet18', 'vt_resnet34', 'vt_resnet50', 'vt_resnet101', 'vt_net', 'vt_resnet50d', 'vt_resnext50_32x4d',
    'vt_regnety_016', 'vt_convnext_tiny', 'vt_efficientnet_b0', 'vt_tf_efficientnet_lite0']
pytestmark = pytest.mark.timm_suite
TEST_TIMEOUT = 900  # seconds; timm's 120 to 360 are for an idle machine


def _timm_sdist(cache_dir):
    """Path of the sdist of the installed timm, downloaded unless it is in cache_dir."""
    sdists = list(cache_dir.glob('timm-*.tar.gz'))
    if not sdists:
        command = [
            sys.executable, '-m', 'pip', 'download', '--quiet', '--retries', '1', '--no-deps', '--no-binary', 'timm',
            '--dest', cache_dir, f'timm=={timm.__version__}',
        ]
        pip = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if pip.returncode != 0:
            give_up = pytest.fail if os.environ.get('CI') else pytest.skip
            give_up(f'pip could not download the sdist of timm {timm.__version__}: {pip.stderr.strip()[-1000:]}')
        sdists = list(cache_dir.glob('timm-*.tar.gz'))
    return sdists[0]


@pytest.fixture
def timm_tests(pytestconfig, tmp_path):
    """Folder with timm's tests and pytest settings. Its source stays out, so that the installed timm is tested."""
    sdist = _timm_sdist(pytestconfig.cache.mkdir(f'timm-{timm.__version__}'))
    with tarfile.open(sdist) as tar:
        wanted = [m for m in tar if PurePosixPath(m.name).parts[1:2] in [('tests',), ('pyproject.toml',)]]
        tar.extractall(tmp_path, wanted, filter='data')
    return tmp_path / f'timm-{timm.__version__}'


@pytest.fixture(params=[
    pytest.param(MODELS, id='models'), pytest.param(LARGER_MODELS, id='larger_models', marks=pytest.mark.slow)])
def tested_models(request):
    return request.param


@pytest.fixture
def hub(tested_models, tmp_path):
    """A hub with the ResNets whose trunks the models' tags name; their weights are random."""
    tagged = timm.list_pretrained([f'{name}.trunk_*' for name in tested_models])
    ids = {timm.models.get_pretrained_cfg(name).hf_hub_id for name in tagged}
    for hub_id in ids:
        folder = tmp_path / 'hub' / hub_id
        folder.mkdir(parents=True)
        resnet = timm.create_model(hub_id.split('/')[1].split('.')[0])
        save_file(resnet.state_dict(), folder / 'model.safetensors')
    with hub_server(tmp_path / 'hub') as server:
        yield server
    assert {path.split('/resolve/')[0].strip('/') for _, path in server.requests if '/resolve/' in path} == ids


def _environment(hub, home):
    """Environment for timm's tests, without what would make pytest or timm run them otherwise or leave some out."""
    env = {k: v for k, v in os.environ.items() if k not in ('GITHUB_ACTIONS', 'PYTEST_ADDOPTS', 'PYTEST_PLUGINS')}
    env['PYTEST_DISABLE_PLUGIN_AUTOLOAD'] = '1'
    env['PYTHONPATH'] = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(vt_zoo.__file__).parents[1])])
    env['TIMEOUT'] = str(TEST_TIMEOUT)
    env.update(HF_ENDPOINT=hub.url, HF_HOME=str(home), HF_HUB_DISABLE_XET='1')
    return env


def test_timm_suite(timm_tests, tested_models, hub, tmp_path):
    report = tmp_path / 'report.xml'
    command = [
        sys.executable, '-m', 'pytest', '-p', 'timm_plugin', '-p', 'pytest_timeout', '-p', 'no:cacheprovider',
        '-o', 'addopts=', '--disable-warnings', '--tb=short', f'--junit-xml={report}', 'tests/test_models.py',
        '-k', ' or '.join(tested_models),
    ]
    run = subprocess.run(command, cwd=timm_tests, env=_environment(hub, tmp_path / 'home'))
    assert report.exists(), f'pytest ended with exit status {run.returncode} before it wrote a report'

    passed = Counter()
    not_passed = []
    for case in ElementTree.parse(report).iter('testcase'):
        outcomes = [child.tag for child in case if child.tag in ('error', 'failure', 'skipped')]
        if outcomes:
            not_passed.append(f'{case.get("name")}: {", ".join(outcomes)}')
        else:
            passed[case.find('properties/property[@name="model"]').get('value')] += 1
    assert not not_passed
    assert run.returncode == 0
    too_few = {name: passed[name] for name in tested_models if passed[name] < TESTS_PER_MODEL}
    assert not too_few, f'fewer than {TESTS_PER_MODEL} tests ran'


def test_each_model_is_tested():
    assert sorted([*MODELS, *LARGER_MODELS]) == sorted(registered_models())

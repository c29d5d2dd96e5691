"""Models from a hub on the loopback, by the hub's real client: downloads, cache, damage."""
import json
import subprocess
import sys

import pytest
import timm
import torch
from hub_server import environment, hub_server, newer_client

from vt_zoo.weights.files import write_model
from vt_zoo.weights.loading import load_model

NAME = 'hf-hub:someone/digits'
MB = 1_000_000


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return timm.create_model('test_vt_resnet', num_classes=3).eval()


@pytest.fixture
def hub(model, tmp_path):
    """A hub with a model that we wrote."""
    write_model(tmp_path / 'hub' / 'someone' / 'digits', model, ['a', 'b', 'c'], {'input_size': (3, 32, 32)})
    with hub_server(tmp_path / 'hub') as server:
        yield server


@pytest.fixture
def client(hub, hub_client):
    """This process's client asks our hub; gives the folder of its cache."""
    return hub_client(hub.url)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def downloads(hub):
    return [path.rsplit('/', 1)[1] for method, path in hub.requests if method == 'GET' and '/resolve/' in path]


def files(folder, pattern='*'):
    return [p for p in folder.rglob(pattern) if p.is_file() and not p.is_symlink()]


@pytest.mark.parametrize('load', [load_model, lambda name: timm.create_model(name, pretrained=True)])
def test_download(hub, client, model, load):
    assert same(load(NAME), model)
    assert sorted(downloads(hub)) == ['config.json', 'model.safetensors']


def test_hub_that_went_away(hub, hub_client, model):
    hub_client(hub.url)
    load_model(NAME)
    hub_client('http://127.0.0.1:9')
    assert same(load_model(NAME), model)


def test_command_offline(command, hub, few_digits, tmp_path):
    """The client's own environment variables, the second time in a real process."""
    picture = sorted((few_digits / 'val' / '1').iterdir())[0]
    words = ['predict', picture, '--model', NAME, '--json']
    online = command(*words, environment=environment(hub, tmp_path / 'home'))
    offline = subprocess.run(
        [sys.executable, '-m', 'vt_zoo', *words], capture_output=True, text=True,
        env=environment(hub, tmp_path / 'home', HF_HUB_OFFLINE='1', HF_ENDPOINT='http://127.0.0.1:9'))
    assert online.code == offline.returncode == 0, online.stderr + offline.stderr
    assert json.loads(online.stdout) == json.loads(offline.stdout)
    assert len(downloads(hub)) == 2


def test_revision(hub, client, model):
    assert same(load_model(f'{NAME}@v1.0'), model)
    assert {path for _, path in hub.requests if path.endswith('.safetensors')} == {
        '/someone/digits/resolve/v1.0/model.safetensors'}


@newer_client
def test_broken_download_begins_anew(hub, client, model):
    hub.fault = MB
    assert same(load_model(NAME), model)
    assert downloads(hub).count('model.safetensors') == 2


@newer_client
def test_truncated_file(hub, client, model, input_error):
    hub.fault = lambda content: content[:-100]
    with input_error(f'{NAME} cannot be loaded: .*size'):
        load_model(NAME)
    assert files(client, '*incomplete*') == []
    assert same(load_model(NAME), model)
    assert downloads(hub).count('model.safetensors') == 2


def test_altered_file(hub, client, model, input_error):
    """Over HTTP the client does not look at the content, so that timm takes it; load_model refuses."""
    hub.fault = lambda content: content[:-1] + bytes([content[-1] ^ 1])
    assert not same(timm.create_model(NAME, pretrained=True), model)
    with input_error(f'{NAME} cannot be loaded: .* not what the hub announced, delete /'):
        load_model(NAME)
    file, = (p for p in files(client) if p.stat().st_size > MB)
    file.unlink()
    assert same(load_model(NAME), model)


def test_no_such_repository(client, input_error):
    with input_error('hf-hub:someone/else cannot be loaded: the hub has no such repository'):
        load_model('hf-hub:someone/else')


def test_pickle_on_the_hub(hub, client, tmp_path, input_error):
    folder = tmp_path / 'hub' / 'someone' / 'digits'
    (folder / 'model.safetensors').unlink()
    torch.save({}, folder / 'pytorch_model.bin')
    with input_error(f'{NAME} cannot be loaded: the hub has no such repository, revision or file'):
        load_model(NAME)
    assert downloads(hub) == []

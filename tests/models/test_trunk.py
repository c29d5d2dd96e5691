"""Weights of timm's ResNets as trunks: what is taken, what stays new, and what is refused."""
import json
import logging
import signal

import pytest
import timm
import torch
from hub_server import hub_server
from safetensors.torch import save_file

TRUNKS = {
    'vt_resnet18.trunk_a1_in1k': 'resnet18.a1_in1k',
    'vt_resnet34.trunk_ra4_e3600_r224_in1k': 'resnet34.ra4_e3600_r224_in1k',
    'vt_resnet50.trunk_a1_in1k': 'resnet50.a1_in1k',
    'vt_resnet101.trunk_a1h_in1k': 'resnet101.a1h_in1k',
}


def load(name, resnet, **kwargs):
    """The model as timm makes it when these are the weights that it finds."""
    state_dict = resnet.state_dict() if isinstance(resnet, torch.nn.Module) else resnet
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={'state_dict': dict(state_dict)}, **kwargs)


@pytest.fixture(scope='module')
def resnet18():
    torch.manual_seed(0)
    return timm.create_model('resnet18')


def test_names():
    assert timm.list_models('vt_*', 'vt_resnet', pretrained=True, include_tags=True) == [*TRUNKS]


@pytest.mark.parametrize('name', [name.split('.')[0] for name in TRUNKS])
def test_bare_name_has_no_weights(name):
    with pytest.raises(RuntimeError, match=f'No pretrained weights exist for {name}'):
        timm.create_model(name, pretrained=True)


@pytest.mark.parametrize(('name', 'resnet'), TRUNKS.items())
def test_config_is_that_of_the_resnet(name, resnet):
    ours, timms = (timm.models.get_pretrained_cfg(n) for n in (name, resnet))
    assert ours.hf_hub_id == timms.hf_hub_id == f'timm/{resnet}'
    for key in ('mean', 'std', 'interpolation', 'input_size', 'num_classes', 'first_conv', 'classifier'):
        assert getattr(ours, key) == getattr(timms, key), key


@pytest.mark.parametrize(('name', 'resnet'), TRUNKS.items())
def test_trunk_is_taken(name, resnet):
    resnet = timm.create_model(resnet.split('.')[0])
    given, model = resnet.state_dict(), load(name, resnet).state_dict()
    assert {k for k in given if k not in model} == {k for k in given if k.startswith('layer4.')}
    trunk = {k for k in given if not k.startswith(('layer4.', 'fc.'))}
    assert {k for k in model if k not in trunk} == {k for k in model if k.startswith(('vt_stage.', 'fc.'))}
    assert all(torch.equal(model[k], given[k]) for k in trunk)


def test_stage_and_classifier_are_new(resnet18):
    torch.manual_seed(1)
    new = timm.create_model('vt_resnet18').state_dict()
    torch.manual_seed(1)
    model = load('vt_resnet18.trunk_a1_in1k', resnet18).state_dict()
    for key in model:
        if key.startswith(('vt_stage.', 'fc.')):
            assert torch.equal(model[key], new[key]), key


def test_stage_of_the_resnet_is_not_needed_to_be_right(resnet18):
    """Of layer4 and fc nothing is read."""
    state_dict = {
        k: torch.zeros(1) if k.startswith(('layer4.', 'fc.')) else v for k, v in resnet18.state_dict().items()}
    assert torch.equal(load('vt_resnet18.trunk_a1_in1k', state_dict).conv1.weight, resnet18.conv1.weight)


def test_maps_are_those_of_the_resnet(resnet18):
    x = torch.randn(2, 3, 64, 64)
    model = load('vt_resnet18.trunk_a1_in1k', resnet18, features_only=True).eval()
    expected = resnet18.eval().forward_intermediates(x, intermediates_only=True)
    for ours, timms in zip(model(x)[:4], expected[:4]):
        torch.testing.assert_close(ours, timms)


@pytest.mark.parametrize(
    'kwargs', [{'num_classes': 10}, {'num_classes': 0}, {'tokenizer': 'clustering'}, {'num_tokens': 8}])
def test_arguments(resnet18, kwargs):
    model = load('vt_resnet18.trunk_a1_in1k', resnet18, **kwargs).eval()
    assert torch.equal(model.layer3[1].conv2.weight, resnet18.layer3[1].conv2.weight)
    width = kwargs.get('num_classes', 1000) or model.num_features
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, width)


def test_other_channels(resnet18):
    """timm's own adaptation: one channel gets the sum over the three."""
    model = load('vt_resnet18.trunk_a1_in1k', resnet18, in_chans=1)
    torch.testing.assert_close(model.conv1.weight, resnet18.conv1.weight.sum(1, keepdim=True))


def test_warning(resnet18, caplog):
    with caplog.at_level(logging.WARNING, 'vt_zoo'):
        load('vt_resnet18.trunk_a1_in1k', resnet18)
    message, = caplog.messages
    assert 'Only the trunk is pretrained' in message


@pytest.mark.parametrize(('name', 'resnet'), [
    ('vt_resnet34.trunk_ra4_e3600_r224_in1k', 'resnet18'), ('vt_resnet18.trunk_a1_in1k', 'resnet34'),
    ('vt_resnet50.trunk_a1_in1k', 'resnet101'), ('vt_resnet18.trunk_a1_in1k', 'resnet18d')])
def test_another_resnet(name, resnet):
    with pytest.raises(RuntimeError, match=r'another trunk than this model: \d+ names differ, the first is \S+'):
        load(name, timm.create_model(resnet))


@pytest.mark.parametrize('change', ['missing', 'unexpected'])
def test_a_key_that_differs(resnet18, change):
    state_dict = resnet18.state_dict()
    if change == 'missing':
        del state_dict['layer2.0.bn1.weight']
    else:
        state_dict['layer2.0.bn1.extra'] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r'1 names differ, the first is layer2\.0\.bn1\.\w+'):
        load('vt_resnet18.trunk_a1_in1k', state_dict)


@pytest.fixture
def hub(resnet18, tmp_path):
    """A hub that holds a ResNet-18."""
    folder = tmp_path / 'hub' / 'timm' / 'resnet18.a1_in1k'
    folder.mkdir(parents=True)
    save_file(resnet18.state_dict(), folder / 'model.safetensors')
    with hub_server(tmp_path / 'hub') as server:
        yield server


@pytest.fixture
def run_finetune(command, few_digits, tiny_arguments, tmp_path):
    """`vt-zoo finetune` into tmp_path/run, with other settings of the hub's client than this process has."""
    def run(*words, out='run', before='', **environment):
        return command(
            'finetune', few_digits, *tiny_arguments[2:], '--out', tmp_path / out, *words, before=before, environment={
                'HF_HOME': str(tmp_path / 'home'), 'HF_HUB_DISABLE_XET': '1', 'HF_HUB_DISABLE_TELEMETRY': '1',
                **environment})
    return run


def tag_of(out):
    training = json.loads((out / 'model' / 'config.json').read_text())['training']
    return training['arguments']['model'].partition('.')[2]


def test_finetune_takes_the_trunk_by_default(run_finetune, hub, tmp_path):
    for environment in ({'HF_ENDPOINT': hub.url}, {'HF_HUB_OFFLINE': '1'}):  # then from the client's cache
        result = run_finetune('--epochs', 1, '--overwrite', **environment)
        assert result.code == 0, result.stderr
        assert 'starting from vt_resnet18.trunk_a1_in1k' in result.stderr
        assert 'Only the trunk is pretrained' in result.stderr
        assert tag_of(tmp_path / 'run') == 'trunk_a1_in1k'
    assert ('GET', '/timm/resnet18.a1_in1k/resolve/main/model.safetensors') in hub.requests


def test_finetune_that_is_to_begin_new(run_finetune, hub, tmp_path):
    result = run_finetune('--epochs', 1, '--model', 'vt_resnet18.untrained', HF_ENDPOINT=hub.url)
    assert result.code == 0, result.stderr
    assert hub.requests == []
    assert tag_of(tmp_path / 'run') == 'untrained'


@pytest.mark.parametrize(
    'environment', [{'HF_HUB_OFFLINE': '1'}, {'HF_ENDPOINT': 'http://127.0.0.1:9'}], ids=['offline', 'refused'])
def test_finetune_without_the_hub(run_finetune, tmp_path, environment):
    result = run_finetune('--epochs', 1, **environment)
    assert result.code == 2
    sentence, = result.stderr.splitlines()  # without the client's retries, which would take 23 seconds
    assert sentence.startswith(
        'vt-zoo: error: model vt_resnet18 starts from the trunk timm/resnet18.a1_in1k, which the hub does not give (')
    assert sentence.endswith('): model vt_resnet18.untrained starts from random weights')
    assert not (tmp_path / 'run').exists()


def test_finetune_without_the_hub_that_is_named(run_finetune, tmp_path):
    result = run_finetune('--model', 'vt_resnet18.trunk_a1_in1k', HF_HUB_OFFLINE='1')
    assert result.code == 2
    sentence = result.stderr.splitlines()[-1]
    assert sentence.startswith('vt-zoo: error: model vt_resnet18.trunk_a1_in1k cannot be loaded: ')
    assert 'Traceback' not in result.stderr
    assert not (tmp_path / 'run').exists()


def test_resuming_needs_no_hub(run_finetune, signal_at, hub, tmp_path):
    first, then = {'HF_ENDPOINT': hub.url}, {'HF_HUB_OFFLINE': '1', 'HF_HOME': str(tmp_path / 'empty')}
    in_second_epoch = signal_at('timm.utils.ModelEmaV3.update', 6, signal.SIGKILL)
    assert run_finetune(out='whole', **first).code == 0
    assert run_finetune(before=in_second_epoch, **first).code == -signal.SIGKILL
    hub.requests.clear()
    result = run_finetune('--resume', **then)
    assert result.code == 0, result.stderr
    assert 'resuming after epoch 1 of 2' in result.stderr
    assert hub.requests == []
    assert tag_of(tmp_path / 'run') == 'trunk_a1_in1k'
    for file in ('model.safetensors', 'config.json'):
        assert (tmp_path / 'run' / 'model' / file).read_bytes() == (tmp_path / 'whole' / 'model' / file).read_bytes()


def test_own_weights_are_not_taken_for_a_trunk(caplog):
    model = timm.create_model('vt_resnet18')
    copy = load('vt_resnet18.trunk_a1_in1k', model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), copy.state_dict().values()))
    assert caplog.messages == []

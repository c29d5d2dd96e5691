"""Checkpoints of timm's train.py in timm's hub layout, and files that are refused."""
import argparse
import json
import os
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch
from helpers import files, needs_timm_that_reads_folders, tree
from huggingface_hub import load_torch_model
from timm.utils import CheckpointSaver, ModelEmaV3

from vt_zoo.weights.conversion import convert
from vt_zoo.weights.loading import load_model

ARGUMENTS = {  # some of those that train.py keeps
    'model': 'test_vt_resnet', 'num_classes': 3, 'img_size': 48, 'in_chans': None, 'input_size': None, 'gp': None,
    'mean': [0.1, 0.2, 0.3], 'crop_pct': 0.9, 'model_kwargs': {'num_tokens': 8}, 'lr': 0.02, 'opt': 'sgd', 'epochs': 5,
    'data_dir': '/home/me/secret', 'output': '/home/me/secret', 'eval_metric': 'top1', 'pretrained': False,
    'kd_model_name': 'local-dir:/home/me/secret', 'model_ema_force_cpu': False, 'scale': [0.1, 1.0]}


def create(name='test_vt_resnet', num_classes=3, seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=num_classes, **kwargs).eval()


def save(folder, ema=True, trained=None, **arguments):
    """Checkpoints as timm's saver writes them: a model of random weights, and another as its moving average."""
    folder.mkdir(exist_ok=True)
    model = trained or create(num_tokens=8)
    average = ModelEmaV3(model) if ema else None
    if ema:
        average.module.load_state_dict(create(num_tokens=8, seed=1).state_dict())
    saver = CheckpointSaver(
        model, torch.optim.SGD(model.parameters(), 0.1), args=argparse.Namespace(**{**ARGUMENTS, **arguments}),
        model_ema=average, checkpoint_dir=str(folder), recovery_dir=str(folder))
    saver.save_checkpoint(3, metric=62.5)
    saver.save_recovery(3, 7)
    return folder / 'last.pth.tar'


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
    """Folder of timm's saver, with a moving average. Not to be changed."""
    return save(tmp_path_factory.mktemp('checkpoints')).parent


@pytest.fixture
def last(checkpoints):
    return checkpoints / 'last.pth.tar'


def config(folder):
    return json.loads((folder / 'config.json').read_text())


def same(model, state_dict):
    return all(torch.equal(v, state_dict[k]) for k, v in model.state_dict().items())


@needs_timm_that_reads_folders
@pytest.mark.parametrize('name', ['last.pth.tar', 'model_best.pth.tar', 'checkpoint-3.pth.tar'])
@pytest.mark.parametrize('ema', [None, True, False])
def test_weights_and_moving_average(checkpoints, tmp_path, name, ema):
    converted = convert(checkpoints / name, tmp_path / 'out', ema=ema)
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert same(model, create(num_tokens=8, seed=0 if ema is False else 1).state_dict())
    assert (converted.name, converted.epoch) == ('test_vt_resnet', 4)
    assert converted.weights == ('weights as trained' if ema is False else 'moving average')


def test_checkpoint_without_moving_average(tmp_path, input_error):
    path = save(tmp_path / 'run', ema=False)
    convert(path, tmp_path / 'out')
    assert same(load_model(str(tmp_path / 'out')), create(num_tokens=8).state_dict())
    with input_error('holds no moving average: leave --ema out'):
        convert(path, tmp_path / 'ema', ema=True)


def test_recovery_checkpoint(checkpoints, tmp_path):
    """Amid an epoch, which then counts for nothing."""
    assert convert(checkpoints / 'recovery-3-7.pth.tar', tmp_path / 'out').epoch is None
    assert not {'epochs', 'top1'} & set(config(tmp_path / 'out')['training'])


def test_preprocessing_and_arguments_of_the_training_are_kept_without_paths(last, tmp_path):
    convert(last, tmp_path / 'out')
    model = load_model(str(tmp_path / 'out'))
    data = timm.data.resolve_model_data_config(model)
    assert (list(data['input_size']), list(data['mean']), data['crop_pct']) == ([3, 48, 48], [0.1, 0.2, 0.3], 0.9)
    assert data['std'] == model.default_cfg['std']
    assert config(tmp_path / 'out')['training']['arguments'] == {
        'model': 'test_vt_resnet', 'num_classes': 3, 'img_size': 48, 'model_kwargs': {'num_tokens': 8}, 'lr': 0.02,
        'opt': 'sgd', 'epochs': 5, 'pretrained': False, 'kd_model_name': 'a local folder', 'scale': [0.1, 1.0]}
    assert 'secret' not in (tmp_path / 'out' / 'config.json').read_text()


@pytest.mark.parametrize('ema, force_cpu, measured', [(True, False, True), (False, False, False), (False, True, True)])
def test_metric_is_kept_where_it_is_of_these_weights(tmp_path, ema, force_cpu, measured):
    """train.py measures the moving average, unless that is kept on the CPU."""
    convert(save(tmp_path / 'run', model_ema_force_cpu=force_cpu), tmp_path / 'out', ema=ema)
    assert config(tmp_path / 'out')['training'].get('top1') == (62.5 if measured else None)


@pytest.mark.parametrize('name, pretrained, base', [
    ('vt_resnet18.trunk_a1_in1k', True, 'timm/resnet18.a1_in1k'), ('vt_resnet18.trunk_a1_in1k', False, None)])
def test_base_model(tmp_path, name, pretrained, base):
    path = save(
        tmp_path / 'run', ema=False, trained=create('vt_resnet18'), model=name, model_kwargs={}, pretrained=pretrained)
    convert(path, tmp_path / 'out')
    assert config(tmp_path / 'out')['training'].get('base_model') == base


def test_pretrained_trunk(tmp_path, monkeypatch):
    """It is not fetched again, and the model says where it came from."""
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    kwargs = {'trunk': 'regnety_002', 'token_dim': 32}
    path = save(
        tmp_path / 'run', ema=False, trained=timm.create_model('vt_net', num_classes=3, **kwargs), model='vt_net',
        model_kwargs={**kwargs, 'trunk_pretrained': True})
    convert(path, tmp_path / 'out')
    training = config(tmp_path / 'out')['training']
    assert (training['pretrained'], training['base_model']) == (True, 'timm/regnety_002.pycls_in1k')


@pytest.mark.parametrize('kind', ['safetensors', 'pickle', 'of DDP'])
def test_state_dict_alone(tmp_path, kind, input_error):
    state_dict = create(num_classes=5).state_dict()
    path = tmp_path / ('a.safetensors' if kind == 'safetensors' else 'a.pth')
    if kind == 'safetensors':
        safetensors.torch.save_file(state_dict, path)
    else:
        torch.save({f'module.{k}': v for k, v in state_dict.items()} if kind == 'of DDP' else state_dict, path)
    convert(path, tmp_path / 'out', name='test_vt_resnet')
    model = load_model(str(tmp_path / 'out'))
    assert same(model, state_dict)
    assert model.num_classes == 5
    assert 'training' not in config(tmp_path / 'out')
    with input_error('a.*does not say which model it is for: add --model NAME'):
        convert(path, tmp_path / 'other')


def test_state_dict_of_a_distilled_model(tmp_path):
    """It has two classifiers."""
    name = 'deit_tiny_distilled_patch16_224'
    state_dict = timm.create_model(name, num_classes=5).state_dict()
    torch.save(state_dict, tmp_path / 'a.pth')
    convert(tmp_path / 'a.pth', tmp_path / 'out', name=name)
    assert same(load_model(str(tmp_path / 'out')), state_dict)


@needs_timm_that_reads_folders
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(last, tmp_path, dtype):
    convert(last, tmp_path / 'whole')
    convert(last, tmp_path / 'half', dtype=dtype)
    sizes = [(tmp_path / name / 'model.safetensors').stat().st_size for name in ('half', 'whole')]
    assert sizes[0] < 0.52 * sizes[1]
    whole = load_model(str(tmp_path / 'whole')).state_dict()
    expected = {k: v.to(dtype) if v.is_floating_point() else v for k, v in whole.items()}
    model = timm.create_model(f'local-dir:{tmp_path / "half"}', pretrained=True)
    assert same(model, {k: v.float() if v.is_floating_point() else v for k, v in expected.items()})
    half = timm.create_model(f'local-dir:{tmp_path / "half"}', pretrained=True, dtype=dtype)
    assert same(half, expected)


def test_weights_that_do_not_fit_into_half(tmp_path, input_error):
    model = create(num_tokens=8)
    model.bn1.running_var.fill_(1e6)
    path = save(tmp_path / 'run', ema=False, trained=model)
    with input_error('bn1.running_var do not fit into torch.float16: use bfloat16'):
        convert(path, tmp_path / 'out', dtype=torch.float16)
    convert(path, tmp_path / 'out', dtype=torch.bfloat16)


@needs_timm_that_reads_folders
def test_shards(last, tmp_path):
    """Which timm does not read, as the help of the command says, unless there is one."""
    convert(last, tmp_path / 'out', max_shard_size='300KB')
    shards = sorted((tmp_path / 'out').glob('model-*.safetensors'))
    assert len(shards) > 2
    assert not (tmp_path / 'out' / 'model.safetensors').exists()
    expected = create(num_tokens=8, seed=1).state_dict()
    model = load_model(str(tmp_path / 'out'))
    assert same(model, expected)
    assert 'state_dict' not in model.pretrained_cfg
    assert load_model(str(tmp_path / 'out'), num_classes=7).fc.out_features == 7
    other = create(num_tokens=8, seed=2)
    load_torch_model(other, tmp_path / 'out')
    assert same(other, expected)
    with pytest.raises(RuntimeError, match='Missing key'):
        timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    convert(last, tmp_path / 'one', max_shard_size='1GB')
    assert files(tmp_path / 'one') == ['config.json', 'model.safetensors']


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize('make, match', [
    (lambda run: {'epoch': 3}, 'holds no weights'), (lambda run: [1, 2], 'holds no weights'),
    (lambda run: torch.zeros(3), 'holds no weights'), (lambda run: {'state_dict': {'x': 'text'}}, 'holds no weights'),
    (lambda run: {'state_dict': {}}, 'holds no weights'),
    (lambda run: {'state_dict': {'fc.weight': torch.zeros(3, 128)}},
     r'is not of test_vt_resnet with 3 classes: \d+ of its'),
    (lambda run: {**create().state_dict(), 'conv1.weight': create().state_dict()['conv1.weight'].to(torch.int8)},
     r'weights conv1\.weight of type torch\.int8, which is not floating point'),
    (lambda run: {'state_dict': create().state_dict(), 'x': Malicious(run)}, 'is not read: it holds posix.mkdir'),
    (lambda run: create(), r'holds vt_zoo\.models\.vt_resnet\.VTResNet, only tensors and plain values are read')])
def test_content_that_is_no_checkpoint(tmp_path, make, match, input_error):
    torch.save(make(str(tmp_path / 'run')), tmp_path / 'a.pth')
    with input_error(match):
        convert(tmp_path / 'a.pth', tmp_path / 'out', name='test_vt_resnet')
    (tmp_path / 'a.pth').rename(tmp_path / 'a.safetensors')
    with input_error('a.safetensors cannot be read'):
        convert(tmp_path / 'a.safetensors', tmp_path / 'out', name='test_vt_resnet')
    assert os.listdir(tmp_path) == ['a.safetensors'], 'nothing was run'


@pytest.mark.parametrize('damage', [
    lambda data: data[:len(data) // 2], lambda data: b'', lambda data: b'Not found\n',
    lambda data: data[:len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1:]],
    ids=['truncated', 'empty', 'text', 'altered'])
def test_damaged_checkpoint(last, tmp_path, damage, input_error):
    path = tmp_path / 'last.pth.tar'
    path.write_bytes(damage(last.read_bytes()))
    before = tree(tmp_path)
    with input_error(f'{path} (is damaged|is not read)'):
        convert(path, tmp_path / 'out')
    assert tree(tmp_path) == before


@pytest.mark.parametrize('arguments, match', [
    ({'model': 'no_such_model'}, "'no_such_model' is neither"),
    ({'model': 'vt_resnet18'}, 'is not of vt_resnet18 with 3 classes: .* of its weights differ, the first missing is'),
    ({'num_classes': 7}, r'is not of test_vt_resnet with 7 classes: 2 of its weights differ, the first is fc\.weight'),
    ({'model_kwargs': {'no_such_argument': 1}}, 'asks for a test_vt_resnet that cannot be made: .*no_such_argument'),
    ({'model': 3}, 'does not say which model'),
    ({'mean': [0.1, 0.2]}, 'cannot be written as a model')])
def test_arguments_that_do_not_fit(tmp_path, arguments, match, input_error):
    path = save(tmp_path / 'run', ema=False, **arguments)
    with input_error(match):
        convert(path, tmp_path / 'out')
    assert os.listdir(tmp_path) == ['run']


@pytest.fixture
def refuse(command):
    """Runs `convert` and checks for one sentence."""
    def run(*words, holds, **kwargs):
        result = command('convert', *words, **kwargs)
        assert (result.code, result.stdout, len(result.lines)) == (2, '', 1), result.stderr
        assert result.lines[0].startswith('vt-zoo')
        assert holds in result.lines[0]
    return run


def test_command(command, last, tmp_path):
    result = command('convert', last, '--out', tmp_path / 'out', '--no-ema', '--dtype', 'bfloat16')
    assert (result.code, result.stderr) == (0, '')
    assert result.stdout == f'weights    test_vt_resnet, weights as trained of epoch 4\nmodel      {tmp_path / "out"}\n'
    assert safetensors.torch.load_file(tmp_path / 'out' / 'model.safetensors')['fc.bias'].dtype == torch.bfloat16


def test_command_refuses(refuse, last, tmp_path):
    (tmp_path / 'mine').mkdir()
    refuse(last, '--out', tmp_path / 'mine', holds='is there already')
    refuse(tmp_path / 'none', '--out', tmp_path / 'out', holds='none does not exist')
    refuse(tmp_path, '--out', tmp_path / 'out', holds='is a folder, name a file in it')
    refuse(last, '--out', tmp_path / 'out', '--max-shard-size', 'lots', holds="'lots' is not a size such as 500MB")
    refuse(last, '--out', tmp_path / 'out', '--dtype', 'int8', holds='int8')
    assert os.listdir(tmp_path) == ['mine']


@pytest.mark.parametrize('words', [[], ['--max-shard-size', '600KB']])
def test_full_disk(refuse, limit_file_size, last, tmp_path, words):
    refuse(last, '--out', tmp_path / 'out', *words, holds='cannot read or write', before=limit_file_size(500_000))
    assert os.listdir(tmp_path) == []


def test_full_file_system(last, tmp_path):
    """A real one of one megabyte, where this machine lets us mount it."""
    mount = f'mount -t tmpfs -o size=1m none {tmp_path}'
    if subprocess.run(['unshare', '-rm', 'sh', '-c', mount], capture_output=True).returncode != 0:
        pytest.skip('file systems cannot be mounted here')
    command = f'{sys.executable} -m vt_zoo convert {last} --out {tmp_path}/out; echo code $?; ls -A {tmp_path}'
    process = subprocess.run(['unshare', '-rm', 'sh', '-c', f'{mount} && {command}'], capture_output=True, text=True)
    assert process.stdout == 'code 2\n'
    assert 'No space left on device' in process.stderr
    assert 'Traceback' not in process.stderr


def test_one_channel_without_a_mean(tmp_path):
    """As of `train.py --input-size 1 64 64`: what timm trains with is the average over the model's own channels."""
    model = timm.create_model('test_vt_resnet', num_classes=3, in_chans=1)
    args = argparse.Namespace(input_size=[1, 64, 64], in_chans=None, img_size=None, mean=None, std=None, num_classes=3)
    torch.save({'arch': 'test_vt_resnet', 'args': args, 'state_dict': model.state_dict()}, tmp_path / 'last.pth.tar')
    convert(tmp_path / 'last.pth.tar', tmp_path / 'out')
    cfg = json.loads((tmp_path / 'out' / 'config.json').read_text())['pretrained_cfg']
    own = model.pretrained_cfg
    assert cfg['input_size'] == [1, 64, 64]
    assert (cfg['mean'], cfg['std']) == ([pytest.approx(sum(own['mean']) / 3)], [pytest.approx(sum(own['std']) / 3)])

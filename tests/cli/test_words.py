"""What the options of the commands say, take and refuse."""
import argparse
import json

import pytest
import torch

from vt_zoo.cli.main import create_parser, main
from vt_zoo.devices import find_device
from vt_zoo.export.formats import default_out
from vt_zoo.export.int8 import quantize


def options(parser, name='vt-zoo'):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, command in action.choices.items():
                yield from options(command, f'{name} {word}')
        else:
            yield name, action


OPTIONS = list(options(create_parser()))


@pytest.mark.parametrize('command, action', OPTIONS, ids=lambda value: getattr(value, 'dest', value))
def test_help_of_each_option(command, action):
    assert action.help
    assert 'YAML' not in action.help or action.dest == 'config'
    if command == 'vt-zoo segment train' and action.dest.startswith('set_'):
        assert "(default: the recipe's, else " in action.help
        assert action.metavar


@pytest.mark.parametrize('command', sorted({command for command, _ in OPTIONS}))
def test_help_names_no_default_that_is_none(command, capsys):
    with pytest.raises(SystemExit) as e:
        main([*command.split()[1:], '--help'])
    text = capsys.readouterr().out
    assert e.value.code == 0
    assert not any(f'(default: {value}' in text for value in ('None', 'False', '('))


@pytest.mark.parametrize('command', ['finetune', 'segment train'])
@pytest.mark.parametrize('device', ['abacus', 'cuda:99', '', 'mps', 'cuda'])
def test_wrong_device(command, device, tmp_path, capsys):
    if device in ('mps', 'cuda') and getattr(torch, device).is_available():
        pytest.skip('it is there')
    data = ['--data-dir', str(tmp_path)] if 'segment' in command else [str(tmp_path)]
    try:
        code = main([*command.split(), *data, '--out', str(tmp_path / 'out'), '--device', device])
    except SystemExit as e:
        code = e.code
    lines = capsys.readouterr().err.splitlines()
    assert (code, len(lines)) == (2, 1), lines
    assert 'device' in lines[0]
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('device', ['abacus', 'cuda:99', 'meta', 'xla'])
def test_device_from_python(device, input_error):
    with input_error(f'device must be cpu, cuda or mps and be on this machine, got {device}'):
        find_device(device)


@pytest.mark.parametrize('name, file_format, expected', [
    ('test_vt_resnet', 'onnx', 'test_vt_resnet.onnx'), ('test_vt_resnet.digits', 'pt2', 'test_vt_resnet.digits.pt2'),
    ('hf-hub:me/digits', 'torchscript', 'digits.pt'), ('run/model', 'onnx', 'run/model.onnx'),
    ('run/model/', 'aoti', 'run/model.pt2'), ('local-dir:run/model', 'onnx', 'run/model.onnx')])
def test_name_of_an_exported_file(name, file_format, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'run' / 'model').mkdir(parents=True)
    assert str(default_out(name, file_format)) == expected
    monkeypatch.chdir(tmp_path / 'run' / 'model')
    assert default_out('.', file_format).parent == tmp_path / 'run'


def test_folder_where_the_exported_file_would_be(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'test_vt_resnet.pt').mkdir()
    assert main(['export', 'test_vt_resnet', '--format', 'torchscript', '--overwrite']) == 2
    assert 'out must be a file' in capsys.readouterr().err


def test_disk_that_the_tools_do_not_name(tmp_path, digits, monkeypatch):
    """onnxruntime 1.23 raises an error of its own for a full disk."""
    import errno

    class Probe:
        def __init__(self, **_):
            raise OSError(errno.ENOSPC, 'No space left on device')
    (tmp_path / 'in.onnx').touch()
    monkeypatch.setattr('vt_zoo.export.int8._read_metadata', lambda file: {'preprocessing': json.dumps({
        'input_size': [3, 64, 64], 'mean': [0, 0, 0], 'std': [1, 1, 1]})})

    def fail(*args):
        raise RuntimeError('protobuf could not be serialised')
    monkeypatch.setattr('vt_zoo.export.int8._write', fail)
    with pytest.raises(ValueError, match='cannot be quantised: protobuf'):
        quantize(tmp_path / 'in.onnx', digits / 'val', tmp_path / 'out.onnx', limit=1, progress=False)
    monkeypatch.setattr('vt_zoo.export.int8.NamedTemporaryFile', Probe)
    with pytest.raises(OSError, match='No space left'):
        quantize(tmp_path / 'in.onnx', digits / 'val', tmp_path / 'out.onnx', limit=1, progress=False)


@pytest.mark.parametrize('model', ['vt_resnet18', 'vt_resnet18.untrained', 'vt_resnet18.trunk_a1_in1k',
                                   'test_vt_resnet.untrained'])
def test_classifier_that_was_never_trained(model, few_digits, capsys):
    words = ['predict', str(next((few_digits / 'val').glob('*/*.png'))), '--model', model, '--top', '1']
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == '' and len(err.splitlines()) == 1
    assert f'classifier of model {model} was never trained' in err


def test_untrained_is_asked_for(few_digits, capsys):
    image = str(next((few_digits / 'val').glob('*/*.png')))
    assert main(['predict', image, '--model', 'test_vt_resnet.untrained', '--untrained', '--json']) == 0
    assert len(json.loads(capsys.readouterr().out)[0]['top']) == 5


def test_no_bars_where_nobody_watches(command, few_digits, tiny_arguments, tmp_path):
    result = command('finetune', few_digits, *tiny_arguments, '--out', tmp_path / 'run')
    assert (result.code, result.stderr) == (0, '')

"""Exported files: what they compute in their own runtimes, what they say of the model, what is refused."""
import json
import os
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from helpers import COMBINED, SINGLE, calibrated, change_config, name, stir
from timm.data import resolve_data_config

from vt_zoo import __version__
from vt_zoo.data.images import load_image
from vt_zoo.export.formats import FORMATS, METADATA_FILE, OPSETS, export
from vt_zoo.weights import load
from vt_zoo.weights.files import write_model, write_segmenter

TOLERANCE = 1e-4  # of the largest output


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Gives the file of an export, made once, and what `export` returned."""
    made = {}

    def get(model, file_format, **kwargs):
        key = (str(model), file_format, *kwargs.items())
        if key not in made:
            path = tmp_path_factory.mktemp('export') / f'model{FORMATS[file_format].suffix}'
            made[key] = path, export(str(model), file_format, path, **kwargs)
        return made[key]
    return get


def any_size(file_format):
    return {} if file_format == 'torchscript' else {'dynamic_size': True}


def load_onnx(path):
    session = onnxruntime.InferenceSession(path)
    return lambda x: torch.from_numpy(session.run(['logits'], {'image': x.numpy()})[0])


def run(path, file_format):
    """What its runtime makes of a file."""
    if file_format == 'onnx':
        return load_onnx(path)
    if file_format == 'torchscript':
        return torch.jit.load(path)
    return torch.export.load(path).module() if file_format == 'pt2' else torch._inductor.aoti_load_package(str(path))


TRACED = [
    'onnx', 'pt2', pytest.param('aoti', marks=pytest.mark.slow)]  # a minute of the C++ compiler
ALL = ['torchscript', *TRACED]


def assert_same(loaded, model, x):
    with torch.no_grad():
        expected, result = model(x), loaded(x)
    assert result.shape == expected.shape
    assert (result - expected).abs().max() <= TOLERANCE * expected.abs().max()
    return result


def metadata(path, file_format):
    """Its texts, as the runtime gives them, read as JSON."""
    if file_format == 'onnx':
        texts = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    elif file_format == 'aoti':
        texts = torch._inductor.aoti_load_package(str(path)).get_metadata()
        texts = {name: text for name, text in texts.items() if not name.startswith('AOTI_')}
    else:
        extra = {METADATA_FILE: ''}
        if file_format == 'torchscript':
            torch.jit.load(path, _extra_files=extra)
        else:
            torch.export.load(path, extra_files=extra)
        texts = json.loads(extra[METADATA_FILE])
    return {name: json.loads(text) for name, text in texts.items()}


@pytest.mark.parametrize('file_format', ALL)
def test_classifier_reads_digits(files, digits, file_format):
    path, exported = files('test_vt_resnet', file_format)
    given = load('test_vt_resnet')
    paths = sorted((digits / 'val').glob('*/*.png'))[::30]
    x = torch.stack([given.prepare(load_image(p)) for p in paths])
    loaded = run(path, file_format)
    result = assert_same(loaded, given.model, x)
    right = [p.parent.name == str(i) for p, i in zip(paths, result.argmax(1).tolist())]
    assert len(right) >= 15 and np.mean(right) > 0.9
    assert exported.difference <= TOLERANCE
    for batch in (1, 5):
        assert_same(loaded, given.model, torch.randn(batch, 3, 64, 64))


@pytest.mark.parametrize('file_format', ALL)
def test_classifier_of_images_of_any_size(files, file_format):
    path, _ = files('test_vt_resnet', file_format, **any_size(file_format))
    loaded, model = run(path, file_format), load('test_vt_resnet').model
    for batch, *size in [(1, 64, 64), (5, 64, 64), (2, 97, 130), (1, 33, 40), (1, 32, 32)]:
        assert_same(loaded, model, torch.randn(batch, 3, *size))


@pytest.mark.parametrize('file_format', TRACED)
def test_size_is_fixed_unless_it_is_asked_to_be_free(files, monkeypatch, file_format):
    monkeypatch.setenv('AOTI_RUNTIME_CHECK_INPUTS', '1')  # without it AOTInductor does not look at shapes
    path, _ = files('test_vt_resnet', file_format)
    with pytest.raises(Exception, match=r'64|[Dd]imension'):
        run(path, file_format)(torch.randn(1, 3, 96, 64))


@pytest.mark.parametrize('file_format', [
    'torchscript', *(pytest.param(name, marks=pytest.mark.slow) for name in ('onnx', 'pt2', 'aoti'))])
def test_vt_fpn(files, segment_model, file_format):
    path, exported = files(segment_model, file_format, **any_size(file_format))
    loaded, model = run(path, file_format), load(segment_model).model
    for batch, height, width in [(1, 64, 64), (5, 96, 64), (1, 224, 160)]:
        assert_same(loaded, model, torch.randn(batch, 3, height, width))
    side = '32*{}' if file_format == 'aoti' else '{}'
    height, width = side.format('height'), side.format('width')
    assert exported.inputs == {'image': ['batch', 3, height, width]}
    assert exported.outputs == {'logits': ['batch', 11, height, width]}
    if file_format != 'aoti':
        assert_same(loaded, model, torch.randn(2, 3, 97, 131))
    said = metadata(path, file_format)
    assert said['architecture'] == 'vtfpn-tu-test_resnet'
    assert len(said['class_names']) == 11
    assert said['preprocessing']['input_size'] == [3, None, None]


@pytest.mark.slow
@pytest.mark.parametrize('file_format', ['onnx', 'pt2', 'aoti'])
def test_vt_fpn_of_a_fixed_size(segment_model, tmp_path, file_format):
    saved = load(segment_model)
    statistics = saved.preprocessing['mean'], saved.preprocessing['std']
    write_segmenter(tmp_path / 'model', saved.model, saved.classes, *statistics, eval_size=(40, 61))
    path = tmp_path / f'out{FORMATS[file_format].suffix}'
    exported = export(str(tmp_path / 'model'), file_format, path)
    loaded = run(path, file_format)
    for batch in (1, 4):
        assert_same(loaded, saved.model, torch.randn(batch, 3, 40, 61))
    assert exported.inputs == {'image': ['batch', 3, 40, 61]}
    assert metadata(path, file_format)['preprocessing']['input_size'] == [3, 40, 61]


@pytest.mark.parametrize('file_format', ALL)
def test_metadata(files, file_format):
    path, exported = files('test_vt_resnet', file_format)
    said = metadata(path, file_format)
    preprocessing = said.pop('preprocessing')
    size = ['height', 'width'] if file_format == 'torchscript' else [64, 64]
    assert said == {
        'architecture': 'test_vt_resnet', 'class_names': list('0123456789'),
        'inputs': {'image': ['batch', 3, *size]}, 'outputs': {'logits': ['batch', 10]},
        'vt_zoo_version': __version__, 'torch_version': torch.__version__}
    assert (exported.inputs, exported.outputs) == (said['inputs'], said['outputs'])
    config = timm.get_pretrained_cfg('test_vt_resnet.digits').to_dict()
    for key in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct'):
        assert preprocessing[key] == (list(config[key]) if isinstance(config[key], tuple) else config[key])


def test_class_names_and_size_of_a_folder(my_model, tmp_path):
    change_config(my_model, label_names=['naught', 'one', 'zwölf'])
    export(str(my_model), 'torchscript', tmp_path / 'a.pt')
    said = metadata(tmp_path / 'a.pt', 'torchscript')
    assert said['class_names'] == ['naught', 'one', 'zwölf']
    assert said['preprocessing']['input_size'] == [3, 32, 32]


def test_onnx_names_what_is_free_and_is_one_valid_file(files):
    for kwargs, size in ({'dynamic_size': True}, ['height', 'width']), ({}, [64, 64]):
        path, _ = files('test_vt_resnet', 'onnx', **kwargs)
        session = onnxruntime.InferenceSession(path)
        assert session.get_inputs()[0].shape == ['batch', 3, *size]
        assert session.get_outputs()[0].shape == ['batch', 10]
        onnx.checker.check_model(path, full_check=True)
        assert os.listdir(path.parent) == [path.name]


def runs(opset):
    """Whether this onnxruntime reads files of an opset."""
    value = onnx.helper.make_tensor_value_info('x', onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node('Relu', ['x'], ['y'])], 'graph', [value], [
        onnx.helper.make_tensor_value_info('y', onnx.TensorProto.FLOAT, [1])])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid('', opset)], ir_version=10)
    try:
        onnxruntime.InferenceSession(model.SerializeToString())
    except Exception:  # of a class for each reason
        return False
    return True


@pytest.mark.parametrize('opset', [None, OPSETS[-1]])
def test_opset(files, opset):
    if opset and not runs(opset):
        pytest.skip(f'onnxruntime {onnxruntime.__version__} does not read opset {opset}')
    path, _ = files('test_vt_resnet', 'onnx', **({'opset': opset} if opset else {}))
    assert {entry.domain: entry.version for entry in onnx.load(path).opset_import}[''] == (opset or OPSETS[0])


def test_inference_form(files):
    """No norm is left, and the file holds no more numbers than the model."""
    graph = onnx.load(files('test_vt_resnet', 'onnx')[0]).graph
    assert not {node.op_type for node in graph.node} & {'BatchNormalization', 'InstanceNormalization'}
    model = load('test_vt_resnet').model
    assert sum(np.prod(t.dims) for t in graph.initializer) < 1.05 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize('difference, said', [(1e-3, r'1\.0e-03'), (float('nan'), 'nan')])
def test_nothing_is_left_of_a_file_that_differs(tmp_path, monkeypatch, input_error, difference, said):
    monkeypatch.setattr('vt_zoo.export.formats.largest_difference', lambda *args: difference)
    with input_error(f'torchscript made of model test_vt_resnet differs from PyTorch by {said} of the largest output'):
        export('test_vt_resnet', 'torchscript', tmp_path / 'a.pt')
    assert os.listdir(tmp_path) == []


def test_a_wrong_number_in_the_file_is_found(tmp_path, monkeypatch, input_error):
    save = onnx.save

    def save_changed(proto, path):
        (bias,) = [t for t in proto.graph.initializer if t.name == 'fc.bias']
        values = onnx.numpy_helper.to_array(bias).copy()
        values[3] += 0.01
        bias.CopyFrom(onnx.numpy_helper.from_array(values, 'fc.bias'))
        save(proto, path)

    monkeypatch.setattr(onnx, 'save', save_changed)
    with input_error('differs from PyTorch'):
        export('test_vt_resnet', 'onnx', tmp_path / 'a.onnx')
    assert os.listdir(tmp_path) == []


def test_a_file_that_does_not_run(tmp_path, monkeypatch, input_error):
    monkeypatch.setattr(torch.jit, 'save', lambda script, file, **kwargs: file.write(b'not a model'))
    with input_error('the file that torchscript made of model test_vt_resnet does not run: '):
        export('test_vt_resnet', 'torchscript', tmp_path / 'a.pt')
    assert os.listdir(tmp_path) == []


def test_segmenters_that_cannot_be_exported(segment_model, tmp_path, input_error):
    from vt_zoo.segmentation import SegmentSettings, create_segmenter
    with input_error('is for images of any size: add --dynamic-size'):
        export(str(segment_model), 'onnx', tmp_path / 'a.onnx')
    model = create_segmenter(SegmentSettings(encoder_name='tu-test_vt_resnet', token_dim=32), 2)
    write_segmenter(tmp_path / 'model', model, ['sky', 'sea'], (0.1, 0.2, 0.3), (1., 0.5, 0.3))
    with input_error('model cannot be written as torchscript: '):
        export(str(tmp_path / 'model'), 'torchscript', tmp_path / 'a.pt')
    assert os.listdir(tmp_path) == ['model']


def test_command(command, tmp_path):
    (tmp_path / 'a.pt').write_text('old')
    result = command(
        'export', 'test_vt_resnet', '--format', 'torchscript', '--out', 'a.pt', '--overwrite', cwd=tmp_path)
    assert result.code == 0, result.stderr
    assert result.lines == [
        'vt-zoo: INFO: writing torchscript', 'vt-zoo: INFO: comparing it with PyTorch on 5 batches']
    *described, difference, file = result.stdout.splitlines()
    assert described == ['input      image (batch, 3, height, width)', 'output     logits (batch, 10)']
    assert 0 <= float(difference.split()[1]) <= TOLERANCE
    assert file == f'file       a.pt, {(tmp_path / "a.pt").stat().st_size} bytes'


def test_command_prints_nothing_of_the_exporter(command, tmp_path):
    words = ['--format', 'onnx', '--opset', '20', '--dynamic-size']
    result = command('export', 'test_vt_resnet', *words, '--out', 'a.onnx', cwd=tmp_path)
    assert result.code == 0, result.stderr
    assert len(result.lines) == 2 and len(result.stdout.splitlines()) == 4
    assert {entry.domain: entry.version for entry in onnx.load(tmp_path / 'a.onnx').opset_import}[''] == 20


@pytest.mark.parametrize('words, holds', [
    (['--format', 'tflite', '--out', 'a.onnx'], "invalid choice: 'tflite'"),
    (['--out', 'a.onnx'], '--format'),
    (['--format', 'onnx', '--out', 'a.pt'], 'out must end in .onnx for format onnx, got a.pt'),
    (['--format', 'torchscript', '--out', 'a'], 'out must end in .pt for format torchscript, got a'),
    (['--format', 'onnx', '--out', 'there.onnx'], 'there.onnx is there already: choose another --out'),
    (['--format', 'onnx', '--out', 'none/a.onnx'], 'folder none of --out does not exist'),
    (['--format', 'onnx', '--out', 'a.onnx', '--opset', '17'], 'opset must be from 18 to 25, got 17'),
    (['--format', 'onnx', '--out', 'a.onnx', '--opset', '26'], 'opset must be from 18 to 25, got 26'),
    (['--format', 'onnx', '--out', 'a.onnx', '--opset', 'x'], "'x' is not a whole number"),
    (['--format', 'pt2', '--out', 'a.pt2', '--opset', '18'], 'opset is only for format onnx, got format pt2'),
    (['--format', 'torchscript', '--out', 'a.pt', '--dynamic-size'], 'leave --dynamic-size out'),
], ids=lambda value: value if isinstance(value, str) else '')
def test_command_refuses(command, tmp_path, words, holds):
    (tmp_path / 'there.onnx').write_text('mine')
    result = command('export', 'test_vt_resnet', *words, cwd=tmp_path)
    assert (result.code, result.stdout, len(result.lines)) == (2, '', 1), result.stderr
    assert holds in result.lines[0]
    assert os.listdir(tmp_path) == ['there.onnx']
    assert (tmp_path / 'there.onnx').read_text() == 'mine'


@pytest.mark.parametrize('package', ['onnx', 'onnxruntime', 'onnxscript'])
def test_missing_package(monkeypatch, tmp_path, package, input_error):
    monkeypatch.setitem(sys.modules, package, None)
    with input_error(rf"^format onnx needs {package}: pip install 'vt_zoo\[export\]'$"):
        export('test_vt_resnet', 'onnx', tmp_path / 'a.onnx')


def test_missing_compiler(monkeypatch, tmp_path, input_error):
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.setenv('CXX', 'no_such_compiler')
    with input_error(r'format aoti needs a C\+\+ compiler: install g\+\+, or name one in CXX'):
        export('test_vt_resnet', 'aoti', tmp_path / 'a.pt2')
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('words', [
    ['--format', 'torchscript', '--out', 'a.pt'],
    pytest.param(['--format', 'onnx', '--out', 'a.onnx'], marks=pytest.mark.slow),
    pytest.param(['--format', 'pt2', '--out', 'a.pt2'], marks=pytest.mark.slow)], ids=lambda words: words[1])
def test_full_disk(command, limit_file_size, tmp_path, words):
    result = command('export', 'test_vt_resnet', *words, cwd=tmp_path, before=limit_file_size(500_000))
    assert (result.code, len(result.lines)) == (2, 2), result.stderr
    assert f'cannot read or write {words[-1]}: File too large' in result.lines[1]
    assert os.listdir(tmp_path) == []


def test_torchscript_of_a_model_of_one_size(tmp_path):
    model = timm.create_model('test_vit', num_classes=3).eval()
    write_model(tmp_path / 'model', model, None, resolve_data_config({}, model=model))
    export(str(tmp_path / 'model'), 'torchscript', tmp_path / 'out.pt')
    assert metadata(tmp_path / 'out.pt', 'torchscript')['inputs'] == {'image': ['batch', 3, 160, 160]}
    assert_same(run(tmp_path / 'out.pt', 'torchscript'), model, torch.randn(2, 3, 160, 160))


@pytest.mark.slow
@pytest.mark.parametrize('options', [*SINGLE, *COMBINED[1:]], ids=name)  # float32 rounds the first by over 1e-4
@pytest.mark.parametrize('file_format', ['onnx', 'torchscript', 'pt2'])
def test_options_of_the_paper(tmp_path, options, file_format):
    model = calibrated(**options)
    write_model(tmp_path / 'model', model, None, resolve_data_config({}, model=model))
    path = tmp_path / f'out{FORMATS[file_format].suffix}'
    export(str(tmp_path / 'model'), file_format, path, **any_size(file_format))
    assert_same(run(path, file_format), model, torch.randn(2, 3, 70, 90))


@pytest.mark.slow
@pytest.mark.parametrize('model', ['vt_resnet18', 'vt_resnet34', 'vt_resnet50', 'vt_resnet101'])
@pytest.mark.parametrize('file_format', ['onnx', 'torchscript', 'pt2', 'aoti'])
def test_models(tmp_path, model, file_format):
    torch.manual_seed(0)
    model = stir(timm.create_model(model))
    write_model(tmp_path / 'model', model, None, resolve_data_config({}, model=model))
    path = tmp_path / f'out{FORMATS[file_format].suffix}'
    export(str(tmp_path / 'model'), file_format, path)
    assert_same(run(path, file_format), model, torch.randn(2, 3, 224, 224))

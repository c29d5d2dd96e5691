"""int8 files: what they compute on images they were not calibrated on, which nodes are in int8, what is refused."""
import json
import os
import re
import shutil
from collections import Counter
from signal import SIGINT

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from vt_zoo.data.images import load_image
from vt_zoo.export.formats import export
from vt_zoo.export.int8 import DEFAULT_LIMIT, quantize
from vt_zoo.weights import load

INT8, UINT8 = onnx.TensorProto.INT8, onnx.TensorProto.UINT8


@pytest.fixture(scope='module')
def float_file(tmp_path_factory):
    path = tmp_path_factory.mktemp('float') / 'digits.onnx'
    export('test_vt_resnet', 'onnx', path)
    return path


@pytest.fixture(scope='module')
def quantized(float_file, digits, tmp_path_factory):
    """An int8 file of the digits model calibrated on training images, and what `quantize` returned."""
    path = tmp_path_factory.mktemp('int8') / 'digits_int8.onnx'
    return path, quantize(float_file, digits / 'train', path, progress=False)


def run(path, x):
    return onnxruntime.InferenceSession(path).run(['logits'], {'image': x})[0]


def held_out(digits, step=3):
    paths = sorted((digits / 'val').glob('*/*.png'))[::step]
    prepare = load('test_vt_resnet').prepare
    return np.stack([prepare(load_image(p)).numpy() for p in paths]), np.array([int(p.parent.name) for p in paths])


def metadata(path):
    return {entry.key: json.loads(entry.value) for entry in onnx.load(path).metadata_props}


def in_int8(path):
    """The operators' nodes, (those with all operands in int8, all)."""
    graph = onnx.load(path).graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    total = Counter(node.op_type for node in graph.node)
    quantised = Counter(
        node.op_type for node in graph.node
        if all(makers.get(name) == 'DequantizeLinear' for name in node.input[:2]))
    return {op: (quantised[op], total[op]) for op in total}


def test_held_out_digits(float_file, quantized, digits):
    path, _ = quantized
    x, labels = held_out(digits)
    expected, result = run(float_file, x), run(path, x)
    assert np.mean(expected.argmax(1) == labels) > 0.97
    assert np.mean(result.argmax(1) == labels) >= np.mean(expected.argmax(1) == labels) - 0.01
    assert 0 < np.linalg.norm(result - expected) < 0.06 * np.linalg.norm(expected)


def test_file_is_three_times_smaller(float_file, quantized):
    path, _ = quantized
    assert path.stat().st_size < float_file.stat().st_size / 3
    assert os.listdir(path.parent) == [path.name]


def test_what_is_in_int8(float_file, quantized):
    """Convolutions and products with weights are; stacks of matrices, products of activations and softmax are not."""
    path, result = quantized
    graph = onnx.load(float_file).graph
    ranks = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    with_weights = sum(node.op_type == 'MatMul' and ranks.get(node.input[1]) == 2 for node in graph.node)
    found = in_int8(path)
    assert found['Conv'] == (12, 12) and found['Gemm'] == (1, 1) and found['Softmax'][0] == 0
    assert found['Add'][0] == 3  # the trunk's blocks
    assert found['MatMul'][0] >= with_weights > 5
    assert found['MatMul'][1] - found['MatMul'][0] >= 10
    assert result.nodes == {op: found[op] for op in ('Conv', 'Gemm', 'MatMul')}


def test_weights_are_of_7_bits_by_channel_and_activations_unsigned(quantized):
    graph = onnx.load(quantized[0]).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    weights = [tensor for tensor in tensors.values() if tensor.data_type == INT8 and tensor.dims]
    large = [onnx.numpy_helper.to_array(tensor) for tensor in weights if np.prod(tensor.dims) > 1000]
    assert len(large) >= 20 and all(np.abs(w.astype(int)).max() <= 64 for w in large)
    made_by = {node.output[0]: node for node in graph.node}
    weight = made_by[next(node for node in graph.node if node.op_type == 'Conv').input[1]]
    assert weight.op_type == 'DequantizeLinear' and list(tensors[weight.input[1]].dims) == [64]
    points = [tensors[node.input[2]].data_type for node in graph.node if node.op_type == 'QuantizeLinear']
    assert set(points) == {UINT8} and len(points) > 10


def test_metadata(float_file, quantized):
    said, result = metadata(quantized[0]), quantized[1]
    how = said.pop('quantization')
    assert said == metadata(float_file)
    assert how['num_images'] == result.num_images == DEFAULT_LIMIT
    assert {op: tuple(counts) for op, counts in how['nodes'].items()} == result.nodes
    assert how['onnxruntime_version'] == onnxruntime.__version__
    assert how['agreement'] == result.agreement


def test_reported_differences(float_file, digits, tmp_path):
    (tmp_path / 'images').mkdir()
    paths = sorted((digits / 'val').glob('*/*.png'))[::60]
    for path in paths:
        shutil.copy(path, tmp_path / 'images')
    result = quantize(float_file, tmp_path / 'images', tmp_path / 'a.onnx', progress=False)
    x, _ = held_out(digits, step=60)
    expected, found = run(float_file, x), run(tmp_path / 'a.onnx', x)
    differences = np.abs(found - expected).max(1) / np.abs(expected).max(1)
    assert result.num_images == len(paths)
    assert result.agreement == np.mean(found.argmax(1) == expected.argmax(1))
    assert result.mean_difference == pytest.approx(differences.mean(), rel=1e-3)
    assert result.largest_difference == pytest.approx(differences.max(), rel=1e-3)


def test_images_are_prepared_as_the_file_says(float_file, digits, tmp_path):
    """The first range is that of the normalised images: of another mean it would be another."""
    (tmp_path / 'images').mkdir()
    Image.new('RGB', (64, 64), 'white').save(tmp_path / 'images' / 'a.png')
    Image.new('RGB', (64, 64), 'black').save(tmp_path / 'images' / 'b.png')
    quantize(float_file, tmp_path / 'images', tmp_path / 'a.onnx', progress=False)
    graph = onnx.load(tmp_path / 'a.onnx').graph
    (first,) = [node for node in graph.node if node.op_type == 'QuantizeLinear' and node.input[0] == 'image']
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    said = metadata(float_file)['preprocessing']
    mean, std = np.array(said['mean']), np.array(said['std'])
    low, high = (-mean / std).min(), ((1 - mean) / std).max()
    assert tensors[first.input[1]] == pytest.approx((high - low) / 255, rel=1e-3)
    assert tensors[first.input[2]] == round(255 * -low / (high - low))


@pytest.mark.slow
def test_vt_fpn(segment_model, composed, tmp_path):
    export(str(segment_model), 'onnx', tmp_path / 'float.onnx', dynamic_size=True)
    images = tmp_path / 'images'
    images.mkdir()
    for path, size in zip(sorted((composed / 'images' / 'train').iterdir()), [(48, 48), (80, 64), (64, 70)]):
        Image.open(path).resize(size).save(images / path.name)
    result = quantize(tmp_path / 'float.onnx', images, tmp_path / 'a.onnx', progress=False)
    assert result.num_images == 3
    assert result.agreement > 0.8
    assert result.nodes['Conv'][0] == result.nodes['Conv'][1]
    said = metadata(tmp_path / 'a.onnx')
    assert said['architecture'] == 'vtfpn-tu-test_resnet' and len(said['class_names']) == 11
    x = np.random.default_rng(0).standard_normal((2, 3, 97, 130), dtype=np.float32)
    expected, found = run(tmp_path / 'float.onnx', x), run(tmp_path / 'a.onnx', x)
    assert found.shape == expected.shape == (2, 11, 97, 130)
    assert np.linalg.norm(found - expected) < 0.2 * np.linalg.norm(expected)


def test_command(command, float_file, digits, tmp_path):
    words = ['--images', digits / 'train' / '7', '--out', 'a.onnx', '--limit', '5']
    result = command('quantize', float_file, *words, cwd=tmp_path)
    assert result.code == 0, result.stderr
    assert result.lines == ['vt-zoo: INFO: calibrating on 5 images', f'vt-zoo: INFO: comparing with {float_file}']
    nodes, same, difference, file = result.stdout.splitlines()
    assert nodes.startswith('in int8    12 of 12 Conv, 1 of 1 Gemm, ')
    assert same == 'same class 100.00 %, on the 5 images'
    assert 0 < float(difference.split()[1]) < 0.1
    assert file.startswith(f'file       a.onnx, {(tmp_path / "a.onnx").stat().st_size} bytes, 3.')
    assert os.listdir(tmp_path) == ['a.onnx']


@pytest.fixture
def folder(float_file, quantized, tmp_path):
    """Files that are none to quantise, and folders without images."""
    (tmp_path / 'text.onnx').write_text('mine')
    (tmp_path / 'empty.onnx').touch()
    (tmp_path / 'none').mkdir()
    (tmp_path / 'broken').mkdir()
    (tmp_path / 'broken' / 'a.png').write_text('no image')
    shutil.copy(quantized[0], tmp_path / 'int8.onnx')
    shutil.copy(float_file, tmp_path / 'float.onnx')
    model = onnx.load(float_file)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / 'other.onnx')
    return tmp_path


@pytest.mark.parametrize('file, images, out, holds', [
    ('no.onnx', 'DIGITS', 'a.onnx', 'no.onnx does not exist'),
    ('none', 'DIGITS', 'a.onnx', 'none is not a file'),
    ('text.onnx', 'DIGITS', 'a.onnx', 'text.onnx is not an ONNX file'),
    ('empty.onnx', 'DIGITS', 'a.onnx', 'empty.onnx is not an ONNX file'),
    ('other.onnx', 'DIGITS', 'a.onnx', 'vt-zoo export did not write it'),
    ('int8.onnx', 'DIGITS', 'a.onnx', 'int8.onnx is quantised already'),
    ('float.onnx', 'no', 'a.onnx', 'image folder no does not exist'),
    ('float.onnx', 'text.onnx', 'a.onnx', 'image folder text.onnx is not a folder'),
    ('float.onnx', 'none', 'a.onnx', 'image folder none holds no images'),
    ('float.onnx', 'broken', 'a.onnx', 'image broken/a.png cannot be read: it is not an image'),
    ('float.onnx', 'DIGITS', 'text.onnx', 'text.onnx is there already: choose another --out'),
    ('float.onnx', 'DIGITS', 'float.onnx', 'float.onnx is there already: choose another --out'),
    ('float.onnx', 'DIGITS', 'a.pt', 'out must end in .onnx'),
    ('float.onnx', 'DIGITS', 'no/a.onnx', 'folder no of --out does not exist'),
])
def test_command_refuses(command, digits, folder, file, images, out, holds):
    before = sorted(os.listdir(folder))
    images = digits / 'val' if images == 'DIGITS' else images
    result = command('quantize', file, '--images', images, '--out', out, cwd=folder)
    assert (result.code, result.stdout) == (2, ''), result.stderr
    assert holds in result.lines[-1]
    assert [line for line in result.lines if 'INFO' not in line] == result.lines[-1:]
    assert sorted(os.listdir(folder)) == before
    assert (folder / 'text.onnx').read_text() == 'mine'


@pytest.mark.parametrize('package', ['onnx', 'onnxruntime'])
def test_missing_package(command, float_file, digits, tmp_path, package):
    result = command(
        'quantize', float_file, '--images', digits, '--out', 'a.onnx', cwd=tmp_path,
        before=f'import sys; sys.modules[{package!r}] = None')
    assert (result.code, result.lines) == (
        2, [f"vt-zoo: error: quantize needs {package}: pip install 'vt_zoo[export]'"])


@pytest.fixture
def temporary(tmp_path):
    """Code for `before` of a command: its temporary files are in a folder beside what it writes."""
    (tmp_path / 'temporary').mkdir()
    return f"import tempfile; tempfile.tempdir = {str(tmp_path / 'temporary')!r}"


@pytest.mark.parametrize('call', [3, 8], ids=['calibrating', 'comparing'])
def test_nothing_is_left_after_ctrl_c(command, signal_at, float_file, digits, tmp_path, temporary, call):
    before = f"{temporary}\n{signal_at('vt_zoo.export.int8.load_image', call, SIGINT)}"
    result = command(
        'quantize', float_file, '--images', digits / 'val', '--limit', '5', '--out', 'a.onnx', cwd=tmp_path,
        before=before)
    assert (result.code, result.lines[-1]) == (130, 'vt-zoo: interrupted')
    assert os.listdir(tmp_path) == ['temporary'] and os.listdir(tmp_path / 'temporary') == []


def test_beside_and_over(command, float_file, digits, tmp_path):
    shutil.copy(float_file, tmp_path / 'my.onnx')
    (tmp_path / 'my_int8.onnx').write_text('mine')
    words = ['quantize', 'my.onnx', '--images', digits / 'val', '--limit', '2']
    refused = command(*words, cwd=tmp_path)
    assert refused.code == 2 and 'my_int8.onnx is there already' in refused.stderr
    refused = command(*words, '--out', 'my.onnx', '--overwrite', cwd=tmp_path)
    assert refused.code == 2 and 'out must be another file than my.onnx' in refused.stderr
    assert (tmp_path / 'my_int8.onnx').read_text() == 'mine'
    result = command(*words, '--overwrite', cwd=tmp_path)
    assert result.code == 0, result.stderr
    onnx.checker.check_model(tmp_path / 'my_int8.onnx')


@pytest.mark.parametrize('size', [450_000, 1_000_000])
def test_full_disk(command, limit_file_size, float_file, digits, tmp_path, temporary, size):
    result = command(
        'quantize', float_file, '--images', digits / 'val', '--limit', '3', '--out', 'a.onnx', cwd=tmp_path,
        before=f'{temporary}\n{limit_file_size(size)}')
    assert (result.code, len(result.lines)) == (2, 2), result.stderr
    assert re.search('read or write .*: File too large', result.lines[1])
    assert os.listdir(tmp_path) == ['temporary'] and os.listdir(tmp_path / 'temporary') == []


def test_nothing_is_left_of_a_file_that_is_not_finite(float_file, digits, tmp_path, monkeypatch, input_error):
    from onnxruntime import quantization

    def write_broken(file, out, *args, **kwargs):
        model = onnx.load(file)
        (bias,) = [tensor for tensor in model.graph.initializer if tensor.name == 'fc.bias']
        bias.CopyFrom(onnx.numpy_helper.from_array(np.full(10, np.nan, dtype=np.float32), 'fc.bias'))
        onnx.save(model, out)

    monkeypatch.setattr(quantization, 'quantize_static', write_broken)
    with input_error('the int8 file of .* does not run: its output is not finite'):
        quantize(float_file, digits / 'val', tmp_path / 'a.onnx', limit=2, progress=False)
    assert os.listdir(tmp_path) == []

"""Files of weights: whole or not there, in timm's hub layout, and a sentence where they do not fit."""
import json
import os
import shutil
import stat
import struct

import pytest
import safetensors.torch
import timm
import torch
from helpers import as_in_version_0_1, change_config, images, needs_timm_that_reads_folders, tree, truncate

import vt_zoo.files
from vt_zoo.errors import InputError
from vt_zoo.files import whole
from vt_zoo.weights.files import read_tensors, write_model, write_tensors
from vt_zoo.weights.loading import check_input_size, load_model

CLASSES = ['cat', 'dog', 'Zebra']


class Stop(BaseException):
    """Not an Exception, as KeyboardInterrupt."""


def create(name='test_vt_resnet', num_classes=3, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=num_classes, **kwargs).eval()


def outputs(model):
    with torch.inference_mode():
        return model(images(2, 32, 32))


def put(path, content, error=None):
    """Write a file of a text, or a folder of texts by name; or fail once that is done."""
    with whole(path) as new:
        if isinstance(content, dict):
            new.mkdir()
        for name, text in content.items() if isinstance(content, dict) else [('', content)]:
            (new / name).write_text(text)
        if error:
            raise error('no more')


@pytest.fixture
def model_dir(tmp_path):
    """A model with random weights in the hub layout."""
    write_model(tmp_path / 'model', create(), CLASSES, {'input_size': (3, 32, 32)})
    return tmp_path / 'model'


@pytest.mark.parametrize('old, new', [
    (None, 'new'), ('old', 'new'), (None, {'x': '1', 'y': '2'}), ({'x': 'old', 'y': 'old'}, {'x': 'new', 'z': 'new'})])
def test_file_or_folder_appears_whole(tmp_path, old, new):
    path = tmp_path / 'parent' / 'a'
    for content in filter(None, (old, new)):
        put(str(path), content)
    assert os.listdir(tmp_path / 'parent') == ['a']
    assert new == (path.read_text() if path.is_file() else {p.name: p.read_text() for p in path.iterdir()})


@pytest.mark.parametrize('error', [RuntimeError, OSError, KeyboardInterrupt, Stop])
@pytest.mark.parametrize('old', [None, 'old', {'x': 'old'}])
@pytest.mark.parametrize('new', ['half', {'x': 'half'}])
def test_nothing_is_left_of_a_block_that_fails(tmp_path, error, old, new):
    if old:
        put(tmp_path / 'a', old)
    before = tree(tmp_path)
    with pytest.raises(error):
        put(tmp_path / 'a', new, error)
    assert tree(tmp_path) == before


@pytest.mark.parametrize('old, new', [('old', 'new'), ({'x': 'old'}, {'x': 'new'})])
@pytest.mark.parametrize('error', [OSError, KeyboardInterrupt])
def test_old_survives_where_the_new_cannot_take_its_name(tmp_path, monkeypatch, old, new, error):
    put(tmp_path / 'a', old)
    before = tree(tmp_path)

    def replace(source, target):
        raise error('no more')

    monkeypatch.setattr(vt_zoo.files.os, 'replace', replace)
    with pytest.raises(error):
        put(tmp_path / 'a', new)
    assert {path: content for path, content in tree(tmp_path).items() if path in before} == before


def test_error_of_safetensors_is_one_of_the_place(tmp_path):
    with pytest.raises(OSError), whole(tmp_path / 'a'):
        safetensors.torch.save_file({'x': torch.zeros(1)}, tmp_path / 'no' / 'a')


def test_place_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(OSError):
        put(tmp_path / 'file' / 'a.txt', 'text')
    assert tree(tmp_path) == {'file': b''}


def test_file_does_not_take_the_place_of_a_folder(tmp_path, input_error):
    put(tmp_path / 'a.png', {'notes.txt': 'keep'})
    before = tree(tmp_path)
    with input_error('is a folder, a file is to be written there'):
        put(tmp_path / 'a.png', 'new')
    assert tree(tmp_path) == before


@pytest.mark.parametrize('umask', [0o022, 0o027, 0o077])
def test_files_have_the_mode_of_the_umask(tmp_path, umask):
    old = os.umask(umask)
    try:
        put(tmp_path / 'a.txt', 'text')
        write_tensors(tmp_path / 'a.safetensors', {'x': torch.zeros(1)}, {})
        write_model(tmp_path / 'model', create(), CLASSES, {})
    finally:
        os.umask(old)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob('*') if p.is_file()}
    assert modes == dict.fromkeys(['a.txt', 'a.safetensors', 'model.safetensors', 'config.json'], 0o666 & ~umask)


def test_tensors_come_back(tmp_path):
    weight = torch.randn(4, 3)
    tensors = {
        'weight': weight, 'tied': weight, 'view': weight.t(), 'step': torch.tensor(7), 'half': weight.bfloat16(),
        'empty': torch.zeros(0, 2), 'parameter': torch.nn.Parameter(weight)}
    metadata = {'list': [1, 2.5, None, 'ü'], 'dict': {'a': {}}}
    write_tensors(tmp_path / 'a.safetensors', tensors, metadata)
    result, result_metadata = read_tensors(tmp_path / 'a.safetensors')
    assert result_metadata == metadata
    assert result.keys() == tensors.keys()
    for name, value in tensors.items():
        assert result[name].dtype == value.dtype
        assert torch.equal(result[name], value)


def test_floats_come_back_to_the_last_bit(tmp_path):
    values = [0.1, 1 / 3, 1e-308, 123456789.123456789]
    write_tensors(tmp_path / 'a.safetensors', {}, {'values': values})
    assert read_tensors(tmp_path / 'a.safetensors')[1]['values'] == values


@pytest.mark.parametrize('share', [0, 0.001, 0.1, 0.5, 0.999])
def test_truncated_tensors(tmp_path, share, input_error):
    path = tmp_path / 'a.safetensors'
    write_tensors(path, {'x': torch.randn(100, 100)}, {'a': 1})
    data = path.read_bytes()
    path.write_bytes(data[:int(share * len(data))])
    with input_error('a.safetensors cannot be read'):
        read_tensors(path)


def test_file_of_other_origin_is_no_checkpoint(tmp_path, input_error):
    torch.save({'x': torch.zeros(2)}, tmp_path / 'pickle.safetensors')
    safetensors.torch.save_file({'x': torch.zeros(2)}, tmp_path / 'bare.safetensors')
    safetensors.torch.save_file({'x': torch.zeros(2)}, tmp_path / 'other.safetensors', {'json': 'no JSON'})
    for name in ('pickle', 'bare', 'other'):
        with input_error(f'{name}.safetensors cannot be read'):
            read_tensors(tmp_path / f'{name}.safetensors')


def test_model_comes_back(tmp_path):
    model = create(drop_rate=0.3)
    write_model(tmp_path / 'model', model, CLASSES, {'input_size': (3, 48, 48), 'mean': (0.1, 0.2, 0.3)})
    result = load_model(str(tmp_path / 'model'))
    assert not result.training
    assert torch.equal(outputs(result), outputs(model))
    assert result.num_classes == 3
    assert list(result.pretrained_cfg['label_names']) == CLASSES
    assert list(result.pretrained_cfg['input_size']) == [3, 48, 48]
    assert list(result.pretrained_cfg['mean']) == [0.1, 0.2, 0.3]


@needs_timm_that_reads_folders
def test_timm_loads_the_folder(model_dir):
    result = timm.create_model(f'local-dir:{model_dir}', pretrained=True).eval()
    assert torch.equal(outputs(result), outputs(create()))


def test_local_dir_may_be_named_as_in_timm(model_dir):
    assert torch.equal(outputs(load_model(f'local-dir:{model_dir}')), outputs(create()))


def test_layout_of_the_folder(model_dir):
    assert sorted(os.listdir(model_dir)) == ['config.json', 'model.safetensors']
    config = json.loads((model_dir / 'config.json').read_text())
    assert (config['architecture'], config['num_classes']) == ('test_vt_resnet', 3)
    assert config['label_names'] == CLASSES
    assert 'num_classes' not in config.get('model_args', {})
    of_other_weights = {'tag', 'license', 'description'}
    assert create().pretrained_cfg.keys() >= of_other_weights and not config['pretrained_cfg'].keys() & of_other_weights


@pytest.mark.parametrize('in_chans, kwargs', [
    (1, {'num_tokens': 5, 'global_pool': 'max'}), (1, {'stem_type': 'deep', 'stem_width': 16}), (2, {}), (4, {}),
    (13, {})], ids=str)
def test_arguments_that_make_the_model_come_back(tmp_path, in_chans, kwargs):
    model = create(in_chans=in_chans, **kwargs)
    write_model(tmp_path / 'model', model, CLASSES, {'input_size': (in_chans, 32, 32)})
    result = load_model(str(tmp_path / 'model'))
    image = torch.randn(2, in_chans, 32, 32)
    with torch.inference_mode():
        assert torch.equal(result(image), model(image))
    assert result.pretrained_cfg['first_conv'] == model.pretrained_cfg['first_conv']


def test_model_is_replaced(model_dir):
    (model_dir / 'of an earlier version').touch()
    write_model(model_dir, create(num_classes=2), ['a', 'b'], {})
    assert sorted(os.listdir(model_dir)) == ['config.json', 'model.safetensors']
    assert load_model(str(model_dir)).num_classes == 2
    assert os.listdir(model_dir.parent) == ['model']


def test_arguments_of_timm_pass_through(model_dir):
    model = load_model(str(model_dir), num_classes=7, drop_path_rate=0.2)
    assert outputs(model).shape == (2, 7)
    state, expected = model.state_dict(), create().state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items() if not name.startswith('fc.'))


def test_model_of_timm(tmp_path):
    model = create('test_resnet')
    write_model(tmp_path / 'model', model, CLASSES, {})
    assert torch.equal(outputs(load_model(str(tmp_path / 'model'))), outputs(model))


def weights_of(name='test_vt_resnet', **kwargs):
    return safetensors.torch.save(create(name, **kwargs).state_dict())


def of_whole_numbers(data):
    tensors = safetensors.torch.load(data)
    return safetensors.torch.save({**tensors, 'conv1.weight': tensors['conv1.weight'].to(torch.int8)})


DAMAGE = {  # makes of the bytes of a file those of another
    'truncated': lambda data: data[:-100],
    'cut in the header': lambda data: data[:100],
    'empty': lambda data: b'',
    'text': lambda data: b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n',
    'of another architecture': lambda data: weights_of('test_resnet'),
    'of a larger model': lambda data: weights_of('vt_resnet18'),
    'of other classes': lambda data: weights_of(num_classes=7),
    'without classifier': lambda data: weights_of(num_classes=0),
    'of whole numbers': of_whole_numbers,
    'altered in the header': lambda data: data[:8] + bytes([data[8] ^ 1]) + data[9:],
    'header of an exabyte': lambda data: struct.pack('<Q', 10 ** 18) + data[8:],
    'header of more than the 100 MB that safetensors takes': (
        lambda data: struct.pack('<Q', 101_000_000) + b'{}' + b' ' * 101_000_000),
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_weights_that_do_not_fit(model_dir, damage, input_error):
    """The model that was loaded before stays as it is, although its file changes."""
    model, path = load_model(str(model_dir)), model_dir / 'model.safetensors'
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    before = tree(model_dir)
    with input_error(str(model_dir)):
        load_model(str(model_dir))
    assert tree(model_dir) == before
    assert torch.equal(outputs(model), outputs(create()))


@pytest.mark.parametrize('kwargs', [{}, {'num_classes': 7}])
def test_weights_of_version_0_1(model_dir, kwargs, input_error):
    safetensors.torch.save_file(as_in_version_0_1(create().state_dict()), model_dir / 'model.safetensors')
    with input_error(f'{model_dir} cannot be loaded: its weights are of vt_zoo 0.1, .*: use that version, or train'):
        load_model(str(model_dir), **kwargs)


@pytest.mark.parametrize('kwargs', [{}, {'num_classes': 7}, {'features_only': True}])
def test_weights_of_version_0_1_by_any_way(tmp_path, kwargs):
    """Also where the number of classes or a missing classifier make timm leave out what does not fit."""
    old = as_in_version_0_1(create().state_dict())
    safetensors.torch.save_file(old, tmp_path / 'old.safetensors')
    words = 'its weights are of vt_zoo 0.1'
    with pytest.raises(RuntimeError, match=words):
        timm.create_model(
            'test_vt_resnet', pretrained=True, pretrained_cfg_overlay={'file': str(tmp_path / 'old.safetensors')},
            **kwargs)
    if not kwargs.get('features_only'):
        with pytest.raises(RuntimeError, match=words):
            timm.create_model('test_vt_resnet', checkpoint_path=str(tmp_path / 'old.safetensors'), **kwargs)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=words):
            create().load_state_dict(old, strict=strict)


@pytest.mark.parametrize('name', ['', 'local-dir:'])
def test_type_of_the_weights_is_named(model_dir, name, input_error):
    path = model_dir / 'model.safetensors'
    path.write_bytes(of_whole_numbers(path.read_bytes()))
    with input_error(r'its weights conv1\.weight are of type I8, which is not floating point'):
        load_model(f'{name}{model_dir}')


@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_other_floating_point_types_fit(model_dir, dtype):
    tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in create().state_dict().items()}
    safetensors.torch.save_file(tensors, model_dir / 'model.safetensors')
    assert torch.equal(load_model(str(model_dir)).fc.weight, tensors['fc.weight'].float())


@pytest.fixture
def shards(tmp_path):
    """A model in shards."""
    write_model(tmp_path / 'shards', create(), CLASSES, {'input_size': (3, 32, 32)}, max_shard_size='500KB')
    return tmp_path / 'shards'


def test_shards_come_back(shards):
    assert torch.equal(outputs(load_model(str(shards))), outputs(create()))


SHARD, INDEX = 'model-00001-of-00004.safetensors', 'model.safetensors.index.json'


def change_index(folder, change):
    """Change the file of each tensor by name."""
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**index, 'weight_map': change(index['weight_map'])}))


def lead_elsewhere(folder):
    safetensors.torch.save_file({'fc.bias': torch.zeros(3)}, folder.parent / 'x.safetensors')
    change_index(folder, lambda files: {**files, 'fc.bias': '../x.safetensors'})


@pytest.mark.parametrize('damage, match', [
    (lambda folder: (folder / SHARD).unlink(), 'No such file'),
    (lambda folder: truncate(folder / SHARD), 'SafetensorError|incomplete|deserializing'),
    (lambda folder: (folder / INDEX).write_text('{'), 'property name'),
    (lead_elsewhere, 'names files outside of the folder'),
    (lambda folder: change_index(folder, lambda files: {k: v for k, v in files.items() if v != SHARD}),
     'those of another model')], ids=['missing', 'truncated', 'no index', 'elsewhere', 'left out'])
def test_shards_that_do_not_fit(shards, damage, match, input_error):
    damage(shards)
    with input_error(f'{shards} cannot be loaded: .*({match})'):
        load_model(str(shards))


def test_pickle_is_not_run(model_dir, tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'run'),)

    torch.save({'x': Malicious()}, model_dir / 'model.safetensors')
    shutil.copy(model_dir / 'model.safetensors', model_dir / 'pytorch_model.bin')
    with pytest.raises(InputError):
        load_model(str(model_dir))
    (model_dir / 'model.safetensors').unlink()
    with pytest.raises(InputError, match=r'holds no model\.safetensors'):
        load_model(str(model_dir))
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('changes', [
    b'{', b'', b'[]', b'3', b'{}', b'\xff\xfe', b'{"architecture": "no_such_model", "num_classes": 3}',
    {'architecture': 'no_such_model'},
    {'architecture': 'test_resnet'},
    {'num_classes': 7},
    {'num_classes': 'three'},
    {'num_classes': 7, 'pretrained_cfg': {'num_classes': 3, 'input_size': [3, 32, 32]}},
    {'model_args': {'no_such_argument': 1}},
    {'model_args': {'token_dim': -1}},
    {'model_args': {'token_dim': 64}},
    {'model_args': 'a text'},
    {'pretrained_cfg': {'input_size': 'large'}},
    {'pretrained_cfg': 'a text'},
])
def test_config_that_does_not_fit(model_dir, changes, input_error):
    if isinstance(changes, bytes):
        (model_dir / 'config.json').write_bytes(changes)
    else:
        change_config(model_dir, **changes)
    with input_error(str(model_dir)):
        load_model(str(model_dir))
    (model_dir / 'config.json').unlink()
    with input_error('config'):
        load_model(str(model_dir))


@pytest.mark.parametrize('name, match', [
    ('no_such_model', "'no_such_model'.*vt-zoo models"),
    ('no/such/folder', "'no/such/folder'"),
    ('', 'model'),
    ('vt_resnet18', 'vt_resnet18.*No pretrained weights'),
    ('vt_resnet18.no_such_tag', 'no_such_tag'),
    ('no-such-source:vt_resnet18', 'no-such-source'),
    ('local-dir:no/such/folder', 'no/such/folder'),
])
def test_model_that_is_not_there(tmp_path, monkeypatch, name, match, input_error):
    monkeypatch.chdir(tmp_path)
    with input_error(match):
        load_model(name)


def test_hub_that_cannot_be_reached(monkeypatch, tmp_path, input_error):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    with input_error('hf-hub:nobody/nothing'):
        load_model('hf-hub:nobody/nothing')


def test_size_that_a_model_refuses_without_a_word(input_error):
    class Silent(torch.nn.Linear):
        def forward(self, x):
            raise AssertionError

    with input_error('model mine does not take images of 3x8x8: AssertionError$'):
        check_input_size(Silent(1, 1), (3, 8, 8), 'mine')
